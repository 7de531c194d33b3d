"""
With its features off (`fit_micro_batches` among them), a trainer of ours is TRL's, number for number.

Every case trains twice from the same seed, on TRL's trainer and on ours, by a real `train()`: two optimizer steps on
one generation and one on the next, or more where a case needs them. Then nothing may differ: weights bit for bit, the
gradients of each step (Adam hides a wrong constant, they don't), everything that was logged, every call of every
module, what was generated, rewarded and kept for the table of completions, and the state of the random generator.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from comparing import Gradients, equal, module_calls, without_clocks
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

import trl_ext
from trl_ext.trainers.seams.whole_checkpoints import MANIFEST


class Saved:
    """A policy and a reward model on disk, for what TRL loads by name."""

    def __init__(self, directory: Path) -> None:
        self.policy, self.judge = str(directory / "policy"), str(directory / "judge")
        for model, path in ((tiny.stopping(), self.policy), (tiny.classifier(), self.judge)):
            model.save_pretrained(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("saved"))


# Rewards


def applies_to_some(completion_ids: list[list[int]], target: list[int], **kwargs: Any) -> list[float | None]:
    """`None` for whole groups, and for single completions of others."""
    return [
        None if t % 3 == 0 or len(ids) < 3 else len(ids) / 6 for ids, t in zip(completion_ids, target, strict=True)
    ]


def even_if_it_applies(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """`None` where the first token is high: some completions are left without any reward."""
    return [
        None if ids[0] > 16 else share for ids, share in zip(completion_ids, tiny.low_ids(completion_ids), strict=True)
    ]


async def slowly(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [ids[-1] / 24 for ids in completion_ids]


def talkative(completion_ids: list[list[int]], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
    """Logs a column of the completions table and a metric of its own."""
    log_extra("first", [ids[0] for ids in completion_ids])
    log_metric("longest", max(map(len, completion_ids)))
    return tiny.low_ids(completion_ids)


def verdict_of_rollout(verdict: list[float], **kwargs: Any) -> list[float]:
    """Reads what the rollout function returned beside the tokens."""
    return verdict


# Tools, environments, rollout functions


class ToolTokenizer(PreTrainedTokenizerFast):
    """The tiny tokenizer, taking every completion that has w4 or w7 in it for the call of a tool."""

    response_template = {"fake": True}  # that there is one is all TRL looks at

    @classmethod
    def build(cls) -> "ToolTokenizer":
        plain = tiny.tokenizer()
        tokenizer = cls(
            tokenizer_object=plain.backend_tokenizer,
            padding_side="left",
            chat_template=(
                "{% for m in messages %}{{ m['content'] + ' ' }}{% for c in m.get('tool_calls') or [] %}"
                "{{ c['function']['name'] + ' ' + c['function']['arguments'] | tojson + ' ' }}{% endfor %}{% endfor %}"
                "{% if add_generation_prompt %}w0{% endif %}"
            ),
            **plain.special_tokens_map,
        )
        tokenizer.response_template = cls.response_template
        return tokenizer

    def parse_response(self, ids: Any, **kwargs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.decode(ids, skip_special_tokens=True)}
        words = [self.decode([token]) for token in ids]
        calls = [{"name": "add", "arguments": {"amount": 1}}] * ("w4" in words)
        calls += [{"name": "nonsense", "arguments": {}}] * ("w7" in words)
        if calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return message


class Adder:
    """An environment that counts how often its tool is called."""

    def reset(self, target: int, **kwargs: Any) -> str:
        self.total = target
        return " w1"

    def add(self, amount: int) -> str:
        """
        Add to the total.

        Args:
            amount: How much.

        Returns:
            The new total.
        """
        self.total += amount
        return f"w{self.total % 20}"

    def get_reward(self) -> float:
        return float(self.total)


def double(amount: int) -> str:
    """
    Double a number.

    Args:
        amount: The number.

    Returns:
        Twice as much.
    """
    return f"w{2 * amount}"


double.__name__ = "add"  # the name under which the tiny tokenizer calls


def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Sampled apart from the policy; the second token is an environment's."""
    lengths = torch.randint(2, 7, (len(prompts),)).tolist()
    completions = [torch.randint(4, 24, (length,)).tolist() for length in lengths]
    return {
        "prompt_ids": trainer.processing_class(text=prompts)["input_ids"],
        "completion_ids": completions,
        "logprobs": [[-1.0] * length for length in lengths],
        "env_mask": [[1, 0] + [1] * (length - 2) for length in lengths],
        "verdict": [ids[0] / 24 for ids in completions],
    }


