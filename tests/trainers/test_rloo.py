"""
RLOO against TRL's `RLOOTrainer`, from the same rollouts: the trainer, and the estimator alone with other losses.
REINFORCE against its formula. Scripts that were written for `trl.RLOOTrainer`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from comparing import Gradients, largest_relative_error, relative_error
from datasets import Dataset
from peft import get_peft_model
from processes import run as run_process
from trl import TrlParser

import trl_ext
from recipes.tasks.sort_digits import build_model, build_tokenizer
from trl_ext import GRPOTrainer, RLOOConfig, RLOOTrainer


ROWS, GROUP, LONGEST = 16, 4, 6
TOLERANCE = 1e-5


# The trainer


def sometimes(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """No reward for a fifth of the completions."""
    return [r if ids[0] % 5 else None for r, ids in zip(tiny.hashed(completion_ids), completion_ids, strict=True)]


@dataclass
class Case:
    """
    Args:
        settings (`dict`):
            Of both configurations.
        rewards (`tuple`):
            Reward functions.
        arguments (`Callable`):
            Of both trainers.
        shows (`str`, *optional*):
            A metric that TRL's run must have logged with a value other than zero.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    rewards: tuple[Callable[..., list[Any]], ...] = (tiny.hashed,)
    arguments: Callable[[], dict[str, Any]] = dict
    shows: str | None = None


# KL, whose reference is the policy at the start, and updates that are large enough to be clipped
CLIPPED = {"epsilon": 0.05, "learning_rate": 3e-2}


def adapter() -> dict[str, Any]:
    """A policy that comes with an adapter, of which TRL, too, keeps a copy for the reference."""
    torch.manual_seed(4)
    return {"model": get_peft_model(tiny.stopping().double(), tiny.lora(lora_alpha=16))}


# Rounding grows from step to step, and with the size of a step
CASES = {
    "defaults": Case(shows="kl"),
    "without_kl": Case({"beta": 0.0}),
    "clipped": Case({"beta": 0.1, **CLIPPED}, shows="clip_ratio/region_mean"),
    "clipped_without_kl": Case({"beta": 0.0, "epsilon_high": 0.08, **CLIPPED}, shows="clip_ratio/region_mean"),
    "several_iterations": Case({"num_iterations": 2, "steps_per_generation": 4, **CLIPPED}, shows="kl"),
    "several_iterations_without_kl": Case({"num_iterations": 2, "beta": 0.0}),
    "one_step_a_generation": Case({"steps_per_generation": 4}, shows="kl"),
    "one_step_without_kl": Case({"steps_per_generation": 4, "beta": 0.0}),
    "misaligned": Case({"steps_per_generation": 6}, shows="kl"),
    "one_micro_batch": Case({"gradient_accumulation_steps": 1, "steps_per_generation": 2}, shows="kl"),
    "normalized": Case({"normalize_advantages": True}, (sometimes,)),
    "clipped_rewards": Case({"reward_clip_range": (0.2, 0.6)}),
    "two_functions": Case({"reward_weights": [0.5, 2.0]}, (tiny.hashed, sometimes)),
    "masked_truncated": Case({"mask_truncated_completions": True}, shows="completions/clipped_ratio"),
    "lora": Case({"beta": 0.1}, arguments=adapter, shows="kl"),
    "lora_without_kl": Case({"beta": 0.0, "num_iterations": 2}, arguments=adapter),
    "lora_clipped": Case(
        {"beta": 0.1, "num_iterations": 2, "epsilon": 1e-3}, arguments=adapter, shows="clip_ratio/region_mean"
    ),
}
# What is not logged as by TRL: its loss has the advantage of a completion that is masked out, as a constant; it looks
# for variance in clipped rewards
DIFFERENT = {"masked_truncated": {"loss"}, "clipped_rewards": {"frac_reward_zero_std"}}
# If micro-batches fit: of the rows that are computed, or means of extremes over other micro-batches
NOT_OF_ALL_ROWS = {"entropy", "clip_ratio/low_min", "clip_ratio/high_max"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """On disk: TRL reads the reference from there."""
    folder = tmp_path_factory.mktemp("policy")
    tiny.stopping().save_pretrained(folder)
    return str(folder)


def made(trainer_class: Any, config_class: Any, case: Case, policy: str, tmp_path: Path, **more: Any) -> Any:
    """
    Micro-batches of 4 in groups of 4, 4 of them to an optimizer step and 8 to a generation; 3 steps. The model is in
    float64, TRL's head in float32: completions of a group pull in opposite directions, and the rounding of float32
    alone would be 1e-5 of what is left (2e-5 in groups of 2, for TRL's trainer as for ours).
    """
    settings = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-4,
        "max_steps": 3,
        "max_completion_length": 12,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
        "model_init_kwargs": {"dtype": torch.float64},
        **case.settings,
        **more,
    }
    rewards = [tiny.Remembering(func, func.__name__) for func in case.rewards]
    given = {"model": policy, "train_dataset": tiny.ragged(), "processing_class": tiny.tokenizer(), **case.arguments()}
    args = config_class(**tiny.cpu_settings(tmp_path, **settings))
    return trainer_class(reward_funcs=rewards, args=args, callbacks=[Gradients()], **given)


