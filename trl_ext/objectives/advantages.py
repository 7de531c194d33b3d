"""
Advantages from one reward per completion, and the table of estimators: `ESTIMATORS`.

The group-relative advantage of GRPO stays TRL's own. Everything here takes groups of `num_generations` completions
standing side by side, and treats NaN as TRL does: "not applicable", advantage 0.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from trl.trainer.utils import nanstd

from ..errors import require, require_one_of


# TRL's guard against a zero standard deviation; the same here, so that scaled advantages compare.
STD_EPSILON = 1e-4


def aggregate_rewards(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, aggregation: str, num_generations: int
) -> torch.Tensor:
    """
    One reward per completion from several reward functions.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, F)`):
            Rewards of `N` completions by `F` functions, NaN where a function does not apply.
        weights (`torch.Tensor` of shape `(F,)`):
            Weight of each function.
        aggregation (`str`):
            `"sum_then_normalize"`: the weighted sum. `"normalize_then_sum"`: each function is first normalised within
            its group (GDPO, https://huggingface.co/papers/2601.05242), then summed.
        num_generations (`int`):
            Size of a group.

    Returns:
        `torch.Tensor` of shape `(N,)`: NaN where no function applies.
    """
    scored = rewards_per_func
    if aggregation == "normalize_then_sum":
        grouped = scored.view(-1, num_generations, scored.size(1))  # (P, G, F)
        mean = torch.nanmean(grouped, dim=1, keepdim=True)
        scored = ((grouped - mean) / (nanstd(grouped, dim=1, keepdim=True) + STD_EPSILON)).view_as(rewards_per_func)
    total = (scored * weights.to(scored)).nansum(dim=1)
    return total.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)


def leave_one_out(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    A_i = R_i − mean of the other completions of the group (RLOO, https://huggingface.co/papers/2402.14740).

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            One reward per completion; NaN is left out of the baseline of the others.
        num_generations (`int`):
            Size of a group.

    Returns:
        `torch.Tensor` of shape `(N,)`: 0 where the reward is NaN, and where no other completion has one.
    """
    grouped = rewards.view(-1, num_generations)  # (P, G)
    others = (~grouped.isnan()).sum(dim=1, keepdim=True) - 1
    baseline = (grouped.nansum(dim=1, keepdim=True) - grouped) / others.clamp(min=1)
    return (grouped - baseline).masked_fill(others < 1, 0.0).nan_to_num(nan=0.0).view(-1)


def reinforce(rewards: torch.Tensor, baseline: float | None = None) -> torch.Tensor:
    """
    A_i = R_i − b, with a baseline that does not depend on the completions (Williams, 1992).

    With one reward at the end and no discount, the reward-to-go of every token is R_i.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            One reward per completion, NaN where none applies.
        baseline (`float`, *optional*):
            Running mean of earlier batches. `None`: nothing is subtracted.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    return (rewards - (baseline or 0.0)).nan_to_num(nan=0.0)


def updated_baseline(baseline: float | None, rewards: torch.Tensor, momentum: float) -> float | None:
    """
    Exponential moving average of the mean reward, for [`reinforce`].

    Args:
        baseline (`float`, *optional*):
            Value before this batch; `None` before the first.
        rewards (`torch.Tensor` of shape `(N,)`):
            Rewards of this batch; NaN is ignored.
        momentum (`float`):
            Weight of the past, in [0, 1).

    Returns:
        `float` or `None`: `None` as long as no reward was seen.
    """
    mean = torch.nanmean(rewards).item()
    if mean != mean:
        return baseline
    return mean if baseline is None else momentum * baseline + (1 - momentum) * mean


def scale_advantages(
    advantages: torch.Tensor, rewards: torch.Tensor, scale_rewards: str, num_generations: int
) -> torch.Tensor:
    """
    Divide advantages by a standard deviation of the rewards, with the meaning TRL gives to `scale_rewards`.

    Args:
        advantages (`torch.Tensor` of shape `(N,)`):
            Advantages before scaling.
        rewards (`torch.Tensor` of shape `(N,)`):
            The rewards they came from.
        scale_rewards (`str`):
            `"group"`, `"batch"` or `"none"`.
        num_generations (`int`):
            Size of a group.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    if scale_rewards == "none":
        return advantages
    if scale_rewards == "batch":
        std = nanstd(rewards).nan_to_num(nan=0.0).expand_as(rewards)
    else:
        std = nanstd(rewards.view(-1, num_generations), dim=1).nan_to_num(nan=0.0).repeat_interleave(num_generations)
    # Rewards that are all equal have no scale to divide by
    return torch.where(std > 0, advantages / (std + STD_EPSILON), advantages)


# What a trainer can give to an estimator beside the rewards
GIVEN = ("num_generations", "baseline")
COMPUTED_BY = ("function", "trl", "critic")


@dataclass(frozen=True)
class AdvantageEstimator:
    """
    An entry of `ESTIMATORS`: the function, and what it needs.

    Args:
        function (`Callable`, *optional*):
            From rewards `(N,)`, and what `needs` names, to advantages `(N,)` before they are scaled.
        needs (`tuple[str, ...]`):
            Of `"num_generations"` (size of a group) and `"baseline"` (running mean of earlier rewards, `None` before
            the first): keyword arguments of `function`.
        computed_by (`str`):
            `"function"`; `"trl"`: TRL's own advantages are left as they are; `"critic"`: the trainer has a critic,
            which gives one advantage per token.
        scale_rewards (`str`):
            TRL's `scale_rewards` where the user leaves it open.
        refused_scales (`dict[str, str]`):
            Values of `scale_rewards` that make no sense with it, and why.

    Raises:
        ValueError: for an entry that is only half written.
    """

    function: Callable[..., torch.Tensor] | None = None
    needs: tuple[str, ...] = ()
    computed_by: str = "function"
    scale_rewards: str = "none"
    refused_scales: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_one_of("computed_by", self.computed_by, COMPUTED_BY)
        require(
            (self.function is not None) == (self.computed_by == "function"),
            f"An estimator with computed_by={self.computed_by!r} and function={self.function!r} is half written: one "
            "that is computed by a function has one, the others have none.",
        )
        for name in self.needs:
            require_one_of("needs", name, GIVEN)
        if self.function is not None:
            wanted = list(inspect.signature(self.function).parameters)[1:]
            require(
                set(wanted) == set(self.needs),
                f"{self.function.__name__} takes {wanted} beside the rewards, but its entry needs {self.needs}.",
            )


# A new estimator is a function above and an entry here.
ESTIMATORS = {
    "group": AdvantageEstimator(computed_by="trl", scale_rewards="group"),
    "leave_one_out": AdvantageEstimator(leave_one_out, needs=("num_generations",)),
    "reinforce": AdvantageEstimator(
        reinforce,
        needs=("baseline",),
        refused_scales={
            "group": "it divides by the deviation within a group, which is zero where all of its rewards are equal"
        },
    ),
    "gae": AdvantageEstimator(computed_by="critic"),
}