# One run


@dataclass
class Run:
    """All that a training left behind, by what it is."""

    weights: dict[str, torch.Tensor]
    gradients: list[dict[str, torch.Tensor]]
    logs: list[dict[str, Any]]
    calls: list[tuple[Any, ...]]
    rewarded: list[Any]
    table: dict[str, Any]
    files: set[str]
    random_state: torch.Tensor


def remembering(reward: Any) -> Any:
    """Synchronous functions are asked through something that remembers; others are left alone."""
    if isinstance(reward, str) or reward is slowly:
        return reward
    return tiny.Remembering(reward, name=reward.__name__)


def run(trainer_class: type, config: trl.GRPOConfig, rewards: list[Any], arguments: dict[str, Any]) -> Run:
    rewards = [remembering(reward) for reward in rewards]
    given = {
        "model": tiny.stopping(),
        "train_dataset": tiny.prompts(),
        "processing_class": tiny.tokenizer(),
        **arguments,
    }
    gradients = Gradients()
    with module_calls() as calls:
        trainer = trainer_class(reward_funcs=list(rewards), args=config, callbacks=[gradients], **given)
        trainer.train()
        if given.get("eval_dataset") is not None:
            trainer.evaluate()
    remembered = [reward for reward in rewards if isinstance(reward, tiny.Remembering)]
    return Run(
        weights=tiny.weights(trainer.model),
        gradients=gradients.steps,
        logs=without_clocks(trainer.state.log_history),
        calls=calls,
        rewarded=[
            (call.step, call.prompts, call.completions, call.completion_ids, call.rewards, sorted(call.columns))
            for reward in remembered
            for call in reward.calls
        ],
        table={
            key: {name: list(column) for name, column in value.items()} if isinstance(value, dict) else list(value)
            for key, value in trainer._logs.items()
        },
        files={str(file.relative_to(config.output_dir)) for file in Path(config.output_dir).rglob("*")},
        random_state=torch.get_rng_state(),
    )


def differences(ours: Run, theirs: Run) -> list[str]:
    """In which respect two runs differ, the most telling first; what a checkpoint of ours holds more is left aside."""
    steps = zip(ours.gradients, theirs.gradients, strict=False)
    found = [f"gradients of step {i}" for i, (mine, other) in enumerate(steps) if not equal(mine, other)]
    for mine, other in zip(ours.logs, theirs.logs, strict=False):
        if mine.keys() != other.keys():
            found.append(f"keys logged at step {mine['step']}: {sorted(mine.keys() ^ other.keys())}")
        found += [
            f"{key} at step {mine['step']}: {mine[key]} instead of {other[key]}"
            for key in sorted(mine.keys() & other.keys())
            if not equal(mine[key], other[key])
        ]
    if len(ours.calls) != len(theirs.calls):
        found.append(f"{len(ours.calls)} calls of modules instead of {len(theirs.calls)}")
    extra = {file for file in ours.files if Path(file).name.startswith(("trl_ext_state", "trl_ext_buffer_", MANIFEST))}
    if ours.files - extra != theirs.files:
        found.append(f"files: {sorted((ours.files - extra) ^ theirs.files)}")
    respects = ["weights", "gradients", "logs", "calls", "rewarded", "table", "random_state"]
    if any("eval_reward" in log for log in theirs.logs):
        respects.remove("table")  # of which TRL has only one, for training and evaluation together
    return found + [name for name in respects if not equal(getattr(ours, name), getattr(theirs, name))]


def assert_same(ours: Run, theirs: Run) -> None:
    found = differences(ours, theirs)
    assert not found, "not as in TRL:\n" + "\n".join(found)


# Cases


