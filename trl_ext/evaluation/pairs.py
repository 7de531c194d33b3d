"""
How good is a reward model, or DPO's implicit one: on which share of held-out pairs does it score the better completion
higher?
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .held_out import Estimate


PAIR_ACCURACY = "pair_accuracy"
LOGGED = ("eval_accuracy", "eval_rewards/accuracies")


def read_pair_accuracy(log_history: Sequence[dict[str, Any]], pairs: int) -> dict[int, dict[str, Estimate]]:
    """
    Reads what TRL's `RewardTrainer` or `DPOTrainer` logged when it evaluated, and adds 95 % intervals, with the pair
    as the unit. TRL averages over batches, so that this is exact where all are equally large.

    Args:
        log_history (`Sequence[dict[str, Any]]`):
            `trainer.state.log_history`.
        pairs (`int`):
            Number of held-out pairs, at least 2.

    Returns:
        `dict[int, dict[str, Estimate]]`: `pair_accuracy` by optimizer step, as [`HeldOut`] has its metrics; empty if
        nothing was evaluated.

    Raises:
        `ValueError`: with fewer than 2 pairs, which give no interval.
    """
    measured = {}
    for entry in log_history:
        accuracy = next((entry[key] for key in LOGGED if key in entry), None)
        if accuracy is not None:
            right = round(accuracy * pairs)
            outcomes = (torch.arange(pairs) < right).double().unsqueeze(1)  # (P, 1)
            # How many were right is known, not which: two measurements can't be compared pair by pair
            measured[entry["step"]] = {PAIR_ACCURACY: replace(Estimate.of(outcomes), per_prompt=())}
    return measured