def trained(*args: Any, **more: Any) -> tuple[Any, list[torch.Tensor], list[list[int]]]:
    """A trainer, the gradient of each of its steps, and the completions that it sampled."""
    trainer = made(*args, **more)
    trainer.train()
    (gradients,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Gradients)]
    completions = [ids for call in trainer.reward_funcs[0].calls for ids in call.completion_ids]
    return trainer, gradients.vectors, completions


@pytest.mark.train
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_trls(name, policy, tmp_path):
    case = CASES[name]
    theirs, expected, completions = trained(trl.RLOOTrainer, trl.RLOOConfig, case, policy, tmp_path / "theirs")
    logged = [log for log in theirs.state.log_history if "loss" in log]
    assert case.shows is None or any(log.get(case.shows) for log in logged)
    for fit in (False, True):
        more = {"fit_micro_batches": fit}
        ours, gradients, same = trained(RLOOTrainer, RLOOConfig, case, policy, tmp_path / f"{fit}", **more)
        assert same == completions
        assert largest_relative_error(gradients, expected) <= TOLERANCE
        assert (ours.saved_compute.token_slots < ours.saved_compute.token_slots_trl) == fit
        for log, other in zip(tiny.history(ours), logged, strict=True):
            # Under the same names and, but for rounding, with the same values
            for key in other.keys() - {"step_time", *DIFFERENT.get(name, ()), *(NOT_OF_ALL_ROWS if fit else ())}:
                assert log[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


@pytest.mark.train
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_evaluation_is_trls(beta, policy, tmp_path):
    case = Case({"beta": beta, "reward_clip_range": (0.2, 0.6), "num_generations_eval": 4, "max_steps": 2, **CLIPPED})
    evaluation = {"per_device_eval_batch_size": 8}
    found = []
    for trainer_class, config_class in ((trl.RLOOTrainer, trl.RLOOConfig), (RLOOTrainer, RLOOConfig)):
        trainer = made(trainer_class, config_class, case, policy, tmp_path / trainer_class.__module__, **evaluation)
        trainer.train()
        torch.manual_seed(3)
        found.append(trainer.evaluate(tiny.ragged(2)))  # one batch, whose numbers are those of the set
    theirs, ours = found
    assert bool(theirs.get("eval_kl")) == (beta > 0)
    for key in theirs.keys() - {key for key in theirs if key.endswith(("_runtime", "_per_second"))}:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


def kl_of(model: Any, prompt: list[int], ids: list[int]) -> float:
    """log π(o) − log π_ref(o), where the reference is the policy without its adapter."""
    logps = []
    for adapted in (True, False):
        with torch.no_grad():
            context = model.disable_adapter() if not adapted else torch.no_grad()
            with context:
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps.append(logits.gather(1, torch.tensor(ids).unsqueeze(1)).sum().item())
    return logps[0] - logps[1]


@pytest.mark.train
@pytest.mark.parametrize("selection", ["all", "refill", "duplicate"])
@pytest.mark.parametrize("estimator", ["leave_one_out", "reinforce"])
def test_advantages_are_those_of_the_reward_minus_the_kl(selection, estimator, tmp_path):
    """A_i = (R_i − β KL_i) − the mean of the others' (or nothing); copies have the advantages of their source."""
    trainer = tiny.trainer(
        tiny.recorded(RLOOTrainer),
        tmp_path,
        tiny.LiveFor(set(range(4, 24, 2))),
        {"peft_config": tiny.lora(lora_alpha=16, init_lora_weights=True)},
        beta=0.3,
        learning_rate=0.0,
        max_steps=3,
        num_generations=4,
        rollout_selection=selection,
        advantage_estimator=estimator,
    )
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:  # away from the reference
            torch.nn.init.normal_(weight, std=0.3)
    trainer.train()
    copied = 0
    for batch in trainer.batches:
        rewards = []
        for prompt, ids in zip(batch.prompts, batch.completions, strict=True):
            target = trainer.train_dataset["target"][trainer.train_dataset["prompt"].index(words(prompt))]
            reward = tiny.hashed([ids])[0] if target % 2 == 0 else 0.0
            rewards.append(reward - 0.3 * kl_of(trainer.model, prompt, ids))
        expected = []
        for i, reward in enumerate(rewards):
            others = [rewards[j] for j in range(i - i % 4, i - i % 4 + 4) if j != i]
            expected.append(reward - (sum(others) / 3 if estimator == "leave_one_out" else 0.0))
        torch.testing.assert_close(batch.output["advantages"], torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert "ref_per_token_logps" not in batch.output
        copied += batch.selection is not None and batch.selection.sources != list(range(4))
    assert (copied > 0) == (selection == "duplicate")
    # The table of completions has the slots' own, whose KL is not known where they were replaced: rewards are 0 there
    if copied and estimator == "leave_one_out":
        (last,) = trainer.batches[-1:]
        own = [source == slot for slot, source in enumerate(last.selection.sources)]
        assert not all(own)
        logged = torch.tensor(list(trainer._logs["advantages"])).view(-1, 4)
        assert [bool(group.any()) for group in logged] == own
    # TRL's loss has no KL of its own
    assert (trainer.beta, trainer.kl_coef, trainer.args.beta) == (0.0, 0.3, 0.3)
    kls = [log["kl"] for log in tiny.history(trainer)]
    assert len(kls) == 3 and all(abs(kl) > 0.1 for kl in kls)


def words(prompt: list[int]) -> str:
    return tiny.tokenizer().decode(prompt)


@pytest.mark.train
def test_rows_without_an_advantage_are_not_computed(policy, tmp_path):
    """Without a KL the groups whose rewards are equal give no gradient; with one, they have advantages."""
    saved = {}
    for beta in (0.0, 0.1):
        case = Case({"beta": beta, **CLIPPED}, (tiny.first_token_even,))
        expected = trained(trl.RLOOTrainer, trl.RLOOConfig, case, policy, tmp_path / "theirs")[1]
        ours, gradients, _ = trained(RLOOTrainer, RLOOConfig, case, policy, tmp_path / "ours")
        assert largest_relative_error(gradients, expected) <= TOLERANCE
        saved[beta] = ours.saved_compute
        assert ours.exact_savings.skip_dead and ours.exact_savings.regroup
    assert saved[0.0].skipped_rows > 0 and saved[0.0].skipped_rows > saved[0.1].skipped_rows


@pytest.mark.train
def test_the_off_policy_mask_reads_the_real_log_probabilities(tmp_path):
    """Of whatever the loss gets in their place, so that its mean over tokens stays one."""

    class Seen(GRPOTrainer):
        @staticmethod
        def get_off_policy_mask(*, sampling_per_token_logps: torch.Tensor, **inputs: Any) -> torch.Tensor:
            seen.append(sampling_per_token_logps)
            return GRPOTrainer.get_off_policy_mask(sampling_per_token_logps=sampling_per_token_logps, **inputs)

    seen: list[torch.Tensor] = []
    settings = {"importance_sampling_level": "sequence_product", "updates_per_generation": 2, "learning_rate": 3e-3}
    trainer = tiny.trained(
        Seen, tmp_path, tiny.hashed, off_policy_mask_threshold=1e-3, fit_micro_batches=False, **settings
    )
    assert len(seen) == len(trainer.losses) > 2
    for logps, inputs in zip(seen, trainer.losses, strict=True):
        assert torch.equal(logps, inputs["old_per_token_logps"])


# Configurations


def settings(**changed: Any) -> dict[str, Any]:
    return {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none", **changed}


def comparable(config: Any) -> dict[str, Any]:
    """Accelerate's own object has no equality."""
    return {f.name: getattr(config, f.name) for f in fields(trl.RLOOConfig) if f.name != "accelerator_config"}


def test_every_argument_of_trls_has_its_name_and_default():
    assert comparable(RLOOConfig(**settings())) == comparable(trl.RLOOConfig(**settings()))
    assert {f.name for f in fields(trl.RLOOConfig)} <= {f.name for f in fields(RLOOConfig)}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"beta": 0.0, "normalize_advantages": True, "reward_clip_range": (-1.0, 2.0)},
        {"steps_per_generation": 4, "num_generations": 4, "epsilon": 0.001, "epsilon_high": 0.3, "num_iterations": 2},
        {"generation_batch_size": 32, "max_completion_length": 256, "temperature": 0.7, "reward_weights": [1.0, 2.0]},
        {"num_generations": 8, "learning_rate": 1e-6},  # what other configurations have as defaults
    ],
    ids=str,
)
def test_a_configuration_of_trls_is_taken_over(changed):
    theirs = trl.RLOOConfig(**settings(**changed))
    ours = RLOOConfig.adopt(theirs)
    assert type(ours) is RLOOConfig and comparable(ours) == comparable(theirs)
    assert RLOOConfig.adopt(ours) is ours


