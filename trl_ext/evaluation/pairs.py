"""
How good a reward model is, or the implicit reward of DPO: the share of held-out pairs whose better completion it
scores higher.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..metric_keys import EVALUATION, PREFERENCE_ACCURACY, REWARD_MODEL_ACCURACY
from .held_out import Estimate


PAIR_ACCURACY = "pair_accuracy"
LOGGED = tuple(f"{EVALUATION}{key}" for key in (REWARD_MODEL_ACCURACY, PREFERENCE_ACCURACY))


def read_pair_accuracy(log_history: Sequence[dict[str, Any]], pairs: int) -> dict[int, dict[str, Estimate]]:
    """
    Reads what TRL's `RewardTrainer` or `DPOTrainer` logged in evaluation, and adds 95 % intervals with the pair as the
    unit. TRL averages over batches, so that the accuracy is exact if all batches are equally large.

    Args:
        log_history (`Sequence[dict[str, Any]]`):
            `trainer.state.log_history`.
        pairs (`int`):
            Number of held-out pairs, at least 2.

    Returns:
        `dict[int, dict[str, Estimate]]`: `pair_accuracy` by optimizer step, in the form of
        [`~trl_ext.evaluation.held_out.HeldOut`]'s `measured`; empty if nothing was evaluated.

    Raises:
        ValueError: with fewer than 2 pairs, for which there is no interval.
    """
    measured = {}
    for entry in log_history:
        accuracy = next((entry[key] for key in LOGGED if key in entry), None)
        if accuracy is not None:
            right = round(accuracy * pairs)
            outcomes = (torch.arange(pairs) < right).double().unsqueeze(1)  # (P, 1)
            # It is unknown which pairs were right, so that two measurements can't be compared pair by pair
            measured[entry["step"]] = {PAIR_ACCURACY: replace(Estimate.of(outcomes), per_prompt=())}
    return measured
