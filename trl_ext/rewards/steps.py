"""
Step rewards. Instead of a number, a reward function may return a list for a completion: one reward for each of its
tokens, or pairs `(position, reward)`, each for a step that ends at that token. Trainers without a critic use the sum.
"""

from collections.abc import Iterable
from typing import Any, Self


class StepRewards(float):
    """
    The sum of a completion's step rewards, as a number that also holds the steps.

    Attributes:
        steps (`list[tuple[int, float]]`):
            Position of a token in the completion, from 0, and the reward for it.
    """

    steps: list[tuple[int, float]]

    def __new__(cls, steps: Iterable[tuple[int, float]]) -> Self:
        steps = [(int(position), float(reward)) for position, reward in steps]
        total = super().__new__(cls, sum(reward for _, reward in steps))
        total.steps = steps
        return total

    def __reduce__(self) -> tuple[type[Self], tuple[list[tuple[int, float]]]]:
        return type(self), (self.steps,)


def is_by_step(reward: Any) -> bool:
    """Whether a checked reward holds step rewards."""
    return isinstance(reward, StepRewards)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"with {value!r} among them. Return numbers, and leave out steps without a reward") from None


def read_step_rewards(returned: Any, length: int) -> StepRewards:
    """
    Check what a reward function returned for one completion.

    Args:
        returned (iterable):
            A reward for each token, or pairs of position and reward. If it is empty, no step has a reward.
        length (`int`):
            Number of tokens of the completion.

    Returns:
        [`StepRewards`]

    Raises:
        ValueError: with the second half of a sentence that says what is wrong, and what to return.
    """
    steps = [step.tolist() if hasattr(step, "tolist") else step for step in returned]
    if not steps:
        return StepRewards([])
    pairs = [isinstance(step, list | tuple) for step in steps]
    if any(pairs):
        if not all(pairs) or any(len(step) != 2 for step in steps):
            raise ValueError(
                "mixed. Return pairs (position, reward) for all steps of a completion, or a number for each token"
            )
        placed = [(_number(position), _number(reward)) for position, reward in steps]
        outside = [position for position, _ in placed if not 0 <= position < length or position != int(position)]
        if outside:
            raise ValueError(
                f"at position {outside[0]:g} of a completion of {length} tokens. Positions count tokens from 0"
            )
        return StepRewards((int(position), reward) for position, reward in placed)
    if len(steps) != length:
        raise ValueError(
            f"{len(steps)} for a completion of {length} tokens. Return one for each token, or pairs (position, reward)"
        )
    return StepRewards(enumerate(map(_number, steps)))