def test_a_grpo_configuration_follows_the_method():
    ours = RLOOConfig.adopt(trl.GRPOConfig(**settings(temperature=0.7, num_generations=4)))
    assert (ours.temperature, ours.num_generations) == (0.7, 4)
    assert (ours.beta, ours.loss_type, ours.importance_sampling_level) == (0.05, "grpo", "sequence_product")
    with pytest.raises(TypeError, match="DAPOConfig, whose defaults are those of a different method"):
        RLOOConfig.adopt(trl_ext.DAPOConfig(**settings()))
    with pytest.raises(TypeError, match=r"must be a RLOOConfig or a trl\.GRPOConfig, not DPOConfig"):
        RLOOConfig.adopt(trl.DPOConfig(**settings()))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reward_clip_range": [1.0]}, "reward_clip_range=[1.0] must be two numbers"),
        ({"reward_clip_range": [1.0, -1.0]}, "reward_clip_range=[1.0, -1.0] must be two numbers"),
        ({"advantage_estimator": "group"}, "beta=0.05 would have no effect on the advantages that TRL computes"),
        (
            {"advantage_estimator": "group", "beta": 0.0, "normalize_advantages": True},
            "normalize_advantages=True would have no effect",
        ),
        ({"advantage_estimator": "gae"}, "advantage_estimator='gae' needs a critic"),
        ({"loss_type": "vespo"}, "loss_type='vespo' is not exact with importance_sampling_level='sequence_product'"),
        ({"num_generations": 1}, "at least 2 generations per prompt"),
    ],
)
def test_what_is_refused(changed, said):
    with pytest.raises(ValueError) as error:
        RLOOConfig(**settings(**changed))
    assert said in str(error.value)


