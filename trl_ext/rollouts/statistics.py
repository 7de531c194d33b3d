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

    def last(key: str) -> list[float]:
        return metrics[key][-rounds:]

    terminated = [n * (1 - clipped) for n, clipped in zip(completions, last("completions/clipped_ratio"), strict=True)]
    weights: dict[str, list[float]] = {"completions/mean_terminated_length": terminated}
    if "tools/call_frequency" in metrics:
        calls = [n * frequency for n, frequency in zip(completions, last("tools/call_frequency"), strict=True)]
        weights["tools/failure_frequency"] = calls

    pooled = {}
    for key in [key for key in ROUND_METRICS if key in metrics]:
        values = last(key)
        if "terminated" in key:  # TRL writes 0 for a round in which nothing terminated
            values = [value for value, n in zip(values, terminated, strict=True) if n > 0] or [0.0]
        if "/min_" in key or "/max_" in key:
            pooled[key] = min(values) if "/min_" in key else max(values)
        else:
            weight = weights.get(key, [float(n) for n in completions])
            weight = [w for w, n in zip(weight, terminated, strict=True) if n > 0] if "terminated" in key else weight
            total = sum(weight)
            pooled[key] = sum(v * w for v, w in zip(values, weight, strict=False)) / total if total else 0.0
    for key, value in pooled.items():
        metrics[key][-rounds:] = [value]


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
