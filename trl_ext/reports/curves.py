"""
The curves of several runs side by side: one panel a quantity, one colour a run. A panel that no run has anything for
is left out.
"""

import io
import math
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .. import metric_keys
from ..evaluation.held_out import Estimate, read_estimates
from ..monitors.health import EntropyCheck, KLCheck
from .health_words import measured
from .plots import BLUE, GREEN, GREY, INK, ORANGE, SKY, VERMILION, shorten, smooth
from .run_files import Run


PINK = "#CC79A7"
COLORS = (BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, INK)
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")
COLUMNS = 3
NAME_LENGTH = 40  # of a run in the legend

Reader = Callable[[dict[str, Any]], float | None]


class Panel(NamedTuple):
    """
    A quantity to draw.

    Args:
        title (`str`):
            What it is, with its unit.
        read (`Callable`):
            Returns it from an entry of the log, `None` where the entry lacks it.
    """

    title: str
    read: Reader


def first_of(*keys: str) -> Reader:
    """Reads the first of several keys that an entry has."""

    def read(entry: dict[str, Any]) -> float | None:
        return next((float(entry[key]) for key in keys if isinstance(entry.get(key), int | float)), None)

    return read


def _groups_kept(entry: dict[str, Any]) -> float | None:
    kept, generated = entry.get(metric_keys.GROUPS_KEPT), entry.get(metric_keys.GROUPS_GENERATED)
    if kept is not None and generated:
        return float(kept) / float(generated)
    dead = entry.get("frac_reward_zero_std")
    return None if dead is None else 1 - float(dead)


# What is drawn, in this order, after the held-out results and before health
PANELS = (
    Panel("reward while training", first_of(metric_keys.REWARD)),
    Panel("share of pairs ranked right", first_of("eval_rewards/accuracies", metric_keys.PREFERENCE_ACCURACY)),
    Panel("KL to the reference, nats a completion", KLCheck().read),
    Panel("entropy, nats a token", EntropyCheck().read),
    Panel(
        "share of tokens clipped",
        first_of("clip_ratio/region_mean", "policy/clipfrac_avg", metric_keys.DROPPED_TOKENS, "cispo_clip_ratio"),
    ),
    Panel("mean length of completions, tokens", first_of(metric_keys.MEAN_LENGTH)),
    Panel("share of groups with something to learn", _groups_kept),
    Panel("explained variance of the critic", first_of(metric_keys.EXPLAINED_VARIANCE)),
    Panel("loss", first_of("loss")),
)