def test_the_command_line(tmp_path):
    words = f"--output_dir {tmp_path} --use_cpu --bf16 False --reward_clip_range -5 5 --normalize_advantages".split()
    (args,) = TrlParser((RLOOConfig,)).parse_args_and_config(words)
    assert (args.reward_clip_range, args.normalize_advantages, args.beta) == ([-5.0, 5.0], True, 0.05)


# Scripts


def test_arguments_of_trls_trainer_keep_their_names_and_places():
    theirs, ours = (list(inspect.signature(t.__init__).parameters) for t in (trl.RLOOTrainer, trl.GRPOTrainer))
    assert [name for name in ours if name in theirs] == theirs and ours[:8] == theirs[:8]


def test_a_trainer_takes_trls_configuration(policy, tmp_path):
    args = trl.RLOOConfig(**tiny.cpu_settings(tmp_path, max_steps=1, reward_clip_range=(0.0, 1.0)))
    arguments = {"train_dataset": tiny.prompts(), "processing_class": tiny.tokenizer()}
    trainer = RLOOTrainer(policy, tiny.hashed, args, **arguments)
    trainer.train()
    assert type(trainer.args) is RLOOConfig and trainer.args.reward_clip_range == (0.0, 1.0)
    assert trainer.ref_model is not None and trainer.kl_coef == 0.05
    card = (tmp_path / "README.md").read_text() if (tmp_path / "README.md").exists() else None
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "2402.14740" in card and "RLOO" in card