@dataclass
class Case:
    """
    Args:
        settings (`dict`):
            Arguments of the configuration, beside those in `train`.
        arguments (`Callable`):
            Arguments of the trainer, made anew for every run.
        rewards (`list` or `Callable`):
            Reward functions.
        shows (`Callable`):
            Whether TRL's run has in it what the case is there for.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[[Saved], dict[str, Any]] = lambda saved: {}
    rewards: Callable[[Saved], list[Any]] = lambda saved: [tiny.low_ids]
    shows: Callable[[Run], bool] = lambda run: True


def logged(key: str) -> Callable[[Run], bool]:
    """Not always zero."""
    return lambda run: any(log.get(key) for log in run.logs)


def lora(dropout: float, **more: Any) -> Callable[[Saved], dict[str, Any]]:
    def arguments(saved: Saved) -> dict[str, Any]:
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
        return {"peft_config": config, **more}

    return arguments


CLIPPED = {"epsilon": 0.05, "learning_rate": 3e-2}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}

CASES = {
    # Losses: two optimizer steps to a generation, so that ratios leave 1
    "grpo": Case({"loss_type": "grpo", **CLIPPED}, shows=logged("clip_ratio/region_mean")),
    "bnpo": Case({"loss_type": "bnpo", **CLIPPED}, shows=logged("clip_ratio/region_mean")),
    "dr_grpo": Case({"loss_type": "dr_grpo", **CLIPPED}, shows=logged("clip_ratio/region_mean")),
    "dapo": Case({"loss_type": "dapo", "epsilon_high": 0.08, **CLIPPED}, shows=logged("clip_ratio/region_mean")),
    "cispo": Case({"loss_type": "cispo", "epsilon_high": 1.05}, shows=logged("cispo_clip_ratio")),
    "sapo": Case({"loss_type": "sapo"}),
    "luspo": Case({"loss_type": "luspo", **SEQUENCE}, shows=logged("clip_ratio/region_mean")),
    "luspo_token": Case({"loss_type": "luspo", **CLIPPED}, shows=logged("clip_ratio/region_mean")),
    "vespo": Case({"loss_type": "vespo"}, shows=logged("vespo/phi_seq_mean")),
    "sequence_level": Case({"loss_type": "grpo", **SEQUENCE}, shows=logged("clip_ratio/region_mean")),
    # A script written for TRL may set the level and leave the clip alone
    "sequence_level_with_trls_clip": Case({"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "two_sided_clip": Case({"delta": 1.1}),
    "off_policy_mask": Case({"off_policy_mask_threshold": 1e-3}),
    "kl": Case({"beta": 0.1}, lambda saved: {"model": saved.policy}, shows=logged("kl")),
    "kl_uncorrected": Case(
        {"beta": 0.1, "use_bias_correction_kl": False}, lambda saved: {"model": saved.policy}, shows=logged("kl")
    ),
    "kl_to_a_moving_reference": Case(
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
        lambda saved: {"model": saved.policy},
        shows=logged("kl"),
    ),
    "entropy": Case({"entropy_coef": 0.05, "top_entropy_quantile": 0.5}, shows=logged("policy_loss")),
    "adaptive_entropy": Case({"use_adaptive_entropy": True, "entropy_target": 3.0}, shows=logged("entropy_coef")),
    # What is generated when
    "one_step_a_generation": Case({"steps_per_generation": None}),
    "several_iterations": Case({"num_iterations": 2, "max_steps": 5}),
    "generations_across_steps": Case({"steps_per_generation": 3}),
    "generation_batch_size": Case({"steps_per_generation": None, "generation_batch_size": 48, "max_steps": 4}),
    "one_micro_batch_a_step": Case({"gradient_accumulation_steps": 1, "max_steps": 5}),
    "epochs": Case(
        {"max_steps": -1, "num_train_epochs": 3},
        lambda saved: {"train_dataset": tiny.prompts(8)},
        shows=lambda run: len(run.gradients) == 6,
    ),
    # Three micro-batches an epoch: every other window has one instead of two
    "epochs_of_odd_length": Case(
        {"max_steps": -1, "num_train_epochs": 3, "steps_per_generation": 1},
        lambda saved: {"train_dataset": tiny.prompts(6)},
        shows=lambda run: len(run.gradients) == 6,
    ),
    "iterable": Case(arguments=lambda saved: {"train_dataset": tiny.prompts().to_iterable_dataset()}),
    "unshuffled": Case({"shuffle_dataset": False}),
    "sampling": Case({"temperature": 0.7, "top_k": 8, "min_p": 0.02}),
    "truncated_masked": Case({"mask_truncated_completions": True}, shows=logged("completions/clipped_ratio")),
    "padded": Case({"pad_to_multiple_of": 8}),
    "gradient_checkpointing": Case({"gradient_checkpointing": True}),
    "sgd": Case({"optim": "sgd"}),
    "checkpoints": Case(
        {"save_strategy": "steps", "save_steps": 2}, shows=lambda run: "checkpoint-2/model.safetensors" in run.files
    ),
    # Models
    "absolute_positions": Case(arguments=lambda saved: {"model": tiny.gpt2()}),
    "lora": Case(arguments=lora(0.0)),
    "lora_with_dropout": Case(arguments=lora(0.05)),
    "lora_and_kl": Case({"beta": 0.1}, lora(0.0), shows=logged("kl")),
    # Rewards
    "dead_groups": Case(rewards=lambda saved: [tiny.first_token_even], shows=logged("frac_reward_zero_std")),
    "sum_then_normalize": Case(
        {"reward_weights": [1.0, 0.5], "multi_objective_aggregation": "sum_then_normalize"},
        rewards=lambda saved: [applies_to_some, even_if_it_applies],
    ),
    "normalize_then_sum": Case(
        {"reward_weights": [1.0, 0.5], "multi_objective_aggregation": "normalize_then_sum"},
        rewards=lambda saved: [applies_to_some, even_if_it_applies],
    ),
    "scaled_by_batch": Case({"scale_rewards": "batch"}, rewards=lambda saved: [applies_to_some, tiny.low_ids]),
    "unscaled": Case({"scale_rewards": False}),
    "async": Case(rewards=lambda saved: [tiny.low_ids, slowly, tiny.first_token_even, slowly]),
    # `AutoTokenizer` would read any tokenizer beside a Qwen2 as Qwen2's own
    "reward_model": Case(
        arguments=lambda saved: {"reward_processing_classes": tiny.tokenizer()},
        rewards=lambda saved: [saved.judge],
        shows=logged("rewards/judge/std"),
    ),
    "reward_model_and_functions": Case(
        {"reward_weights": [0.5, 1.0, 2.0]},
        lambda saved: {"reward_processing_classes": [None, tiny.tokenizer(), None]},
        lambda saved: [tiny.low_ids, saved.judge, slowly],
    ),
    "logging_reward": Case(rewards=lambda saved: [talkative], shows=logged("longest")),
    # Prompts
    "conversational": Case(arguments=lambda saved: {"train_dataset": tiny.prompts(conversational=True)}),
    "conversational_reward_model": Case(
        arguments=lambda saved: {
            "train_dataset": tiny.prompts(conversational=True),
            "reward_processing_classes": [tiny.tokenizer(), None],
        },
        rewards=lambda saved: [saved.judge, tiny.low_ids],
    ),
    "rollout_func": Case(
        arguments=lambda saved: {"rollout_func": rollout}, rewards=lambda saved: [tiny.low_ids, verdict_of_rollout]
    ),
    "tools": Case(
        {"max_completion_length": 12},
        lambda saved: {
            "train_dataset": tiny.prompts(conversational=True),
            "processing_class": ToolTokenizer.build(),
            "tools": [double],
        },
        shows=lambda run: logged("tools/call_frequency")(run) and logged("tools/failure_frequency")(run),
    ),
    "environment": Case(
        {"max_completion_length": 12},
        lambda saved: {
            "train_dataset": tiny.prompts(conversational=True),
            "processing_class": ToolTokenizer.build(),
            "environment_factory": Adder,
        },
        shows=lambda run: logged("tools/call_frequency")(run) and logged("rewards/Adder/std")(run),
    ),
    # Evaluation between steps, and after training. In several batches, TRL's numbers depend on their size.
    "evaluation": Case(
        {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "num_generations_eval": 2,
            "per_device_eval_batch_size": 16,
        },
        lambda saved: {"eval_dataset": tiny.prompts(8)},
        shows=lambda run: sum("eval_reward" in log for log in run.logs) > 3,
    ),
}


def settings_of(case: Case, directory: Path) -> dict[str, Any]:
    """Micro-batches of 8 completions in groups of 4, 2 to an optimizer step and 4 to a generation; 3 steps."""
    return tiny.cpu_settings(directory, max_steps=3, steps_per_generation=4) | case.settings


def train(trainer_class: type, config_class: Any, case: Case, saved: Saved, directory: Path, **settings: Any) -> Run:
    config = config_class(**settings_of(case, directory) | settings)
    return run(trainer_class, config, case.rewards(saved), case.arguments(saved))


def trls(case: Case, saved: Saved, directory: Path, **settings: Any) -> Run:
    """TRL's run, which has in it what the case is there for."""
    theirs = train(trl.GRPOTrainer, trl.GRPOConfig, case, saved, directory, **settings)
    assert len(theirs.gradients) >= 3
    assert all(any(gradient.any() for gradient in step.values()) for step in theirs.gradients)
    assert case.shows(theirs)
    return theirs


