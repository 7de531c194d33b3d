"""
TRL's metrics when a generation batch took several rounds: every completion counts once.
"""

import torch
from trl.trainer.utils import nanstd


# What TRL appends once for every call of `_generate`
ROUND_METRICS = (
    *(f"completions/{which}_{kind}" for which in ("mean", "min", "max") for kind in ("length", "terminated_length")),
    "completions/clipped_ratio",
    "tools/call_frequency",
    "tools/failure_frequency",
)


def pool_rounds(metrics: dict[str, list[float]], completions: list[int]) -> None:
    """
    Replace the last entries of TRL's `completions/…` and `tools/…` metrics, one a round, by one over all rounds.

    Means are weighted by what they were taken over (completions, terminated completions, tool calls); `min` and `max`
    stay a minimum and a maximum.

    Args:
        metrics (`dict[str, list[float]]`):
            Metric lists; changed in place.
        completions (`list[int]`):
            Completions generated in each round.
    """
    rounds = len(completions)
    clipped = metrics["completions/clipped_ratio"][-rounds:]
    terminated = [n * (1 - ratio) for n, ratio in zip(completions, clipped, strict=True)]
    frequencies = metrics.get("tools/call_frequency", [])[-rounds:] or [0.0] * rounds
    calls = [n * frequency for n, frequency in zip(completions, frequencies, strict=True)]
    for key in [key for key in ROUND_METRICS if key in metrics]:
        over = terminated if "terminated" in key else calls if "failure" in key else completions
        # TRL writes 0 for a round that had none of what the metric is taken over
        seen = [(value, n) for value, n in zip(metrics[key][-rounds:], over, strict=True) if n > 0]
        if not seen:
            pooled = 0.0
        elif "/min_" in key or "/max_" in key:
            pooled = (min if "/min_" in key else max)(value for value, _ in seen)
        else:
            pooled = sum(value * n for value, n in seen) / sum(n for _, n in seen)
        metrics[key][-rounds:] = [pooled]


def reward_statistics(
    rewards: torch.Tensor, weights: torch.Tensor, names: list[str], num_generations: int
) -> dict[str, float]:
    """
    TRL's reward metrics, under TRL's names, over all completions of all rounds.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`):
            Rewards of everything that was generated, NaN = not applicable.
        weights (`torch.Tensor` of shape `(F,)`):
            Weights of the functions.
        names (`list[str]`):
            Names of the functions.
        num_generations (`int`):
            Size of a group.

    Returns:
        `dict[str, float]`.
    """
    statistics = {}
    for i, name in enumerate(names):
        statistics[f"rewards/{name}/mean"] = torch.nanmean(rewards[:, i]).item()
        statistics[f"rewards/{name}/std"] = nanstd(rewards[:, i]).item()
    total = (rewards * weights.to(rewards)).nansum(dim=1)
    total[rewards.isnan().all(dim=1)] = torch.nan
    std = nanstd(total.view(-1, num_generations), dim=1)
    return statistics | {
        "reward": torch.nanmean(total).item(),
        "reward_std": nanstd(total).item(),
        "frac_reward_zero_std": torch.isclose(std, torch.zeros_like(std)).float().mean().item(),
    }