def test_without_a_configuration(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    class OnCPU(RLOOConfig):
        def __post_init__(self) -> None:
            self.use_cpu, self.bf16 = True, False
            super().__post_init__()

    class OnCPUTrainer(RLOOTrainer):
        config_class = OnCPU

    trainer = OnCPUTrainer(policy, tiny.hashed, train_dataset=tiny.prompts(), processing_class=tiny.tokenizer())
    assert trainer.args.output_dir == f"{Path(policy).name}-RLOO"


# TRL's own script of the installed release, with its trainer and its configuration from here
SWAPS = {
    "from trl import RLOOTrainer, get_dataset": "from trl_ext import RLOOTrainer\n    from trl import get_dataset",
    "from trl import DatasetMixtureConfig, ModelConfig, RLOOConfig, TrlParser": (
        "from trl_ext import RLOOConfig\n    from trl import DatasetMixtureConfig, ModelConfig, TrlParser"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--use_peft --lora_target_modules q_proj v_proj --eval_strategy steps"])
def test_trls_script_runs_to_its_end(more, tmp_path):
    script = Path(trl.__file__).with_name("scripts").joinpath("rloo.py").read_text(encoding="utf-8")
    for theirs, ours in SWAPS.items():
        assert script.count(theirs) == 1
        script = script.replace(theirs, ours)
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "policy")
    build_model(tokenizer, seed=0).save_pretrained(tmp_path / "policy")
    (tmp_path / "prompts").mkdir()
    for split in ("train", "test"):
        rows = Dataset.from_dict({"prompt": [str(i * 7919) for i in range(16)]})
        rows.to_json(tmp_path / "prompts" / f"{split}.jsonl")
    words = f"--dataset_name {tmp_path}/prompts --model_name_or_path {tmp_path}/policy --output_dir {tmp_path}/out "
    words += "--reward_funcs tiny.hashed --dtype float32 --max_completion_length 6 --num_generations 4 --max_steps 2 "
    words += "--per_device_train_batch_size 8 --learning_rate 1e-2 --logging_steps 1 --eval_steps 1 --beta 0.1 "
    words += "--use_cpu --bf16 False --report_to none --disable_tqdm True --log_completions "
    said = run_process([tmp_path / "script.py", *words.split(), *more.split()], cwd=tmp_path)
    assert "Training completed" in said and "Model saved to" in said
    assert (tmp_path / "out" / ("adapter_model.safetensors" if more else "model.safetensors")).is_file()
    assert "'kl'" in said and "'selection/generated_tokens'" in said and ("'eval_reward'" in said) == bool(more)


# The estimators alone


def run(trainer_class: Any, config_class: Any, tmp_path: Any, **settings: Any) -> tuple[Any, torch.Tensor]:
    """One step on 4 prompts × 4 completions in two micro-batches: the rollouts' reward function, and the gradient."""
    reward, gradients = tiny.Remembering(tiny.hashed), Gradients()
    base = tiny.cpu_settings(
        tmp_path,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        num_generations=GROUP,
        per_device_train_batch_size=ROWS // 2,
        max_completion_length=LONGEST,
        beta=0.0,
    )
    trainer = trainer_class(
        model=tiny.stopping(),
        reward_funcs=reward,
        args=config_class(**{**base, **settings}),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    (call,), (gradient,) = reward.calls, gradients.vectors
    return call, gradient


def score_gradients(call: Any) -> torch.Tensor:
    """∇ Σ_t log π(o_t) of each completion, `(N, parameters)`."""
    model, tokenizer = tiny.stopping(), tiny.tokenizer()
    rows = []
    for prompt, ids in zip(call.prompts, call.completion_ids, strict=True):
        start = tokenizer(prompt)["input_ids"]
        logits = model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
        logp = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids).unsqueeze(1)).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(logp, list(model.parameters()))]))
    return torch.stack(rows)