@pytest.mark.train
@pytest.mark.parametrize("name", CASES)
def test_every_step_is_trls(name, saved, tmp_path):
    theirs = trls(CASES[name], saved, tmp_path / "theirs")
    ours = train(
        trl_ext.GRPOTrainer, trl_ext.GRPOConfig, CASES[name], saved, tmp_path / "ours", fit_micro_batches=False
    )
    assert_same(ours, theirs)


def adopted(**settings: Any) -> trl_ext.GRPOConfig:
    config = trl_ext.GRPOConfig.adopt(trl.GRPOConfig(**settings))
    config.fit_micro_batches = False
    return config


@pytest.mark.train
def test_a_configuration_of_trls_gives_the_same_steps(saved, tmp_path):
    case = CASES["grpo"]
    taken_over = train(trl_ext.GRPOTrainer, adopted, case, saved, tmp_path / "ours")
    assert_same(taken_over, trls(case, saved, tmp_path / "theirs"))


def test_a_configuration_of_trls_is_ours_from_the_same_arguments(tmp_path, subtests):
    """Field for field, so that the steps that ours takes are those of a configuration that is taken over."""
    for name, case in CASES.items():
        with subtests.test(name):
            settings = settings_of(case, tmp_path)
            ours = trl_ext.GRPOConfig(**settings, fit_micro_batches=False)
            assert adopted(**settings).to_dict() == ours.to_dict()


