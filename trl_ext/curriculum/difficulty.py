"""
Measures how hard each prompt is for a policy, and drops prompts that are too easy. The second is the offline half of
DUPO (https://huggingface.co/papers/2507.02592, section 4.2): before training, prompts that all of a model's G samples
solve are dropped, because a group without variance has no gradient.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset

from ..errors import require, require_count, require_type
from ..trainers.grpo import GRPOTrainer
from .partial import roll_out_all


PASS_RATE = "pass_rate"


def pass_rates(
    trainer: GRPOTrainer,
    dataset: Dataset,
    num_generations: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    partial_results: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """
    Samples completions for every row and adds the column `pass_rate`: the share of the samples whose weighted outcome
    reward reaches `args.success_threshold`, or `None` if no outcome reward applied to any sample.

    Args:
        trainer ([`GRPOTrainer`]):
            A trainer of `trl_ext` with the policy and the reward functions. Every process must make the call.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and the columns that the reward functions need.
        num_generations (`int`, *optional*):
            Samples per prompt (G), by default the trainer's.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per generation batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The batch that starts at row i has the seed `seed + i`, so that an interrupted call
            and its continuation draw what an uninterrupted call would have drawn.
        partial_results (`str` or `Path`, *optional*):
            A file to which the results of each finished batch are written. If the file exists and belongs to the same
            policy, data set and settings, only missing batches are generated.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called after each batch with the number of finished rows and the number of all rows.

    Returns:
        [`~datasets.Dataset`]: a copy with the same rows in the same order, and the new column.

    Raises:
        TypeError: for a trainer that isn't one of `trl_ext`, or a data set that is streamed.
        ValueError: if the data set already has the column, or if `partial_results` belongs to a
            different call.
    """
    require_type("trainer", trainer, GRPOTrainer, "Pass one of trl_ext's, such as trl_ext.GRPOTrainer.")
    require_type("dataset", dataset, Dataset, "Pass a datasets.Dataset, loaded without streaming.")
    require_count("batch_size", batch_size)
    require(
        PASS_RATE not in dataset.column_names,
        f"The data set already has a column `{PASS_RATE}`. Remove it before measuring pass rates again.",
    )
    rates = roll_out_all(
        trainer,
        dataset,
        num_generations or trainer.num_generations,
        batch_size,
        seed,
        read=lambda scored: _solved_fraction(trainer, scored.rewards),
        depends_on={
            "success_threshold": trainer.args.success_threshold,
            "reward_weights": trainer.reward_weights.tolist(),
            "outcome_reward_funcs": trainer.is_outcome.tolist(),
        },
        partial_results=partial_results,
        on_progress=on_progress,
    )
    return dataset.add_column(PASS_RATE, rates)


def drop_solved(dataset: Dataset, drop_unsolved: bool = False) -> Dataset:
    """
    Drops the prompts that every sample solved. Rows whose `pass_rate` is `None` are kept.

    Args:
        dataset ([`~datasets.Dataset`]):
            The result of [`pass_rates`].
        drop_unsolved (`bool`, *optional*, defaults to `False`):
            Also drop the prompts that no sample solved. During training the policy may learn to solve them.

    Returns:
        [`~datasets.Dataset`]: the remaining rows, in order.

    Raises:
        ValueError: if there is no column `pass_rate`.
    """
    require_type("dataset", dataset, Dataset, "Pass what `pass_rates` returns.")
    require(
        PASS_RATE in dataset.column_names,
        f"The data set has no column `{PASS_RATE}` (it has {dataset.column_names}). Add it with `pass_rates`.",
    )
    dropped = {1.0, 0.0} if drop_unsolved else {1.0}
    return dataset.filter(lambda rate: rate not in dropped, input_columns=PASS_RATE)


def _solved_fraction(trainer: GRPOTrainer, rewards: torch.Tensor) -> list[float | None]:
    """Share of solved samples of each prompt, from rewards of shape `(P, G, F)`."""
    outcome = trainer.group_outcomes(rewards.flatten(0, 1), rewards.shape[1])  # (P, G), NaN where not applicable
    solved = (outcome >= trainer.args.success_threshold).to(torch.float64)
    rates = solved.masked_fill(outcome.isnan(), torch.nan).nanmean(dim=1).tolist()
    return [None if math.isnan(rate) else rate for rate in rates]
