"""
`learning.png`: one look at a run. Did it learn, on what share of what it generated, and at which price?

Colours are Okabe and Ito's, which remain apart for colour-blind readers; everything drawn also differs by position,
line style or label.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..evaluation.held_out import Estimate, read_estimates
from ..monitors.progress import count


BLUE, ORANGE, GREEN, VERMILION, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#8C8C8C"
INK = "#333333"


def plot_learning(
    log_history: Sequence[dict[str, Any]], path: str | Path, title: str, metric: str | None = None
) -> Path:
    """
    Draws a run's log as four panels: reward over optimizer steps with the held-out results, what became of the groups,
    tokens generated and trained on, and held-out before and after. A panel whose quantity wasn't logged says so. It
    needs no display.

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

    figure = Figure(figsize=(11, 7.2), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold", color=INK)
    axes = figure.subplots(2, 2, width_ratios=[1.7, 1])
    _draw_reward(axes[0, 0], log_history, held_out, metric)
    _draw_before_after(axes[0, 1], held_out, metric)
    _draw_groups(axes[1, 0], log_history)
    _draw_tokens(axes[1, 1], log_history)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return path


def series(log_history: Sequence[dict[str, Any]], *keys: str) -> tuple[list[int], list[list[float]]]:
    """
    Steps at which all of `keys` were logged, and the values of each key at those steps.

    A resumed run may have logged a step twice; the later entry counts.
    """
    found = {
        entry["step"]: [float(entry[key]) for key in keys] for entry in log_history if all(k in entry for k in keys)
    }
    steps = sorted(found)
    return steps, [[found[step][i] for step in steps] for i in range(len(keys))]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average that takes fewer values at the ends, so that it neither lags nor drops any."""
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
    axis.plot(steps, values, color=SKY, linewidth=1, alpha=0.8, label="sampled in training")
    axis.plot(steps, smooth(values, max(3, len(values) // 12)), color=BLUE, linewidth=2.4, label="moving average")
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
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="lower right")


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
        "selection/groups_kept": ("kept: trained on", GREEN, ""),
        "selection/groups_surplus": ("live, but not needed", SKY, ""),
        "selection/groups_all_wrong": ("dead: all wrong", VERMILION, "//"),
        "selection/groups_all_right": ("dead: all right", ORANGE, ".."),
    }
    steps, counts = series(log_history, *kinds)
    if steps:
        layers = axis.stackplot(steps, *counts, colors=[color for _, color, _ in kinds.values()], step="mid")
        for layer, (label, _, hatch) in zip(layers, kinds.values(), strict=True):
            layer.set(label=label, hatch=hatch, edgecolor="white", linewidth=0)
        copied_at, (copied,) = series(log_history, "selection/groups_duplicated")
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
    steps, (generated, trained) = series(log_history, "selection/generated_tokens", "selection/trained_tokens")
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


def _heading(axis: Axes, title: str, x_label: str | None = None) -> None:
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    if x_label is not None:
        axis.set_xlabel(x_label, fontsize=9, color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _nothing(axis: Axes, why: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.text(0.5, 0.5, why, ha="center", va="center", color=GREY, transform=axis.transAxes)
