"""
Counts what a run generates, and corrects TRL's metrics where TRL didn't see the rows that it reports on. If a
generation batch took several rounds, every completion counts once. If the rows of an optimizer step were dealt to
different micro-batches, a mean over tokens is still a mean over tokens. If a data set is evaluated in several batches,
its metrics are those of one.
"""

import math
from dataclasses import dataclass

import torch
from trl.trainer.utils import nanstd

from ..metric_keys import DIVERGENCE, DROPPED_TOKENS, KL_PER_TOKEN
from .exactness import ROW_MEAN_LOSSES, ExactSavings
from .groups import Groups
from .micro_batches import Fit
from .rollout import ScoredRound


@dataclass
class Counters:
    """
    Totals of a run over all processes.

    Args:
        generated_tokens (`int`):
            Completion tokens that the policy wrote for training, including those that were discarded.
        trained_tokens (`int`):
            Completion tokens that were in a loss, including copies, counted once for each generation batch.
        generation_rounds (`int`):
            Rounds of generation. (The number of optimizer steps is `trainer.state.global_step`.)
        batches_without_variance (`int`):
            Generation batches in which no group had reward variance.
    """

    generated_tokens: int = 0
    trained_tokens: int = 0
    generation_rounds: int = 0
    batches_without_variance: int = 0


# Metrics to which TRL appends a value in every call of `_generate`
ROUND_METRICS = (
    *(f"completions/{which}_{kind}" for which in ("mean", "min", "max") for kind in ("length", "terminated_length")),
    "completions/clipped_ratio",
    "tools/call_frequency",
    "tools/failure_frequency",
)