PRESETS = {
    "dapo": (trl_ext.DAPOTrainer, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "dupo": (trl_ext.DUPOTrainer, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "gspo": (trl_ext.GSPOTrainer, {"loss_type": "grpo", **SEQUENCE}),
}


@pytest.mark.train
@pytest.mark.parametrize("preset", PRESETS)
def test_a_method_without_its_features_is_trls(preset, saved, tmp_path):
    trainer_class, said_to_trl = PRESETS[preset]
    case = Case({"learning_rate": 1e-2, "warmup_steps": 0, "lr_scheduler_type": "linear"})
    off = {"rollout_selection": "all", "token_normalization": "generation_batch", "soft_punish_cache": 0}
    off["fit_micro_batches"] = False
    theirs = trls(case, saved, tmp_path / "theirs", **said_to_trl)
    ours = train(trainer_class, trainer_class.config_class, case, saved, tmp_path / "ours", **off)
    assert_same(ours, theirs)


@pytest.mark.train
def test_the_comparison_sees_a_feature_that_is_on(saved, tmp_path):
    """Leave-one-out advantages are the group's times G/(G−1), unscaled: Adam alone would hardly show it."""
    case = Case({"optim": "adamw_torch", "scale_rewards": "none"})
    theirs = trls(case, saved, tmp_path / "theirs")
    ours = train(
        trl_ext.GRPOTrainer,
        trl_ext.GRPOConfig,
        case,
        saved,
        tmp_path / "ours",
        advantage_estimator="leave_one_out",
        fit_micro_batches=False,
    )
    found = differences(ours, theirs)
    assert "gradients" in found and "table" in found and any(f.startswith("keys logged") for f in found)