@pytest.mark.train
@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_leave_one_out_is_trls_rloo(loss_type, tmp_path):
    """
    TRL's loss is a mean over completions of −min(r A, clip(r) A) with the ratio r of a whole completion. Before the
    first update r = 1, so that its gradient is −1/N Σ_i A_i ∇ Σ_t log π(o_it). Ours has the same sum, over the tokens
    of the batch in place of the N completions ("dapo"), or over N · max_completion_length ("dr_grpo"): TRL's is ours
    times the mean length, or times max_completion_length.
    """
    theirs, rloo = run(trl.RLOOTrainer, trl.RLOOConfig, tmp_path / "theirs")
    call, ours = run(
        trl_ext.GRPOTrainer,
        trl_ext.GRPOConfig,
        tmp_path / "ours",
        advantage_estimator="leave_one_out",
        loss_type=loss_type,
    )
    assert call.completion_ids == theirs.completion_ids and call.prompts == theirs.prompts
    mean_length = sum(map(len, call.completion_ids)) / ROWS
    assert mean_length < LONGEST
    factor = mean_length if loss_type == "dapo" else LONGEST
    assert relative_error(factor * ours, rloo) <= 1e-5
    # and both are what the formula says
    rewards = torch.tensor(call.rewards).view(-1, GROUP)
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (GROUP - 1)
    formula = -((rewards - others).flatten().unsqueeze(1) * score_gradients(call)).sum(dim=0) / ROWS
    assert relative_error(rloo, formula) <= 1e-5


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_reinforce_is_its_formula(momentum, tmp_path):
    # −1/tokens Σ_i R_i ∇ Σ_t log π(o_it); before the first batch there is no baseline yet
    call, ours = run(
        trl_ext.GRPOTrainer,
        trl_ext.GRPOConfig,
        tmp_path,
        advantage_estimator="reinforce",
        reinforce_baseline_momentum=momentum,
        loss_type="dapo",
    )
    tokens = sum(map(len, call.completion_ids))
    formula = -(torch.tensor(call.rewards).unsqueeze(1) * score_gradients(call)).sum(dim=0) / tokens
    assert relative_error(ours, formula) <= 1e-5


@pytest.mark.train
def test_reinforce_with_a_baseline(tmp_path):
    # The second step subtracts the mean of the first, and has other weights: at learning rate 0 it has the same ones
    reward, gradients = tiny.Remembering(tiny.hashed), Gradients()
    settings = tiny.cpu_settings(tmp_path, max_steps=2, optim="sgd", max_grad_norm=0.0, learning_rate=0.0)
    trainer = trl_ext.GRPOTrainer(
        model=tiny.stopping(),
        reward_funcs=reward,
        args=trl_ext.GRPOConfig(
            **settings, advantage_estimator="reinforce", reinforce_baseline_momentum=0.9, loss_type="dapo"
        ),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    first, second = reward.calls
    baseline = sum(first.rewards) / len(first.rewards)
    advantages = torch.tensor(second.rewards) - baseline
    tokens = sum(map(len, second.completion_ids))
    formula = -(advantages.unsqueeze(1) * score_gradients(second)).sum(dim=0) / tokens
    assert relative_error(gradients.vectors[1], formula) <= 1e-5
