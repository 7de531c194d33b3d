"""
Figures of a run.

- `learning.png` shows whether the policy improved, on which share of its completions it was trained, and how many
  tokens that took; where there is a critic, also how well it predicts returns and how far the policy moved.
- `stages.png` shows a run of several stages on one axis.
- `tokens.png` shows how a critic values single tokens.
- `reliability.png` shows how often what was predicted of groups came true.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; what is drawn also differs by position, line
style or label.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..evaluation.credit import TokenCredit
from ..evaluation.divergence import KL
from ..evaluation.held_out import Estimate, read_estimates
from ..metric_keys import (
    GENERATED_TOKENS,
    GROUPS,
    GROUPS_DUPLICATED,
    GROUPS_KEPT,
    PREFERENCE_ACCURACY,
    SCORES,
    TRAINED_TOKENS,
)
from ..monitors.progress import count
from ..pipelines.stages import StageResult
from ..rollouts.calibration import read_curve
from .summary import CRITIC_METRICS, metric_of


BLUE, ORANGE, GREEN, VERMILION, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#8C8C8C"
INK = "#333333"
STAGE_TINTS = ("#F3F6FA", "#FBF6EC")
TOKEN_PANELS = (
    "V before the token",
    "advantage\n(before whitening)",
    "probability under the policy,\nover that under the reference",
)
# Completions longer than this are drawn without the text of their tokens
MOST_NAMED_TOKENS = 64


def plot_learning(
    log_history: Sequence[dict[str, Any]], path: str | Path, title: str, metric: str | None = None
) -> Path:
    """
    Draws a run's log: reward over optimizer steps with the held-out results, held-out results before and after, how
    many groups were kept, and tokens generated and trained on. Where a critic was trained, it adds the critic's loss,
    its explained variance and the KL to the reference, and draws groups and tokens only if groups were selected. A
    panel whose quantity wasn't logged says so. No display is needed.

    Args:
        log_history (`Sequence[dict[str, Any]]`):
            `trainer.state.log_history`.
        path (`str` or `Path`):
            Where the PNG goes.
        title (`str`):
            Heading of the figure.
        metric (`str`, *optional*):
            Name of the reward function to show; by default the first one evaluated, or the sum of all rewards where
            nothing was evaluated.

    Returns:
        `Path`: `path`.
    """
    measured = read_estimates(log_history)
    if metric is None and measured:
        metric = next(iter(next(iter(measured.values()))))
    held_out = {step: estimates[metric] for step, estimates in measured.items() if metric in estimates}

    has_critic = any(CRITIC_METRICS["explained_variance"] in entry for entry in log_history)
    has_groups = not has_critic or any(GROUPS_KEPT in entry for entry in log_history)
    rows = 1 + has_critic + has_groups
    figure = Figure(figsize=(11, 3.6 * rows), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold", color=INK)
    stripes = iter(figure.subfigures(rows, 1, squeeze=False).flat)
    learned, before_after = next(stripes).subplots(1, 2, width_ratios=[1.7, 1])
    _draw_reward(learned, log_history, held_out, metric)
    _draw_before_after(before_after, held_out, metric)
    if has_critic:
        for axis, draw in zip(
            next(stripes).subplots(1, 3), (_draw_value_loss, _draw_explained_variance, _draw_kl), strict=True
        ):
            draw(axis, log_history)
    if has_groups:
        groups, tokens = next(stripes).subplots(1, 2, width_ratios=[1.7, 1])
        _draw_groups(groups, log_history)
        _draw_tokens(tokens, log_history)
    return _save(figure, path)


def plot_stages(stages: Sequence[StageResult], path: str | Path, title: str, metric: str | None = None) -> Path:
    """
    Draws a run of several stages on one axis, which counts optimizer steps over all stages: held-out results and the
    reward while training, preference accuracy where DPO trained, and KL to the reference where it was logged.

    Args:
        stages (`Sequence[StageResult]`):
            The finished stages in order: `DPOThenPPO.stages`.
        path (`str` or `Path`):
            Where the PNG goes.
        title (`str`):
            Heading of the figure.
        metric (`str`, *optional*):
            Name of the reward function to show; by default the first one that was measured.

    Returns:
        `Path`: `path`.
    """
    metric = metric or metric_of(stages)
    trained = [stage for stage in stages if stage.steps]
    starts = list(accumulate((stage.steps for stage in trained), initial=0))
    logs = [
        {**entry, "step": start + entry["step"]}
        for stage, start in zip(trained, starts, strict=False)
        for entry in stage.log_history
    ]
    figure = Figure(figsize=(11, 8.6), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold", color=INK)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    for axis in axes:
        for i, (start, stage) in enumerate(zip(starts, trained, strict=False)):
            axis.axvspan(start, start + stage.steps, color=STAGE_TINTS[i % len(STAGE_TINTS)], linewidth=0)
    several = max((stage.round for stage in stages), default=1) > 1
    for start, stage in zip(starts, trained, strict=False):
        name = f"{stage.name.upper()} {stage.round}" if several else stage.name.upper()
        axes[0].annotate(
            name, (start + stage.steps / 2, 1.0), (0, -4), xycoords=("data", "axes fraction"), color=INK,
            textcoords="offset points", ha="center", va="top", fontsize=11, fontweight="bold",
        )  # fmt: skip
    _heading(axes[0], f"{metric or 'reward'}, held out and while training")
    _draw_stage_results(axes[0], stages, starts, logs, metric, f"rewards/{metric}/mean")
    _draw_preference_accuracy(axes[1], logs)
    _heading(axes[2], "KL to the reference, nats a completion")
    _draw_stage_results(axes[2], stages, starts, logs, KL, CRITIC_METRICS["kl"])
    axes[2].set_xlabel("optimizer step, all stages", fontsize=9, color=INK)
    end = max(starts[-1], 1)
    axes[2].set_xlim(-0.01 * end, 1.01 * end)  # whole markers at both ends
    return _save(figure, path)


def plot_tokens(credits: Sequence[TokenCredit], path: str | Path, title: str) -> Path:
    """
    Draws completions token by token, side by side: the critic's value before each token, the advantage of the token,
    and the policy's probability of it over the reference's.

    Args:
        credits (`Sequence[TokenCredit]`):
            Some of those that [`~trl_ext.evaluation.credit.credit_by_token`] returned.
        path (`str` or `Path`):
            Where the PNG goes.
        title (`str`):
            Heading of the figure.

    Returns:
        `Path`: `path`.
    """
    # Room for every token's text, up to a point
    widths = [min(max(len(credit.tokens), 8), MOST_NAMED_TOKENS) for credit in credits]
    figure = Figure(figsize=(min(max(11, 0.42 * sum(widths)), 30), 7.2), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold", color=INK)
    axes = figure.subplots(3, len(credits), sharex="col", sharey="row", width_ratios=widths, squeeze=False)
    for column, credit in zip(axes.T, credits, strict=True):
        _draw_values(column[0], credit)
        _draw_advantages(column[1], credit)
        _draw_ratios(column[2], credit)
        _name_tokens(column[2], credit.tokens)
        column[2].set_xlabel("token of the completion", fontsize=9, color=INK)
    axes[0, 0].legend(frameon=False, fontsize=9, loc="best")
    for axis, label in zip(axes[:, 0], TOKEN_PANELS, strict=True):
        axis.set_ylabel(label, fontsize=9, color=INK)
    return _save(figure, path)


def plot_reliability(log_history: Sequence[dict[str, Any]], path: str | Path, title: str) -> Path | None:
    """
    Draws the reliability curve of the prediction by which a run chose its prompts: for ten bins of the predicted
    probability, how often it came true, over the last groups of the run. A dot's area is the number of groups.

    Args:
        log_history (`Sequence[dict[str, Any]]`):
            `trainer.state.log_history`.
        path (`str` or `Path`):
            Where the PNG goes.
        title (`str`):
            Heading of the figure.

    Returns:
        `Path`: `path`. `None` if the run predicted nothing; then no file is written.
    """
    curve = read_curve(log_history)
    if not curve:
        return None
    groups, predicted, came_true = zip(*curve, strict=True)
    total = sum(groups)
    error = sum(n * abs(p - t) for n, p, t in curve) / total
    figure = Figure(figsize=(5.5, 5.2), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)
    axis = figure.subplots()
    _heading(axis, f"the last {round(total)} groups, error {error:.3f}")
    axis.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.4, label="as predicted")
    axis.plot(predicted, came_true, color=BLUE, linewidth=1.6)
    axis.scatter(predicted, came_true, s=[30 + 600 * n / total for n in groups], color=BLUE, label="came true")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axis.set_xlabel("predicted", fontsize=9, color=INK)
    axis.set_ylabel("share that came true", fontsize=9, color=INK)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="upper left", markerscale=0.5)
    return _save(figure, path)


def _save(figure: Figure, path: str | Path) -> Path:
    for axis in figure.axes:
        axis.set_axisbelow(True)  # the grid
        axis.spines["top"].set_visible(False)
        axis.spines["right"].set_visible(axis.yaxis.get_ticks_position() == "right")
        axis.tick_params(colors=INK, labelsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return path


def series(log_history: Sequence[dict[str, Any]], *keys: str) -> tuple[list[int], list[list[float]]]:
    """
    Returns the steps at which all of `keys` were logged, and the values of each key at those steps. A value that was
    NaN is logged as `None`, and doesn't count.

    A resumed run may have logged a step twice; the later entry counts.
    """
    found = {
        entry["step"]: [float(entry[key]) for key in keys]
        for entry in log_history
        if all(entry.get(key) is not None for key in keys)
    }
    steps = sorted(found)
    return steps, [[found[step][i] for step in steps] for i in range(len(keys))]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average. It takes fewer values at the ends, so that it doesn't lag and has as many values."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _draw_reward(
    axis: Axes, log_history: Sequence[dict[str, Any]], held_out: dict[int, Estimate], metric: str | None
) -> None:
    key = f"rewards/{metric}/mean" if metric is not None else "reward"
    steps, (values,) = series(log_history, key)
    name = metric or "reward"
    _heading(axis, f"{name} while training", "optimizer step")
    if not steps:
        return _nothing(axis, f"`{key}` was not logged")
    _draw_course(axis, steps, values, label="sampled in training")
    if held_out:
        means = [e.mean for e in held_out.values()]
        below = [max(0.0, e.mean - e.low) for e in held_out.values()]
        above = [max(0.0, e.high - e.mean) for e in held_out.values()]
        axis.errorbar(
            list(held_out),
            means,
            [below, above],
            fmt="D",
            color=VERMILION,
            markersize=6,
            capsize=4,
            linewidth=1.6,
            label="held-out prompts, 95 %",
            zorder=5,
        )
    handles = axis.get_legend_handles_labels()[0] + _draw_score(axis, log_history, values)
    # Below the axes, where no line crosses it
    axis.legend(handles=handles, frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_score(axis: Axes, log_history: Sequence[dict[str, Any]], shown: list[float]) -> list[Any]:
    """Draws the score that a critic's trainer maximises, where it isn't what is shown, on an axis of its own."""
    steps, (scores,) = series(log_history, SCORES)
    if not steps or scores == shown:
        return []
    right = axis.twinx()
    smoothed = smooth(scores, max(3, len(scores) // 12))
    right.set_ylabel("score", fontsize=9, color=INK)
    return right.plot(steps, smoothed, color=ORANGE, linewidth=2, linestyle="--", label="score maximised (right)")


def _draw_stage_results(
    axis: Axes,
    stages: Sequence[StageResult],
    starts: Sequence[int],
    logs: Sequence[dict[str, Any]],
    metric: str | None,
    logged: str,
) -> None:
    """A quantity on held-out prompts before and after each stage, and as `logged` while training."""
    steps, (values,) = series(logs, logged)
    if steps:
        axis.plot(steps, values, color=SKY, linewidth=1, alpha=0.8, label="sampled in training")
    held_out = {step: estimates[metric] for step, estimates in read_estimates(logs).items() if metric in estimates}
    ends = dict(zip((stage.folder for stage in stages if stage.steps), starts[1:], strict=True))
    for stage in stages:  # a stage without steps was measured at the start
        if metric in stage.measured:
            held_out[ends.get(stage.folder, 0)] = stage.measured[metric]
    if not held_out and not steps:
        axis.annotate("nothing was measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color=GREY)
        return
    at = sorted(held_out)
    found = [held_out[step] for step in at]
    reach = [[max(0.0, e.mean - e.low) for e in found], [max(0.0, e.high - e.mean) for e in found]]
    if found:
        axis.errorbar(
            at, [e.mean for e in found], reach, fmt="D-", color=VERMILION, markersize=6, capsize=4, linewidth=1.6,
            label="held-out prompts, 95 %", zorder=5,
        )  # fmt: skip
    axis.margins(y=0.15)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_preference_accuracy(axis: Axes, logs: Sequence[dict[str, Any]]) -> None:
    _heading(axis, "share of pairs that the implicit reward ranks right")
    for key, color, label in (
        (PREFERENCE_ACCURACY, BLUE, "training pairs"),
        ("eval_rewards/accuracies", VERMILION, "held-out pairs"),
    ):
        steps, (values,) = series(logs, key)
        if steps:
            axis.plot(steps, values, color=color, linewidth=2, marker="." if len(steps) < 40 else None, label=label)
    axis.set_ylim(0, 1.02)
    axis.grid(axis="y", alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_course(axis: Axes, steps: list[int], values: list[float], label: str | None = None) -> None:
    """Draws what was logged, and its moving average."""
    axis.plot(steps, values, color=SKY, linewidth=1, alpha=0.8, label=label)
    smoothed = smooth(values, max(3, len(values) // 12))
    axis.plot(steps, smoothed, color=BLUE, linewidth=2.4, label="moving average" if label else None)
    axis.grid(axis="y", alpha=0.25)


def _draw_before_after(axis: Axes, held_out: dict[int, Estimate], metric: str | None) -> None:
    _heading(axis, "held-out prompts")
    if len(held_out) < 2:
        return _nothing(axis, "not evaluated before and after")
    (first, before), (last, after) = next(iter(held_out.items())), next(reversed(held_out.items()))
    for x, (estimate, color) in enumerate(((before, GREY), (after, BLUE))):
        axis.bar(x, estimate.mean, width=0.62, color=color)
        reach = [[max(0.0, estimate.mean - estimate.low)], [max(0.0, estimate.high - estimate.mean)]]
        axis.errorbar(x, estimate.mean, reach, color=INK, capsize=7, linewidth=1.6)
        axis.annotate(
            f"{estimate.mean:.2f}", (x, max(estimate.high, estimate.mean)), (0, 5), textcoords="offset points",
            ha="center", fontsize=14, fontweight="bold", color=INK,
        )  # fmt: skip
    axis.set_xticks([0, 1], [f"before\nstep {first}", f"after\nstep {last}"])
    axis.set_ylabel(str(metric), fontsize=9, color=INK)
    axis.margins(y=0.28)
    axis.annotate(
        f"{before.prompts} prompts, {before.samples // max(before.prompts, 1)} samples each, 95 % intervals",
        (0.5, 1.0), xycoords="axes fraction", ha="center", va="top", fontsize=8.5, color=GREY,
    )  # fmt: skip


def _draw_groups(axis: Axes, log_history: Sequence[dict[str, Any]]) -> None:
    _heading(axis, "groups of completions, per log", "optimizer step")
    kinds = {
        GROUPS_KEPT: ("kept: trained on", GREEN, ""),
        f"{GROUPS}surplus": ("live, but not needed", SKY, ""),
        f"{GROUPS}all_wrong": ("dead: all wrong", VERMILION, "//"),
        f"{GROUPS}all_right": ("dead: all right", ORANGE, ".."),
    }
    steps, counts = series(log_history, *kinds)
    if steps:
        layers = axis.stackplot(steps, *counts, colors=[color for _, color, _ in kinds.values()], step="mid")
        for layer, (label, _, hatch) in zip(layers, kinds.values(), strict=True):
            layer.set(label=label, hatch=hatch, edgecolor="white", linewidth=0)
        copied_at, (copied,) = series(log_history, GROUPS_DUPLICATED)
        if any(copied):
            axis.plot(copied_at, copied, color=INK, linestyle="--", linewidth=1.4, label="copies of live groups")
        top = max(sum(at_step) for at_step in zip(*counts, strict=True))
    else:  # a trainer that doesn't select
        steps, (dead,) = series(log_history, "frac_reward_zero_std")
        if not steps:
            return _nothing(axis, "no group was counted")
        axis.stackplot(steps, [1 - d for d in dead], dead, colors=[GREEN, ORANGE], labels=["live", "dead"], step="mid")
        axis.set_ylabel("fraction", fontsize=9, color=INK)
        top = 1.0
    axis.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axis.set_ylim(0, 1.3 * top)  # room for the legend above everything
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=3)


def _draw_tokens(axis: Axes, log_history: Sequence[dict[str, Any]]) -> None:
    _heading(axis, "tokens so far", "optimizer step")
    steps, (generated, trained) = series(log_history, GENERATED_TOKENS, TRAINED_TOKENS)
    if steps:
        axis.plot(steps, generated, color=BLUE, linewidth=2.4, label=f"generated: {count(generated[-1])}")
        trained_label = f"trained on: {count(trained[-1])}"
        axis.plot(steps, trained, color=GREEN, linewidth=2.4, linestyle="--", label=trained_label)
    else:
        steps, (total,) = series(log_history, "num_tokens")
        if not steps:
            return _nothing(axis, "no token was counted")
        axis.plot(steps, total, color=BLUE, linewidth=2.4, label=f"prompts and completions: {count(total[-1])}")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=10, loc="upper left")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axis.grid(axis="y", alpha=0.25)


def _draw_value_loss(axis: Axes, log_history: Sequence[dict[str, Any]]) -> None:
    _heading(axis, "value loss, per token", "optimizer step")
    steps, (values,) = series(log_history, CRITIC_METRICS["value_loss"])
    if not steps:
        return _nothing(axis, f"`{CRITIC_METRICS['value_loss']}` was not logged")
    _draw_course(axis, steps, values)
    axis.set_ylim(bottom=0)


def _draw_explained_variance(axis: Axes, log_history: Sequence[dict[str, Any]]) -> None:
    _heading(axis, "explained variance of returns", "optimizer step")
    steps, (values,) = series(log_history, CRITIC_METRICS["explained_variance"])
    if not steps:
        return _nothing(axis, "all returns were equal")
    _draw_course(axis, steps, values)
    axis.axhline(0, color=GREY, linestyle=":", linewidth=1.2)
    axis.set_ylim(max(-1.0, min(-0.1, *values)), 1)
    axis.annotate(
        "1: knows the return · 0: as good as its mean", (0.5, 1.0), xycoords="axes fraction", ha="center", va="top",
        fontsize=8.5, color=GREY,
    )  # fmt: skip


def _draw_kl(axis: Axes, log_history: Sequence[dict[str, Any]]) -> None:
    _heading(axis, "KL to the reference, nats a completion", "optimizer step")
    steps, (values,) = series(log_history, CRITIC_METRICS["kl"])
    if not steps:
        return _nothing(axis, "there was no reference")
    _draw_course(axis, steps, values)
    axis.set_ylim(bottom=min(0, *values))


def _draw_values(axis: Axes, credit: TokenCredit) -> None:
    rewards = " · ".join(f"{name} {value:.3g}" for name, value in credit.rewards.items())
    _heading(axis, f"{_plain(shorten(credit.prompt, 60))}\n{_plain(rewards)}")
    positions = range(len(credit.tokens))
    axis.axhline(credit.score, color=VERMILION, linestyle="--", linewidth=1.4, label="score, scaled as in training")
    axis.plot(positions, credit.values, color=BLUE, linewidth=2.0, marker="o", markersize=5, label="value")
    axis.grid(axis="y", alpha=0.25)
    axis.margins(y=0.15)


def _draw_advantages(axis: Axes, credit: TokenCredit) -> None:
    colors = [GREEN if advantage >= 0 else VERMILION for advantage in credit.advantages]
    axis.bar(range(len(credit.tokens)), credit.advantages, color=colors, width=0.7)
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.grid(axis="y", alpha=0.25)


def _draw_ratios(axis: Axes, credit: TokenCredit) -> None:
    if credit.ratios is None:
        return _nothing(axis, "there is no reference")
    # Bars on a log scale, from 1
    heights = [ratio - 1 for ratio in credit.ratios]
    colors = [GREEN if height >= 0 else VERMILION for height in heights]
    axis.set_yscale("log", base=2)
    axis.bar(range(len(credit.tokens)), heights, bottom=1, color=colors, width=0.7)
    axis.axhline(1, color=INK, linewidth=0.8)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"× {ratio:.3g}"))
    axis.grid(axis="y", alpha=0.25)


def _name_tokens(axis: Axes, tokens: Sequence[str]) -> None:
    axis.set_xlim(-0.7, max(len(tokens), 8) - 0.3)
    if len(tokens) > MOST_NAMED_TOKENS:
        return
    shown = [_plain(shorten(token.replace("\n", "⏎").replace(" ", "␣") or "∅", 12)) for token in tokens]
    long = max(map(len, shown)) > 6
    axis.set_xticks(range(len(tokens)), shown, rotation=60 if long else 0, ha="right" if long else "center")


def shorten(text: str, length: int) -> str:
    """`text`, cut at `length` characters, with an ellipsis if something is missing."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _plain(text: str) -> str:
    """Text that matplotlib doesn't read as mathematics."""
    return text.replace("$", r"\$")


def _heading(axis: Axes, title: str, x_label: str | None = None) -> None:
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    if x_label is not None:
        axis.set_xlabel(x_label, fontsize=9, color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _nothing(axis: Axes, why: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.text(0.5, 0.5, why, ha="center", va="center", color=GREY, transform=axis.transAxes)
