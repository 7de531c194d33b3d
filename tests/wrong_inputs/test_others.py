"""Wrong arguments of whatever is public and no trainer: schedules, rewards, pairs, monitors, evaluation, stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from refused import check

import trl_ext
from trl_ext import (
    AdapterReward,
    DifficultyCurriculum,
    DPOConfig,
    DPOThenPPO,
    GRPOTrainer,
    HealthChecks,
    ImplicitReward,
    ObjectiveSchedule,
    PPOConfig,
    RewardConstraint,
    RewardObjectives,
    ServiceReward,
    WasteCallback,
    export_role,
    load_critic,
    make_pairs,
    verify,
)
from trl_ext.curriculum.difficulty import drop_solved, pass_rates
from trl_ext.evaluation.credit import credit_by_token
from trl_ext.evaluation.held_out import Estimate, HeldOut, evaluate_policy
from trl_ext.monitors.health import EntropyCheck, KLCheck, PreferenceAccuracyCheck, RewardHackingCheck
from trl_ext.preferences.flags import flag_pairs


PAIRS = Dataset.from_dict({"prompt": ["w1"] * 4, "chosen": [" w2"] * 4, "rejected": [" w3"] * 4})
NO_MODEL = "no-one/no-model"

made: list[Any] = []


def trainer() -> Any:
    """The same for all: a call that is refused leaves no trace."""
    if not made:
        made.append(tiny.trainer(GRPOTrainer, "out", tiny.hashed))
    return made[0]


def implicit(policy: Any = None, reference: Any = None, beta: Any = 0.1, tokenizer: Any = None, **given: Any) -> Any:
    models = [tiny.qwen2() if model is None else model for model in (policy, reference)]
    return ImplicitReward(*models, beta, tokenizer or tiny.tokenizer(), **given)


def two_stages(**given: Any) -> Any:
    defaults = {
        "model": NO_MODEL,
        "reward_funcs": tiny.hashed,
        "train_dataset": tiny.prompts(),
        "output_dir": "out",
        "dpo_args": DPOConfig(**tiny.pair_settings("out")),
        "policy_args": PPOConfig(**tiny.cpu_settings("out")),
        "peft_config": tiny.lora(),
        "processing_class": tiny.tokenizer(),
    }
    return DPOThenPPO(**{**defaults, **given})


def needs_answer(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


CASES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    # Curricula
    "curriculum: schedule": (lambda: DifficultyCurriculum("easy"), ["schedule='easy'", "'easy_to_hard'"]),
    "curriculum: column": (lambda: DifficultyCurriculum(column=3), ["column is 3"]),
    "curriculum: lookahead": (lambda: DifficultyCurriculum(lookahead="4"), ["lookahead is '4'"]),
    "curriculum: lookahead of 1": (lambda: DifficultyCurriculum(lookahead=1), ["lookahead=1", "2 or more"]),
    "curriculum: until": (lambda: DifficultyCurriculum(until="all"), ["until is 'all'"]),
    "curriculum: share": (lambda: DifficultyCurriculum(share=2), ["share=2", "(0, 1)"]),
    "curriculum: length": (lambda: DifficultyCurriculum(start_completion_length="short"), ["is 'short'"]),
    "pass_rates: trainer": (lambda: pass_rates(None, tiny.prompts()), ["trainer is None"]),
    "pass_rates: dataset": (lambda: pass_rates(trainer(), [1]), ["dataset is [1]"]),
    "pass_rates: num_generations": (lambda: pass_rates(trainer(), tiny.prompts(4), -1), ["num_generations=-1"]),
    "pass_rates: batch_size": (lambda: pass_rates(trainer(), tiny.prompts(4), batch_size=0), ["batch_size=0"]),
    "drop_solved": (lambda: drop_solved([1]), ["dataset is [1]", "pass_rates"]),
    # Objectives
    "schedule: points": (lambda: ObjectiveSchedule(0.5), ["points is 0.5"]),
    "schedule: no points": (lambda: ObjectiveSchedule([]), ["points=[]"]),
    "schedule: triples": (lambda: ObjectiveSchedule([(0, 1, 2)]), ["(0, 1, 2)"]),
    "schedule: text": (lambda: ObjectiveSchedule([(0.0, "1")]), ["'1'"]),
    "schedule: shape": (lambda: ObjectiveSchedule([(0, 1.0)], shape="line"), ["shape='line'", "'linear'"]),
    "constraint: reward": (lambda: RewardConstraint(tiny.hashed, 0.5, 0.1), ["reward is a function"]),
    "constraint: floor": (lambda: RewardConstraint("a", "0.5", 0.1), ["'a'", "floor is '0.5'"]),
    "constraint: learning_rate": (lambda: RewardConstraint("a", 0.5, 0), ["learning_rate=0"]),
    "constraint: maximum": (lambda: RewardConstraint("a", 0.5, 0.1, maximum="x"), ["maximum is 'x'"]),
    "objectives: schedules": (lambda: RewardObjectives([1]), ["schedules is [1]", "dict"]),
    "objectives: a schedule": (lambda: RewardObjectives({"a": "linear"}), ["schedules['a'] is 'linear'"]),
    "objectives: one constraint": (
        lambda: RewardObjectives(constraints=RewardConstraint("a", 0.5, 0.1)),
        ["constraints is a RewardConstraint", "list"],
    ),
    "objectives: names": (lambda: RewardObjectives(constraints=["a"]), ["'a'", "RewardConstraint(...)"]),
    "objectives: none": (RewardObjectives, ["RewardObjectives", "reward_weights"]),
    "objectives: trainer": (lambda: RewardObjectives({"a": 1.0}).attach(None), ["not NoneType"]),
    "objectives: unknown reward": (lambda: RewardObjectives({"a": 1.0}).attach(trainer()), ["'a'", "hashed"]),
    # A service
    "service: func": (lambda: ServiceReward("judge"), ["func is 'judge'", "reward function"]),
    "service: retries": (lambda: ServiceReward(tiny.hashed, retries=-1), ["retries=-1"]),
    "service: first_wait": (lambda: ServiceReward(tiny.hashed, first_wait=-1.0), ["first_wait=-1.0"]),
    "service: timeout": (lambda: ServiceReward(tiny.hashed, timeout=0), ["timeout=0", "None"]),
    "service: most_missing": (lambda: ServiceReward(tiny.hashed, most_missing="all"), ["most_missing is 'all'"]),
    # The implicit reward
    "implicit: policy": (lambda: implicit(policy="m"), ["policy is 'm'"]),
    "implicit: reference": (lambda: implicit(reference="m"), ["reference is 'm'"]),
    "implicit: beta": (lambda: implicit(beta="0.1"), ["beta is '0.1'"]),
    "implicit: tokenizer": (lambda: implicit(tokenizer="m"), ["tokenizer is 'm'"]),
    "implicit: batch_size": (lambda: implicit(batch_size=0), ["batch_size=0"]),
    "implicit: template": (lambda: implicit(chat_template_kwargs="x"), ["chat_template_kwargs is 'x'"]),
    # Pairs
    "pairs: trainer": (lambda: make_pairs(None, tiny.prompts()), ["trainer is None"]),
    "pairs: a model": (lambda: make_pairs(tiny.qwen2(), tiny.prompts()), ["trainer is a Qwen2ForCausalLM"]),
    "pairs: dataset": (lambda: make_pairs(trainer(), [{"prompt": "w1"}]), ["dataset is [{'prompt'"]),
    "pairs: no prompts": (lambda: make_pairs(trainer(), PAIRS.remove_columns("prompt")), ["['chosen', 'rejected']"]),
    "pairs: None": (lambda: make_pairs(trainer(), Dataset.from_dict({"prompt": ["w1", None]})), ["row 1 is None"]),
    "pairs: ids": (lambda: make_pairs(trainer(), Dataset.from_dict({"prompt": [[4]]})), ["`prompt` of row 0", "[4]"]),
    "pairs: strategy": (lambda: make_pairs(trainer(), tiny.prompts(4), strategy="best"), ["strategy='best'"]),
    "pairs: num_generations": (lambda: make_pairs(trainer(), tiny.prompts(4), "4"), ["num_generations is '4'"]),
    "pairs: margin": (lambda: make_pairs(trainer(), tiny.prompts(4), margin="x"), ["margin is 'x'"]),
    "flags: a list": (lambda: flag_pairs([1]), ["pairs", "list"]),
    "flags: None": (
        lambda: flag_pairs(Dataset.from_dict({**PAIRS.to_dict(), "rejected": [None] * 4})),
        ["`rejected` of row 0 is None"],
    ),
    # Monitors
    "checks: a class": (lambda: HealthChecks(KLCheck), ["KLCheck", "Pass checks"]),
    "checks: without": (lambda: HealthChecks(without=3), ["without is 3"]),
    "checks: trainer": (lambda: HealthChecks().add_to(None), ["trainer is None"]),
    "KLCheck: band": (lambda: KLCheck(band=3), ["band is 3"]),
    "KLCheck: ends": (lambda: KLCheck(band=("a", "b")), ["band=('a', 'b')"]),
    "KLCheck: per": (lambda: KLCheck(per="word"), ["per='word'", "'token'"]),
    "KLCheck: patience": (lambda: KLCheck(patience=0), ["patience=0"]),
    "KLCheck: grace": (lambda: KLCheck(grace="long"), ["grace is 'long'"]),
    "EntropyCheck: floor": (lambda: EntropyCheck(floor="low"), ["floor is 'low'"]),
    "PreferenceAccuracyCheck: threshold": (lambda: PreferenceAccuracyCheck(threshold="x"), ["threshold is 'x'"]),
    "RewardHackingCheck: p_value": (lambda: RewardHackingCheck(p_value="x"), ["p_value is 'x'"]),
    "waste: none": (lambda: WasteCallback(None), ["trainer is None"]),
    "waste: ours": (lambda: WasteCallback(trainer()), ["WasteCallback", "trl.GRPOTrainer", "read"]),
    "verify: none": (lambda: verify(None), ["NoneType", "trl_ext.GRPOTrainer"]),
    "verify: repetitions": (lambda: verify(trainer(), repetitions=0), ["repetitions=0"]),
    "reward adapter: folder": (lambda: AdapterReward("out"), ["There is no adapter in out"]),
    "reward adapter: batch_size": (lambda: AdapterReward("out", batch_size=0), ["batch_size=0"]),
    # Critics
    "export: run": (lambda: export_role(None), ["run is None"]),
    "export: no run": (lambda: export_role("out"), ["'out' is no folder"]),
    "export: role": (lambda: export_role("out", "actor"), ["role='actor'", "'policy'"]),
    "export: dtype": (lambda: export_role("out", dtype="int8"), ["dtype='int8'", "'bfloat16'"]),
    "export: base": (lambda: export_role("out", base=3), ["base is 3"]),
    "critic: directory": (lambda: load_critic(None, tiny.qwen2()), ["directory is None"]),
    "critic: actor": (lambda: load_critic("out", "m"), ["actor is 'm'"]),
    # Rollouts and evaluation
    "rollouts: a number": (lambda: trainer().roll_out(3, 2), ["rows is 3"]),
    "rollouts: one row": (lambda: trainer().roll_out({"prompt": "w1"}, 2), ["rows is {'prompt': 'w1'}"]),
    "rollouts: text": (lambda: trainer().roll_out(["w1"], 2), ["rows is 'w1'"]),
    "rollouts: none": (lambda: trainer().roll_out([], 2), ["rows is empty"]),
    "rollouts: no prompt": (lambda: trainer().roll_out([{"question": "w1"}], 2), ["`prompt`", "['question']"]),
    "rollouts: None": (lambda: trainer().roll_out([{"prompt": None}], 2), ["`prompt` of row 0 is None"]),
    "rollouts: mixed": (
        lambda: trainer().roll_out([{"prompt": "w1"}, {"prompt": [{"role": "user", "content": "w1"}]}], 2),
        ["text (row 0)", "messages (row 2)"],
    ),
    "rollouts: num_generations": (lambda: trainer().roll_out([{"prompt": "w1"}], 0), ["num_generations=0"]),
    "rollouts: seed": (lambda: trainer().roll_out([{"prompt": "w1"}], 2, seed="x"), ["seed is 'x'"]),
    "evaluation: trainer": (lambda: evaluate_policy(None, tiny.prompts(4)), ["trainer is None"]),
    "evaluation: dataset": (lambda: evaluate_policy(trainer(), 3), ["dataset is 3"]),
    "evaluation: one row": (lambda: evaluate_policy(trainer(), tiny.prompts(1)), ["dataset has 1 rows"]),
    "evaluation: samples": (lambda: evaluate_policy(trainer(), tiny.prompts(4), "4"), ["num_samples is '4'"]),
    "held out: dataset": (lambda: HeldOut(trainer(), None), ["dataset is None"]),
    "held out: every": (lambda: HeldOut(trainer(), tiny.prompts(4), every=-1), ["every=-1"]),
    "estimate: a list": (lambda: Estimate.of([1.0]), ["values is [1.0]"]),
    "estimate: one dimension": (lambda: Estimate.of(torch.ones(4)), ["values", "(4,)"]),
    "credit: no critic": (lambda: credit_by_token(trainer(), [{"prompt": "w1"}]), ["GRPOTrainer", "PPOTrainer"]),
    # The schedule of two stages
    "stages: model": (lambda: two_stages(model=None), ["model is None"]),
    "stages: no reward": (lambda: two_stages(reward_funcs=None), ["reward_funcs is empty"]),
    "stages: a reward": (lambda: two_stages(reward_funcs=3), ["reward_funcs has 3"]),
    "stages: a column": (lambda: two_stages(reward_funcs=needs_answer), ["`needs_answer`", "'answer'"]),
    "stages: no data": (lambda: two_stages(train_dataset=None), ["train_dataset=None"]),
    "stages: a list": (lambda: two_stages(train_dataset=[1]), ["train_dataset", "list"]),
    "stages: ids": (lambda: two_stages(train_dataset=Dataset.from_dict({"prompt": [[4]] * 4})), ["`prompt`", "[4]"]),
    "stages: pairs of None": (
        lambda: two_stages(pairs=Dataset.from_dict({**PAIRS.to_dict(), "rejected": [None] * 4})),
        ["pairs: `rejected` of row 0 is None"],
    ),
    "stages: eval_pairs": (
        lambda: two_stages(
            eval_pairs=Dataset.from_dict({**PAIRS.to_dict(), "chosen": [[{"role": "assistant", "content": "w"}]] * 4}),
            dpo_args=DPOConfig(**tiny.pair_settings("out", eval_strategy="epoch")),
        ),
        ["eval_pairs", "text in `prompt`", "messages in `chosen`"],
    ),
    "stages: output_dir": (lambda: two_stages(output_dir=None), ["output_dir is None"]),
    "stages: dpo_args": (lambda: two_stages(dpo_args={}), ["`dpo_args`", "DPOConfig(**args)"]),
    "stages: policy_args": (
        lambda: two_stages(policy_args=DPOConfig(**tiny.pair_settings("out"))),
        ["`policy_args`", "not DPOConfig"],
    ),
    "stages: policy_trainer": (lambda: two_stages(policy_trainer="PPO"), ["policy_trainer is 'PPO'"]),
    "stages: peft_config": (lambda: two_stages(peft_config={"r": 4}), ["peft_config is {'r': 4}"]),
    "stages: processing_class": (lambda: two_stages(processing_class="m"), ["processing_class is 'm'"]),
    "stages: rounds": (lambda: two_stages(rounds="2"), ["rounds is '2'"]),
    "stages: accuracy_threshold": (lambda: two_stages(accuracy_threshold=75), ["accuracy_threshold=75", "(0, 1)"]),
    "stages: pair_settings": (lambda: two_stages(pair_settings=["a"]), ["pair_settings is ['a']"]),
    "stages: a pair setting": (lambda: two_stages(pair_settings={"strategy": "best"}), ["strategy='best'"]),
    "stages: one completion for pairs": (
        lambda: two_stages(policy_args=PPOConfig(**tiny.cpu_settings("out", num_generations=1)), rounds=2),
        ["`num_generations` is 1", "at least 2"],
    ),
    "stages: policy_kwargs": (
        lambda: two_stages(policy_kwargs={"reward_modle": "m"}),
        ["policy_kwargs", "'reward_modle'", "'reward_model'?"],
    ),
    "stages: dpo_kwargs": (lambda: two_stages(dpo_kwargs={"model": "m"}), ["dpo_kwargs", "'model'"]),
    "stages: clean": (lambda: two_stages(clean=3), ["clean is 3"]),
    "stages: prepare": (lambda: two_stages(prepare=3), ["prepare is 3"]),
    "stages: held_out": (lambda: two_stages(held_out=tiny.prompts(1)), ["held_out has 1 row"]),
    "stages: held_out_samples": (lambda: two_stages(held_out_samples=0), ["held_out_samples=0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_others(case):
    check(*CASES[case])


def test_a_folder_without_a_critic(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No critic in directory='.*'.*Pass the folder `critic`"):
        load_critic(tmp_path, tiny.qwen2())


def test_every_public_name_that_takes_something_is_in_a_table():
    """But for errors, which take what raises them, and `GSPOConfig` and the like, which are `GRPOConfig`s."""
    tables = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    families = ("DAPO", "DUPO", "GSPO", "RLOO", "VAPO")
    names = [name for name in trl_ext.__all__ if not name.endswith("Error") and not name.startswith(families)]
    assert [name for name in names if f"{name}(" not in tables and f"{name}," not in tables] == []