def plot_curves(runs: Sequence[Run]) -> bytes:
    """
    Draws runs over their optimizer steps: held-out results with their intervals, what [`PANELS`] lists, and when
    health checks were in alarm. Thin lines are what was logged, thick ones moving averages.

    Args:
        runs (`Sequence[Run]`):
            One or several.

    Returns:
        `bytes`: a PNG.
    """
    looks = list(zip(runs, cycle(COLORS), [STYLES[i // len(COLORS) % len(STYLES)] for i in range(len(runs))]))
    curves = [(panel, [_course(run, panel.read) for run in runs]) for panel in PANELS]
    drawn = [(panel, courses) for panel, courses in curves if any(steps for steps, _ in courses)]
    has_held_out, has_health = any(_held_out(run) for run in runs), any(measured(run) for run in runs)
    count = has_held_out + len(drawn) + has_health
    rows = max(1, math.ceil(count / COLUMNS))
    figure = Figure(figsize=(13.5, 3.1 * rows + 0.6), dpi=110, layout="constrained")
    axes = iter(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    if has_held_out:
        _draw_held_out(next(axes), looks)
    for panel, courses in drawn:
        axis = next(axes)
        _heading(axis, panel.title)
        for (run, color, style), course in zip(looks, courses, strict=True):
            for part in _by_stage(run, course):
                _draw(axis, *part, color, style)
    if has_health:
        _draw_health(next(axes), looks)
    for axis in axes:
        axis.set_axis_off()
    last = max(stage.start + stage.steps for run in runs for stage in run.stages)
    for axis in figure.axes:
        axis.set_xlim(-0.02 * last, max(1.02 * last, 1))
    _mark_stages(figure, runs)
    if len(runs) > 1:
        lines = [Line2D([], [], color=color, linestyle=style, linewidth=2.4) for _, color, style in looks]
        names = [shorten(run.name, NAME_LENGTH).replace("$", r"\$") for run in runs]
        figure.legend(lines, names, loc="outside upper center", ncols=min(4, len(runs)), frameon=False, fontsize=10)
    written = io.BytesIO()
    figure.savefig(written, format="png", facecolor="white")
    return written.getvalue()


def _course(run: Run, read: Reader) -> tuple[list[int], list[float]]:
    """Steps and values. Of a step that a resumed run logged twice, the later entry counts."""
    found: dict[int, float] = {}
    for entry in run.log_history:
        value = read(entry)
        if value is not None and math.isfinite(value):
            found[int(entry["step"])] = value
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def _by_stage(run: Run, course: tuple[list[int], list[float]]) -> list[tuple[list[int], list[float]]]:
    """A course in parts, none of which goes over the end of a stage: a loss of DPO and one of PPO have no average."""
    parts = []
    for stage in run.stages:
        end = stage.start + stage.steps
        found = [(step, value) for step, value in zip(*course, strict=True) if (stage.start or -1) < step <= end]
        if found:
            parts.append(([step for step, _ in found], [value for _, value in found]))
    return parts


def _held_out(run: Run) -> dict[int, Estimate]:
    """Estimates of the run's metric by step."""
    measured_at = read_estimates(run.log_history)
    metric = run.metric or next((name for estimates in measured_at.values() for name in estimates), None)
    found = {step: estimates[metric] for step, estimates in measured_at.items() if metric in estimates}
    step = 0
    for stage in run.summary.get("stages", ()):  # the start is measured by no trainer
        step += stage["steps"]
        if metric in stage["intervals"]:
            low, high = stage["intervals"][metric]
            found.setdefault(step, Estimate(stage[metric], low, high, stage["prompts"], stage["samples"]))
    return dict(sorted(found.items()))


def _draw(axis: Axes, steps: Sequence[int], values: Sequence[float], color: str, style: str) -> None:
    if len(steps) == 1:
        axis.plot(steps, values, color=color, marker="o", markersize=4)
        return
    axis.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    axis.plot(steps, smooth(values, max(3, len(values) // 12)), color=color, linestyle=style, linewidth=2)


def _draw_held_out(axis: Axes, looks: Sequence[tuple[Run, str, str]]) -> None:
    metrics = {run.metric for run, _, _ in looks if _held_out(run)} - {None}
    _heading(axis, f"{' / '.join(sorted(map(str, metrics))) or 'metric'} on held-out prompts, 95 %")
    for run, color, style in looks:
        found = _held_out(run)
        if not found:
            continue
        estimates = list(found.values())
        reach = [[max(0.0, e.mean - e.low) for e in estimates], [max(0.0, e.high - e.mean) for e in estimates]]
        means = [e.mean for e in estimates]
        axis.errorbar(
            list(found), means, reach, color=color, linestyle=style, marker="D", markersize=4, capsize=3, linewidth=1.6
        )


def _draw_health(axis: Axes, looks: Sequence[tuple[Run, str, str]]) -> None:
    """When checks were in alarm: a row a check, and in it a bar a run."""
    _heading(axis, "health checks: when in alarm")
    found = [measured(run) for run, _, _ in looks]
    names = list(dict.fromkeys(finding.check for one in found for finding in one))
    height = 0.8 / len(looks)
    for place, ((_, color, _), one) in enumerate(zip(looks, found, strict=True)):
        for finding in one:
            at = names.index(finding.check) - 0.4 + place * height
            spans = [(begun, max(ended - begun, 0.5)) for begun, ended in finding.episodes]
            axis.broken_barh(spans, (at, height), color=color)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_yticks(range(len(names)), [name.replace("_", "\n") for name in names])
    if not any(finding.episodes for one in found for finding in one):
        axis.text(0.5, 0.5, "none was", ha="center", va="center", color=GREY, transform=axis.transAxes)


def _mark_stages(figure: Figure, runs: Sequence[Run]) -> None:
    """Lines where the stages of a single run begin, with their names in the first panel."""
    if len(runs) != 1 or len(runs[0].stages) < 2:
        return
    for axis in figure.axes:
        if not axis.axison:
            continue
        for stage in runs[0].stages:
            if stage.start:
                axis.axvline(stage.start, color=GREY, linestyle=":", linewidth=1)
    for stage in runs[0].stages:
        figure.axes[0].annotate(
            stage.name.upper(), (stage.start, 0.0), (3, 3), xycoords=("data", "axes fraction"), fontsize=8,
            textcoords="offset points", ha="left", va="bottom", color=GREY,
        )  # fmt: skip


def _heading(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlabel("optimizer step", fontsize=8, color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=8)
