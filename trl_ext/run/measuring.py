"""How a run is measured: on held-out prompts, on held-out pairs, and by the credit of single tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers.trainer_utils import has_length

from ..evaluation.credit import TokenCredit, credit_by_token
from ..evaluation.held_out import Estimate, HeldOut, evaluate_policy
from ..evaluation.held_out_texts import HELD_OUT_TEXTS, PromptTexts
from ..evaluation.pairs import read_pair_accuracy
from ..roles.trunk import sharing_weights
from ..trainers.grpo import GRPOTrainer
from ..trainers.grpo_config import GRPOConfig
from .arguments import DPOArguments, PolicyArguments
from .loading import get_split, load_reward_funcs


# Of which two are drawn, token by token
COMPLETIONS_TO_CHOOSE_FROM = 32


def prompts_at_once(training_args: Any, samples: int) -> int:
    """Number of prompts that fill a generation batch of training with `samples` completions each; at least 1."""
    return max(1, training_args.generation_batch_size // samples)


def held_out_rows(data: Mapping[str, Any], script_args: PolicyArguments) -> Any:
    """A seeded choice of test prompts; `None` if none are asked for, or there is no test split."""
    if script_args.held_out_prompts == 0:
        return None
    if script_args.dataset_test_split not in data:
        PartialState().print(
            f"No held-out evaluation: the data set has no split '{script_args.dataset_test_split}' "
            f"(--dataset_test_split), only {', '.join(data)}."
        )
        return None
    return _choose(data[script_args.dataset_test_split], script_args)


def _choose(rows: Any, script_args: PolicyArguments) -> Any:
    return rows.shuffle(seed=script_args.held_out_seed).take(script_args.held_out_prompts)


def add_held_out(trainer: Any, data: Mapping[str, Any], script_args: PolicyArguments) -> HeldOut | None:
    """Adds a callback that measures the policy on held-out prompts, in batches as large as those of training."""
    chosen = held_out_rows(data, script_args)
    if chosen is None:
        return None
    prompts = list(chosen)
    held_out = HeldOut(
        trainer,
        prompts,
        num_samples=script_args.held_out_samples,
        batch_size=prompts_at_once(trainer.args, script_args.held_out_samples),
        seed=script_args.held_out_seed,
        every=script_args.held_out_every,
        texts=Path(trainer.args.output_dir) / HELD_OUT_TEXTS,
    )
    trainer.add_callback(held_out)
    trainer.accelerator.print(
        f"Measures {len(prompts)} held-out prompts of '{script_args.dataset_test_split}' before and after "
        f"training, {script_args.held_out_samples} completions each.",
        flush=True,
    )
    return held_out


def pair_accuracy(trainer: Any) -> dict[int, dict[str, Estimate]]:
    """
    The share of held-out pairs that a trainer of pairs ranked right, by optimizer step. Empty if there are none, or if
    their number is not known, as in a stream.
    """
    pairs = trainer.eval_dataset
    return read_pair_accuracy(trainer.state.log_history, len(pairs)) if has_length(pairs) else {}


def score_completions(
    trainer: Any, script_args: DPOArguments, data: Mapping[str, Any], texts: list[PromptTexts] | None = None
) -> dict[str, Estimate]:
    """
    Samples completions from the policy of a trainer that has no rollouts of its own, and scores them.

    Args:
        trainer ([`~trl_ext.DPOTrainer`]):
            The trainer that has the policy. Every process must make the call.
        script_args ([`DPOArguments`]):
            Their `held_out_*` choose prompts, number and length of the completions.
        data (`Mapping[str, Any]`):
            Data sets by split.
        texts (`list[PromptTexts]`, *optional*):
            A list to which completions of the first prompts are appended.

    Returns:
        `dict[str, Estimate]`: by reward function; empty without `held_out_split`.
    """
    if script_args.held_out_split is None:
        return {}
    samples = script_args.held_out_samples
    shared = {name: getattr(trainer.args, name) for name in ("output_dir", "use_cpu", "bf16")}
    at_once = max(samples, 2)  # the fewest that TRL takes
    config = GRPOConfig(
        **shared,
        num_generations=at_once,
        per_device_train_batch_size=at_once,
        max_completion_length=script_args.held_out_length,
        report_to="none",
    )
    chosen = _choose(get_split(data, script_args.held_out_split, "held_out_split"), script_args)
    rows = Dataset.from_list(list(chosen))  # also of a stream
    sampler = GRPOTrainer(
        sharing_weights(trainer.accelerator.unwrap_model(trainer.model)),
        load_reward_funcs(script_args, config),
        args=config,
        train_dataset=rows,
        processing_class=trainer.processing_class,
    )
    return evaluate_policy(sampler, rows, samples, seed=script_args.held_out_seed, texts=texts)


def token_credits(trainer: Any, data: Mapping[str, Any], script_args: PolicyArguments) -> list[TokenCredit]:
    """
    The credit of each token in two sampled completions: the best and the worst scored of the longer half. Empty where
    there is no critic.
    """
    if getattr(trainer, "critic", None) is None:
        return []
    rows = data.get(script_args.dataset_test_split, data[script_args.dataset_train_split])
    rows = list(rows.shuffle(seed=script_args.held_out_seed).take(COMPLETIONS_TO_CHOOSE_FROM))
    credits = sorted(credit_by_token(trainer, rows, script_args.held_out_seed), key=lambda credit: len(credit.tokens))
    by_score = sorted(credits[len(credits) // 2 :], key=lambda credit: credit.score)
    return [by_score[-1], by_score[0]]