def pool_rounds(metrics: dict[str, list[float]], completions: list[int]) -> None:
    """
    Replace the last entries of TRL's `completions/…` and `tools/…` metrics, one for each round, by one for all rounds.

    Means are weighted by the number of things that they were taken over (completions, terminated completions, tool
    calls). Of minima the minimum is taken, and of maxima the maximum.

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
        counts = terminated if "terminated" in key else calls if "failure" in key else completions
        # Without rounds that had nothing to take the metric over, for which TRL writes 0
        counted = [(value, n) for value, n in zip(metrics[key][-rounds:], counts, strict=True) if n > 0]
        if not counted:
            pooled = 0.0
        elif "/min_" in key or "/max_" in key:
            pooled = (min if "/min_" in key else max)(value for value, _ in counted)
        else:
            pooled = sum(value * n for value, n in counted) / sum(n for _, n in counted)
        metrics[key][-rounds:] = [pooled]


def reward_statistics(
    rewards: torch.Tensor, weights: torch.Tensor, names: list[str], num_generations: int
) -> dict[str, float]:
    """
    TRL's reward metrics over all completions of all rounds.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`):
            Rewards of all completions that were generated, NaN = not applicable.
        weights (`torch.Tensor` of shape `(F,)`):
            Weights of the functions.
        names (`list[str]`):
            Names of the functions.
        num_generations (`int`):
            Size of a group.

    Returns:
        `dict[str, float]`: the metrics by TRL's names.
    """
    statistics = {}
    for i, name in enumerate(names):
        statistics[f"rewards/{name}/mean"] = torch.nanmean(rewards[:, i]).item()
        statistics[f"rewards/{name}/std"] = nanstd(rewards[:, i]).item()
    total = (rewards * weights.to(rewards)).nansum(dim=1)
    total[rewards.isnan().all(dim=1)] = torch.nan
    # In evaluation, TRL takes the deviation within a group of one for 0
    std = nanstd(total.view(-1, num_generations), dim=1) if num_generations > 1 else torch.zeros_like(total)
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
    groups: Groups,
    zero_std: bool,
) -> None:
    """
    Replace TRL's last metrics, which are over its last round or over the selected completions, by metrics over all
    completions that were generated.

    Args:
        metrics (`dict[str, list[float]]`):
            Metric lists; changed in place.
        rounds (`list[ScoredRound]`):
            The rounds of generation.
        weights, names:
            See [`reward_statistics`].
        groups ([`~trl_ext.rollouts.groups.Groups`]):
            Which completions of all rounds belong together.
        zero_std (`bool`):
            Whether `frac_reward_zero_std` is replaced too.
    """
    pool_rounds(metrics, [len(scored.rewards) for scored in rounds])
    rewards = groups.padded(torch.cat([scored.rewards for scored in rounds]))
    for key, value in reward_statistics(rewards, weights, names, groups.size).items():
        if key != "frac_reward_zero_std" or zero_std:
            metrics[key][-1] = value


# Metrics to which TRL, or the trust region, appends a value for every micro-batch. They are means over tokens. Clip
# ratios are means over rows if there is one importance ratio for each sequence.
LOSS_MEANS = (
    KL_PER_TOKEN,
    DIVERGENCE,
    DROPPED_TOKENS,
    "entropy",
    *(f"clip_ratio/{which}_mean" for which in ("low", "high", "region")),
    "cispo_clip_ratio",
    "vespo/phi_seq_mean",
)
# Those of them that are zero for a row without advantage
ZERO_WITHOUT_ADVANTAGE = {
    *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio"),
    DROPPED_TOKENS,
}
# Extremes over rows
LOSS_EXTREMES = ("clip_ratio/low_min", "clip_ratio/high_max")
# Metrics that are means over rows even at token level, with their value for a row without a token in the loss
ROW_MEANS = {"vespo/phi_seq_mean": 1.0}
# Prefixes of the name of a metric that is taken over the computed rows alone, and over the rows of an optimizer step
# instead of those of a micro-batch
COMPUTED = "computed/"
STEP = "step/"


def _mean_over_rows(value: float, fit: Fit, of_empty_row: float, over_all: bool) -> float:
    """
    A micro-batch's mean over rows times its weight. The mean of the results over the micro-batches of the step is the
    mean over its rows.
    """
    total = value * (fit.rows + fit.fillers) - fit.fillers * of_empty_row
    count = fit.computed_rows
    if over_all:
        total += of_empty_row * (fit.all_rows - fit.computed_rows) / fit.micro_batches
        count = fit.all_rows
    return total * fit.micro_batches / max(count, 1)


def _mean_over_tokens(value: float, fit: Fit, over_all: bool) -> float:
    """[`_mean_over_rows`] for a mean over tokens."""
    count = fit.all_tokens if over_all else fit.computed_tokens
    return value * fit.tokens * fit.micro_batches / max(count, 1)


def restate_loss_metrics(
    metrics: dict[str, list[float]], fit: Fit, by_row: bool, savings: ExactSavings, loss_has_kl: bool = True
) -> None:
    """
    Weight the last entries of TRL's metrics of the loss. TRL logs their mean over the micro-batches of a step; with
    the weights, that is the mean over the tokens (or rows) of the step.

    If rows were left out or copies were computed once, some metrics can't be taken over all rows. They are taken over
    the rows that were computed, and get the prefix `computed/`. Extremes are taken over the rows of the step, and get
    the prefix `step/` if it has several micro-batches.

    Args:
        metrics (`dict[str, list[float]]`):
            Metric lists; changed in place.
        fit ([`Fit`]):
            What the micro-batch stands for.
        by_row (`bool`):
            Whether there is one importance ratio for each sequence, so that clip ratios are means over rows.
        savings ([`ExactSavings`]):
            The savings that were used.
        loss_has_kl (`bool`, *optional*, defaults to `True`):
            Whether a `kl` that was logged is the loss's, and not that of a generation batch.
    """
    if by_row and fit.fillers and metrics.get("clip_ratio/low_min"):
        metrics["clip_ratio/low_min"][-1] = _without_fillers(metrics, fit)
    for key in LOSS_MEANS:
        if not metrics.get(key) or (key == KL_PER_TOKEN and not loss_has_kl):
            continue
        value = metrics[key].pop()
        over_all = not savings.weigh_copies and (not savings.skip_dead or key in ZERO_WITHOUT_ADVANTAGE)
        if key in ROW_MEANS or (by_row and key in ZERO_WITHOUT_ADVANTAGE):
            mean = _mean_over_rows(value, fit, ROW_MEANS.get(key, 0.0), over_all)
        else:
            mean = _mean_over_tokens(value, fit, over_all)
        metrics.setdefault(key if over_all else COMPUTED + key, []).append(mean)
        if not metrics[key]:
            del metrics[key]
    for key in LOSS_EXTREMES:
        if metrics.get(key):
            _restate_extreme(metrics, key, fit, savings)


def _without_fillers(metrics: dict[str, list[float]], fit: Fit) -> float:
    """
    The smallest clip ratio of a micro-batch's rows, of which each is clipped (1) or not (0); TRL's has the 0 of
    fillers among them. It follows from the number of rows that are clipped.
    """
    mean = (metrics.get("clip_ratio/low_mean") or [math.nan])[-1]
    if not fit.rows or math.isnan(mean):
        return math.nan
    return float(round(mean * (fit.rows + fit.fillers)) >= fit.rows)


def _restate_extreme(metrics: dict[str, list[float]], key: str, fit: Fit, savings: ExactSavings) -> None:
    """
    TRL logs the mean over micro-batches of the extreme in each, which depends on how rows were dealt. What doesn't is
    the extreme over all rows of the step: one entry for all of its micro-batches.
    """
    value, smallest = metrics[key].pop(), key.endswith("min")
    if not metrics[key]:
        del metrics[key]
    # A row that was left out isn't clipped. Its 0 may be the smallest ratio; it is the largest only if it is alone.
    name = (COMPUTED if smallest and savings.skip_dead else "") + (STEP if fit.micro_batches > 1 else "") + key
    entries = metrics.setdefault(name, [])
    values = [value] if fit.first or not entries else [value, entries.pop()]
    known = [number for number in values if not math.isnan(number)]  # NaN: no row with a token
    if not smallest and fit.computed_tokens < fit.all_tokens:
        known.append(0.0)
    entries.append((min if smallest else max)(known, default=math.nan))


# Other extremes, which TRL takes over tokens or sequences
SAMPLING_EXTREMES = (
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/max",
)


def token_weights(loss_type: str, by_row: bool, tokens: float) -> dict[str, float]:
    """
    Weights of the metrics of an evaluated batch that are means over its tokens, and of its `"loss"` if that is one.

    Args:
        loss_type (`str`):
            TRL's `loss_type`.
        by_row (`bool`):
            Whether there is one importance ratio for each sequence, so that clip ratios are means over rows.
        tokens (`float`):
            Number of tokens in the loss.
    """
    means = [key for key in LOSS_MEANS if key not in ROW_MEANS and not (by_row and key in ZERO_WITHOUT_ADVANTAGE)]
    return dict.fromkeys(means if loss_type in ROW_MEAN_LOSSES else [*means, "loss"], tokens)


def pool_evaluation(
    values: dict[str, list[float]],
    rows: list[int],
    rewards: torch.Tensor,
    weights: torch.Tensor,
    names: list[str],
    num_generations: int,
    zero_std: bool,
) -> dict[str, float | None]:
    """
    Metrics of an evaluated data set that are not weighted means of those of its batches: extremes, deviations, and
    means over what isn't a row or a token.

    Args:
        values (`dict[str, list[float]]`):
            TRL's metrics, one value for each batch.
        rows (`list[int]`):
            Completions in each batch.
        rewards (`torch.Tensor` of shape `(N, F)`):
            Rewards of the completions of all batches, NaN = not applicable.
        weights, names, num_generations:
            See [`reward_statistics`].
        zero_std (`bool`):
            Whether `frac_reward_zero_std` is about groups.
    """
    pooled = {key: list(values[key]) for key in ROUND_METRICS if key in values}
    pool_rounds(pooled, rows)
    found = {key: of[0] for key, of in pooled.items()}
    for key in (*LOSS_EXTREMES, *SAMPLING_EXTREMES):
        known = [value for value in values.get(key, ()) if not math.isnan(value)]
        if known:
            found[key] = (min if key.endswith("min") else max)(known)
    of_rewards = reward_statistics(rewards, weights, names, num_generations)
    if not zero_std:
        of_rewards.pop("frac_reward_zero_std")
    return {key: None if math.isnan(value) else value for key, value in (found | of_rewards).items()}
