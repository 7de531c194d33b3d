"""
TRL's metrics where its rows are not ours: when a generation batch took several rounds, every completion counts once;
when an optimizer step was dealt to other micro-batches, a mean over tokens stays one.
"""

import torch
from trl.trainer.utils import nanstd

from .exactness import ExactSavings
from .micro_batches import Fit
from .rollout import ScoredRound


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


def restate_rounds(
    metrics: dict[str, list[float]],
    rounds: list[ScoredRound],
    weights: torch.Tensor,
    names: list[str],
    num_generations: int,
    zero_std: bool,
) -> None:
    """
    State TRL's last metrics over everything that was generated, not over its last round or what was selected.

    Args:
        metrics (`dict[str, list[float]]`):
            Metric lists; changed in place.
        rounds (`list[ScoredRound]`):
            Rounds of generation.
        weights, names, num_generations:
            As in [`reward_statistics`].
        zero_std (`bool`):
            Whether `frac_reward_zero_std` is restated, too.
    """
    pool_rounds(metrics, [len(scored.rewards) for scored in rounds])
    rewards = torch.cat([scored.rewards for scored in rounds])
    for key, value in reward_statistics(rewards, weights, names, num_generations).items():
        if key != "frac_reward_zero_std" or zero_std:
            metrics[key][-1] = value


# What TRL appends once for every micro-batch: means over tokens (over rows where a ratio is the sequence's) ...
LOSS_MEANS = (
    "kl",
    "entropy",
    *(f"clip_ratio/{which}_mean" for which in ("low", "high", "region")),
    "cispo_clip_ratio",
    "vespo/phi_seq_mean",
)
# ... of which these are zero for a row without advantage ...
ZERO_WITHOUT_ADVANTAGE = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio"}
# ... and extremes over rows; without advantage, a row's clip ratio is zero, which only moves the smallest
LOSS_EXTREMES = ("clip_ratio/low_min", "clip_ratio/high_max")
# Metrics that are a row's even at token level, and what TRL's phi is where no token is in the loss
ROW_MEANS = {"vespo/phi_seq_mean": 1.0}
COMPUTED = "computed/"


def restate_loss_metrics(metrics: dict[str, list[float]], fit: Fit, by_row: bool, savings: ExactSavings) -> None:
    """
    Weigh the last entries of TRL's metrics of the loss, so that their mean over the micro-batches of a step, which TRL
    logs, is the mean over the tokens (or rows) of the step however they were dealt.

    Where rows were left out or copies computed once, a metric that can't be stated over all rows is renamed: with
    `computed/` before its name it is taken over the rows that were computed.

    Args:
        metrics (`dict[str, list[float]]`):
            Metric lists; changed in place.
        fit ([`Fit`]):
            What the micro-batch stands for.
        by_row (`bool`):
            Whether ratios are the sequence's, so that clip ratios count rows instead of tokens.
        savings ([`ExactSavings`]):
            Which rows may be left out.
    """
    for key in LOSS_MEANS:
        if not metrics.get(key):
            continue
        value = metrics[key].pop()
        rows = key in ROW_MEANS or (by_row and key in ZERO_WITHOUT_ADVANTAGE)
        over_all = not savings.weigh_copies and (not savings.skip_dead or key in ZERO_WITHOUT_ADVANTAGE)
        if rows:
            empty = ROW_MEANS.get(key, 0.0)
            total = value * (fit.rows + fit.fillers) - fit.fillers * empty
            count = fit.computed_rows
            if over_all:
                total += empty * (fit.all_rows - fit.computed_rows) / fit.micro_batches
                count = fit.all_rows
        else:
            total, count = value * fit.tokens, fit.all_tokens if over_all else fit.computed_tokens
        metrics.setdefault(key if over_all else COMPUTED + key, []).append(total * fit.micro_batches / max(count, 1))
        if not metrics[key]:
            del metrics[key]
    for key in LOSS_EXTREMES:
        if by_row and fit.fillers and metrics.get(key) and key.endswith("min"):
            metrics[key].pop()  # that of a row without weight
        if metrics.get(key) and (savings.weigh_copies or (savings.skip_dead and key.endswith("min"))):
            metrics.setdefault(COMPUTED + key, []).append(metrics[key].pop())
        if key in metrics and not metrics[key]:
            del metrics[key]
