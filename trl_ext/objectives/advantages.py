"""
Advantages from one reward for each completion. `ESTIMATORS` is the table of advantage estimators.

The group-relative advantage of GRPO is computed by TRL itself. All functions here expect the `num_generations`
completions of a group next to each other. They treat NaN as TRL does: a reward of NaN means "not applicable". Its
advantage is NaN too, so that it counts in no mean and no deviation; the trainer makes it 0 in the end.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from trl.trainer.utils import nanstd

from ..errors import require, require_one_of
from .papers import MAXRL


# What TRL adds to a standard deviation before it divides by it. Equal here, so that scaled advantages are comparable.
STD_EPSILON = 1e-4


def aggregate_rewards(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, aggregation: str, num_generations: int
) -> torch.Tensor:
    """
    One reward for each completion from the rewards of several functions.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, F)`):
            Rewards of N completions by F functions, NaN = not applicable.
        weights (`torch.Tensor` of shape `(F,)`):
            Weights of the functions.
        aggregation (`str`):
            `"sum_then_normalize"`: the weighted sum. `"normalize_then_sum"`: the weighted sum of rewards that are
            first normalised within each group, function by function (GDPO, https://huggingface.co/papers/2601.05242).
        num_generations (`int`):
            Size of a group.

    Returns:
        `torch.Tensor` of shape `(N,)`: NaN for completions to which no function applies.
    """
    scored = rewards_per_func
    if aggregation == "normalize_then_sum":
        grouped = scored.view(-1, num_generations, scored.size(1))  # (P, G, F)
        mean = torch.nanmean(grouped, dim=1, keepdim=True)
        scored = ((grouped - mean) / (nanstd(grouped, dim=1, keepdim=True) + STD_EPSILON)).view_as(rewards_per_func)
    total = (scored * weights.to(scored)).nansum(dim=1)
    return total.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)


def group_relative(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    A_i = R_i − the mean reward of the group (GRPO, https://huggingface.co/papers/2402.03300), as TRL computes it.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            One reward for each completion. NaN is left out of the means.
        num_generations (`int`):
            Size of a group.

    Returns:
        `torch.Tensor` of shape `(N,)`: NaN if the reward is NaN.
    """
    grouped = rewards.view(-1, num_generations)  # (P, G)
    return (grouped - grouped.nanmean(dim=1, keepdim=True)).view(-1)


def leave_one_out(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    A_i = R_i − the mean reward of the group's other completions (RLOO, https://huggingface.co/papers/2402.14740).

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            One reward for each completion. NaN is left out of the means.
        num_generations (`int`):
            Size of a group.

    Returns:
        `torch.Tensor` of shape `(N,)`: NaN if the reward is NaN, and if no other completion of the group has a
        reward.
    """
    grouped = rewards.view(-1, num_generations)  # (P, G)
    others = (~grouped.isnan()).sum(dim=1, keepdim=True) - 1
    baseline = (grouped.nansum(dim=1, keepdim=True) - grouped) / others.clamp(min=1)
    return (grouped - baseline).masked_fill(others < 1, torch.nan).view(-1)


def maxrl(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    A_i = (R_i − R̄)/R̄ with the group's mean reward R̄, and 0 if that is 0 (MaxRL, algorithm 1,
    https://huggingface.co/papers/2602.02710).

    With rewards of 0 and 1, R̄ estimates the probability p that the prompt is solved, and the policy gradient with
    these advantages is in expectation that of log p, cut off after G − 1 terms of −Σ_k (1 − p)^k/k, where G is the
    size of a group. The first term alone is the usual objective, p.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            One reward for each completion, not negative. NaN is left out of the means.
        num_generations (`int`):
            Size of a group.

    Returns:
        `torch.Tensor` of shape `(N,)`: NaN if the reward is NaN.
    """
    grouped = rewards.view(-1, num_generations)  # (P, G)
    mean = torch.nanmean(grouped, dim=1, keepdim=True)
    return torch.where(mean > 0, (grouped - mean) / mean, grouped * 0).view(-1)


def reinforce(rewards: torch.Tensor, baseline: float | None = None) -> torch.Tensor:
    """
    A_i = R_i − b, with a baseline that does not depend on the completions (Williams, 1992).

    With one reward at the end and no discount, the reward-to-go of every token is R_i.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            One reward for each completion, NaN = not applicable.
        baseline (`float`, *optional*):
            b, the running mean of the rewards of earlier batches. `None`: nothing is subtracted.

    Returns:
        `torch.Tensor` of shape `(N,)`: NaN if the reward is NaN.
    """
    return rewards - (baseline or 0.0)


def updated_baseline(baseline: float | None, rewards: torch.Tensor, momentum: float) -> float | None:
    """
    Exponential moving average of the mean reward, for [`reinforce`].

    Args:
        baseline (`float`, *optional*):
            The average before this batch; `None` before the first batch.
        rewards (`torch.Tensor` of shape `(N,)`):
            Rewards of this batch. NaN is ignored.
        momentum (`float`):
            Weight of the average before this batch, in [0, 1).

    Returns:
        `float` or `None`: the average after this batch; `None` as long as there was no reward.
    """
    mean = torch.nanmean(rewards).item()
    if mean != mean:
        return baseline
    return mean if baseline is None else momentum * baseline + (1 - momentum) * mean


def scale_advantages(
    advantages: torch.Tensor, rewards: torch.Tensor, scale_rewards: str, num_generations: int
) -> torch.Tensor:
    """
    Divide advantages by a standard deviation of the rewards, according to TRL's `scale_rewards`.

    Args:
        advantages (`torch.Tensor` of shape `(N,)`):
            Advantages before scaling.
        rewards (`torch.Tensor` of shape `(N,)`):
            The rewards from which the advantages were computed.
        scale_rewards (`str`):
            `"group"`: the standard deviation within each group. `"batch"`: the one of all rewards. `"none"`:
            advantages are not divided.
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
    # If all rewards are equal there is nothing to divide by
    return torch.where(std > 0, advantages / (std + STD_EPSILON), advantages)


def normalize_advantages(advantages: torch.Tensor) -> torch.Tensor:
    """
    Advantages with mean 0 and standard deviation 1 over a generation batch, as TRL's RLOO has them.

    Args:
        advantages (`torch.Tensor` of shape `(N,)`):
            Those of all processes. NaN is left out of the mean and the deviation.

    Returns:
        `torch.Tensor` of shape `(N,)`: NaN where `advantages` is.
    """
    return (advantages - torch.nanmean(advantages)) / (nanstd(advantages) + STD_EPSILON)


# Arguments that a trainer can pass to an estimator's function besides the rewards
ARGUMENTS = ("num_generations", "baseline")
COMPUTED_BY = ("function", "trl", "critic")


@dataclass(frozen=True)
class AdvantageEstimator:
    """
    An entry of `ESTIMATORS`: the function and what it needs.

    Args:
        function (`Callable`, *optional*):
            From rewards `(N,)` and the arguments named in `needs` to advantages `(N,)`, before they are scaled.
        needs (`tuple[str, ...]`):
            Names of the function's keyword arguments: `"num_generations"` (size of a group), `"baseline"` (running
            mean of earlier rewards, `None` before the first batch).
        computed_by (`str`):
            `"function"`: by `function`. `"trl"`: TRL's own advantages are used. `"critic"`: the trainer has a critic,
            from which it computes one advantage for each token.
        scale_rewards (`str`):
            Value of TRL's `scale_rewards` if the user doesn't set it.
        refused_scales (`dict[str, str]`):
            Values of `scale_rewards` that make no sense with this estimator, and why.
        takes_negative (`bool`):
            Whether rewards may be negative.
        paper (`Mapping[str, str]`, *optional*):
            Where it comes from, if a model card has to say that beside the trainer's own paper.

    Raises:
        ValueError: if the arguments contradict each other or the signature of `function`.
    """

    function: Callable[..., torch.Tensor] | None = None
    needs: tuple[str, ...] = ()
    computed_by: str = "function"
    scale_rewards: str = "none"
    refused_scales: dict[str, str] = field(default_factory=dict)
    takes_negative: bool = True
    paper: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        require_one_of("computed_by", self.computed_by, COMPUTED_BY)
        require(
            (self.function is not None) == (self.computed_by == "function"),
            f"An estimator with computed_by={self.computed_by!r} and function={self.function!r} is half written: "
            "give it a function if and only if computed_by='function'.",
        )
        for name in self.needs:
            require_one_of("needs", name, ARGUMENTS)
        if self.function is not None:
            wanted = list(inspect.signature(self.function).parameters)[1:]
            require(
                set(wanted) == set(self.needs),
                f"{self.function.__name__} takes {wanted} besides the rewards, but its entry has needs={self.needs}. "
                "Make them equal.",
            )


# What stands for the estimator "group" where groups differ in size, for which TRL can't compute it
RAGGED_GROUP = AdvantageEstimator(group_relative, needs=("num_generations",))

# A new estimator is a function above and an entry here.
ESTIMATORS = {
    "group": AdvantageEstimator(computed_by="trl", scale_rewards="group"),
    "leave_one_out": AdvantageEstimator(leave_one_out, needs=("num_generations",)),
    "maxrl": AdvantageEstimator(
        maxrl,
        needs=("num_generations",),
        refused_scales=dict.fromkeys(("group", "batch"), "it divides by the mean reward of a group already"),
        takes_negative=False,
        paper=MAXRL,
    ),
    "reinforce": AdvantageEstimator(
        reinforce,
        needs=("baseline",),
        refused_scales={
            "group": "it divides by the standard deviation within a group, which is 0 if all of its rewards are equal"
        },
    ),
    "gae": AdvantageEstimator(computed_by="critic"),
}
