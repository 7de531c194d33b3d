"""
From the curves of runs to tables and pictures.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
from scipy import optimize, stats
from task import ROOT


mpl.use("Agg")


# By method, the points of each seed's run
Curves = dict[str, dict[int, list[dict[str, float]]]]

# Okabe and Ito's colours; what differs in the size of a batch is dashed
COLOURS = {
    "GRPO": "#000000",
    "DAPO": "#D55E00",
    "DUPO": "#009E73",
    "GSPO": "#0072B2",
    "blind": "#D55E00",
    "informed": "#0072B2",
    "informed, 16 prompts": "#0072B2",
    "no features, 16 prompts": "#E69F00",
    "signal, 16 prompts": "#CC79A7",
    "sizes, 16 prompts": "#009E73",
    "informed+length": "#009E73",
    "informed+length, 1 round": "#CC79A7",
    "GRPO, 16 prompts": "#999999",
    "informed+length, 16 prompts": "#F0E442",
    "MaxRL": "#009E73",
    "DPPO, TV": "#0072B2",
    "DPPO, KL": "#56B4E9",
    "Dr. GRPO": "#999999",
    "PPO": "#CC79A7",
    "VAPO": "#000000",
    "no pretraining": "#D55E00",
    "no decoupled GAE": "#009E73",
    "no length-adaptive GAE": "#0072B2",
    "no clip-higher": "#56B4E9",
    "no token-level loss": "#E69F00",
    "no NLL": "#F0E442",
    "no groups": "#999999",
    "none of them: PPO": "#CC79A7",
}
BASELINES = {"GRPO": "TRL's GRPO", "blind": "blind refill"}
AXES = {"steps": "optimizer steps", "tokens": "generated tokens", "cpu": "CPU-seconds"}
LAST = 0.2  # share of a budget over which the level at its end is averaged


def area(points: list[dict[str, float]], axis: str, budget: float) -> float:
    """Mean pass@1 over the axis, up to a budget that all methods reached."""
    xs, ys = np.array([p[axis] for p in points]), np.array([p["pass@1"] for p in points])
    grid = np.linspace(0, budget, 200)
    return float(np.interp(grid, xs, ys).mean())


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(half)


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds."""
    means = np.random.default_rng(seed).choice(values, size=(10_000, len(values))).mean(axis=1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def table(curves: Curves) -> list[dict[str, Any]]:
    """A row a method: final pass@1, and areas under the curve up to the smallest budget any run used."""
    runs = [points for seeds in curves.values() for points in seeds.values()]
    budgets = {axis: min(points[-1][axis] for points in runs) for axis in AXES}
    rows = []
    for method, seeds in curves.items():
        row: dict[str, Any] = {"method": method, "seeds": len(seeds)}
        row["final"] = mean_interval([points[-1]["pass@1"] for points in seeds.values()])
        for axis in AXES:
            row[axis] = mean_interval([area(points, axis, budgets[axis]) for points in seeds.values()])
            row[f"{axis}_used"] = float(np.mean([points[-1][axis] for points in seeds.values()]))
        # Paired by seed: the same start and data
        row["versus"] = {}
        for other in [name for name in BASELINES if name in curves and name != method]:
            differences = {
                axis: [
                    area(seeds[s], axis, budgets[axis]) - area(curves[other][s], axis, budgets[axis]) for s in seeds
                ]
                for axis in AXES
            }
            row["versus"][other] = {
                axis: (*mean_interval(found), *bootstrap_interval(found)) for axis, found in differences.items()
            }
        rows.append(row)
    return rows


def plot(curves: Curves, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        for method, seeds in curves.items():
            end = min(points[-1][axis] for points in seeds.values())
            grid = np.linspace(0, end, 100)
            ys = np.array(
                [np.interp(grid, [p[axis] for p in pts], [p["pass@1"] for p in pts]) for pts in seeds.values()]
            )
            mean, sd = ys.mean(axis=0), ys.std(axis=0, ddof=1) if len(ys) > 1 else 0
            panel.plot(grid, mean, color=COLOURS[method], label=method)
            panel.fill_between(grid, mean - sd, mean + sd, color=COLOURS[method], alpha=0.12, linewidth=0)
        panel.set_xlabel(label)
        panel.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("pass@1 on held-out prompts")
    panels[0].legend(frameon=False)
    seeds = len(next(iter(curves.values())))
    figure.suptitle(f"Sorting digits, set A: mean of {seeds} seeds, bands ± 1 sd")
    figure.savefig(path, dpi=130)


def markdown(rows: list[dict[str, Any]]) -> str:
    def pm(value: tuple[float, float]) -> str:
        return f"{value[0]:.3f} ± {value[1]:.3f}"

    lines = [
        f"| method | final pass@1 | mean pass@1 over {AXES['steps']} | … over {AXES['tokens']} | … over {AXES['cpu']} "
        "| tokens (k) | CPU-s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {pm(row['final'])} | {pm(row['steps'])} | {pm(row['tokens'])} | {pm(row['cpu'])} "
            f"| {row['tokens_used'] / 1000:.0f} | {row['cpu_used']:.0f} |"
        )
    for other in [name for name in BASELINES if name in rows[-1]["versus"]]:
        lines += [
            "",
            f"Difference to {BASELINES[other]}, paired by seed (mean ± t interval, bootstrap interval):",
            "",
            "| method | steps | tokens | CPU-seconds |",
            "|---|---|---|---|",
        ]
        for row in rows:
            if other in row["versus"]:
                found = [row["versus"][other][axis] for axis in AXES]
                cells = [f"{mean:+.3f} ± {half:.3f} ({low:+.3f} to {high:+.3f})" for mean, half, low, high in found]
                lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def level(points: list[dict[str, float]], metric: str, tokens: float) -> float:
    """Mean over the last fifth of so many tokens, between measurements interpolated."""
    late = np.linspace((1 - LAST) * tokens, tokens, 21)
    return float(np.interp(late, [p["tokens"] for p in points], [p[metric] for p in points]).mean())


def rising(points: list[dict[str, float]]) -> Any:
    """
    The rising curve that is nearest to pass@1 (isotonic regression): with it, noise of single measurements doesn't
    decide where a target is reached.
    """
    return optimize.isotonic_regression([p["pass@1"] for p in points]).x


def reached(points: list[dict[str, float]], target: float, axis: str) -> float | None:
    """Where on an axis the [`rising`] curve reaches a target, or `None`."""
    ys, xs = rising(points), [p[axis] for p in points]
    above = np.flatnonzero(ys >= target)
    if not len(above):
        return None
    i = int(above[0])
    return float(np.interp(target, ys[i - 1 : i + 1], xs[i - 1 : i + 1])) if i else float(xs[0])


def target_table(curves: Curves, baseline: str) -> list[dict[str, Any]]:
    """
    A row a method: pass@1 and pass@8 at the end of the baseline's tokens, and how many tokens and CPU-seconds it takes
    to reach the baseline's pass@1 there, as a ratio to the baseline's own.

    The target of a seed is the baseline's [`level`], or where its [`rising`] curve ends if that is lower. Where a run
    doesn't reach it, what it took at least is counted: all that it had. Ratios are averaged as logarithms.
    """
    rows = []
    for method, seeds in curves.items():
        row: dict[str, Any] = {"method": method, "seeds": len(seeds)}
        ratios: dict[str, list[float]] = {"tokens": [], "cpu": []}
        row["missed"] = 0
        for seed, points in seeds.items():
            reference = curves[baseline][seed]
            target = min(level(reference, "pass@1", reference[-1]["tokens"]), float(rising(reference)[-1]))
            row["missed"] += reached(points, target, "tokens") is None
            for axis, values in ratios.items():
                needed, theirs = reached(points, target, axis), reached(reference, target, axis)
                # At 0 where nothing was learned
                values.append(math.log((needed or points[-1][axis]) / theirs) if theirs else math.nan)
        for axis, values in ratios.items():
            row[f"{axis}_ratio"] = mean_interval(values)
        for metric in ("pass@1", "pass@8"):
            levels = {seed: level(p, metric, curves[baseline][seed][-1]["tokens"]) for seed, p in seeds.items()}
            theirs_by_seed = {seed: level(p, metric, p[-1]["tokens"]) for seed, p in curves[baseline].items()}
            row[metric] = mean_interval(list(levels.values()))
            row[f"{metric}_start"] = float(np.mean([points[0][metric] for points in seeds.values()]))
            row[f"{metric}_difference"] = mean_interval([levels[seed] - theirs_by_seed[seed] for seed in seeds])
        last = [points[-1] for points in seeds.values()]
        row["tokens"], row["cpu"] = (float(np.mean([point[axis] for point in last])) for axis in ("tokens", "cpu"))
        row["prediction"] = share(last, "prediction_tokens", "tokens")
        # What a point took over is that of the last generation batch
        measured = [point for points in seeds.values() for point in points[1:]]
        row["live"] = share(measured, "groups_kept", "groups_generated")
        row["calibration_error"] = late_mean(seeds.values(), "calibration_error")
        row["explained_variance"] = late_mean(seeds.values(), "explained_variance")
        rows.append(row)
    return rows


def share(points: list[dict[str, float]], part: str, whole: str) -> float | None:
    return sum(p[part] for p in points) / sum(p[whole] for p in points) if all(part in p for p in points) else None


def late_mean(runs: Iterable[list[dict[str, float]]], name: str) -> float | None:
    """Mean of what was logged after the first quarter of each run."""
    found = [p[name] for points in runs for p in points if name in p and p["tokens"] >= points[-1]["tokens"] / 4]
    return float(np.mean(found)) if found else None


def target_markdown(rows: list[dict[str, Any]], baseline: str) -> str:
    def ratio(row: dict[str, Any], axis: str) -> str:
        mean, half = row[f"{axis}_ratio"]
        at_least = "≥ " if row["missed"] else ""
        return f"{at_least}{math.exp(mean):.2f} ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"

    def difference(row: dict[str, Any], metric: str) -> str:
        mean, half = row[f"{metric}_difference"]
        return f"{row[metric][0]:.3f} ({mean:+.3f} ± {half:.3f})"

    known = {
        "live groups": "live",
        "calibration error": "calibration_error",
        "tokens of predictions": "prediction",
        "explained variance": "explained_variance",
    }
    known = {title: key for title, key in known.items() if any(row[key] is not None for row in rows)}
    start = rows[0]
    titles = [
        "method",
        f"pass@1 (start: {start['pass@1_start']:.3f})",
        f"pass@8 (start: {start['pass@8_start']:.3f})",
        "tokens to target",
        "not reached",
        "CPU-s to target",
        *known,
        "tokens (k)",
        "CPU-s",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        if row["method"] == baseline:
            levels = [f"{row[metric][0]:.3f}" for metric in ("pass@1", "pass@8")]
            compared = ["1", "", "1"]
        else:
            levels = [difference(row, metric) for metric in ("pass@1", "pass@8")]
            compared = [ratio(row, "tokens"), f"{row['missed']} of {row['seeds']}", ratio(row, "cpu")]
        more = ["" if row[key] is None else f"{row[key]:.2f}" for key in known.values()]
        cells = [row["method"], *levels, *compared, *more, f"{row['tokens'] / 1000:.0f}", f"{row['cpu']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def style(method: str) -> dict[str, Any]:
    return {"color": COLOURS[method], "linestyle": "--" if "16 prompts" in method else "-"}


def plot_targets(found: dict[str, Curves], baseline: str, path: Path) -> None:
    """A row of pictures a data set: pass@1 and pass@8 over tokens, and the ratios of tokens to target."""
    import matplotlib.pyplot as plt

    size = (14, 3.6 * len(found) + 0.8)
    figure, rows = plt.subplots(len(found), 3, figsize=size, squeeze=False, layout="constrained")
    for panels, (title, curves) in zip(rows, found.items(), strict=True):
        if panels[2] is not rows[0][2]:
            panels[2].sharex(rows[0][2])
        end = min(points[-1]["tokens"] for points in curves[baseline].values())
        grid = np.linspace(0, end, 100)
        for panel, metric in zip(panels, ("pass@1", "pass@8"), strict=False):
            for method, seeds in curves.items():
                runs = seeds.values()
                ys = [np.interp(grid, [p["tokens"] for p in points], [p[metric] for p in points]) for points in runs]
                width = 2.5 if method == baseline else 1.5
                panel.plot(grid, np.mean(ys, axis=0), label=method, linewidth=width, **style(method))
            panel.set(xlabel="generated tokens", ylabel=f"{metric} on held-out prompts")
            panel.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
        panels[0].set_title(title, loc="left", fontweight="bold")
        table_rows = [row for row in target_table(curves, baseline) if row["method"] != baseline]
        for place, row in enumerate(reversed(table_rows)):
            mean, half = row["tokens_ratio"]
            low, high = math.exp(mean - half), math.exp(mean + half)
            panels[2].plot([low, high], [place, place], linewidth=2.5, **style(row["method"]))
            marker = ">" if row["missed"] else "o"
            panels[2].plot(math.exp(mean), place, marker, markersize=7, color=COLOURS[row["method"]])
        panels[2].axvline(1, color=COLOURS[baseline], linewidth=1)
        panels[2].set_yticks(range(len(table_rows)), [row["method"] for row in reversed(table_rows)])
        panels[2].set(xlabel=f"tokens to {baseline}'s final pass@1, ratio", ylim=(-0.6, len(table_rows) - 0.4))
        for panel in panels:
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    seeds = len(next(iter(next(iter(found.values())).values())))
    about = "ratios: geometric mean, 95 % interval; ▸ some runs did not reach the target"
    figure.suptitle(f"Means of {seeds} seeds; {about}", x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def write_report(script: str, study: str | None, text: str) -> None:
    """Put the table of a study, or of a script without studies, into its place in `RESULTS.md`."""
    results = ROOT / "benchmarks" / "RESULTS.md"
    name = script if study is None else f"{script} --study {study}"
    begin, end = (f"<!-- {slash}{name} -->" for slash in ("", "/"))
    before, _, rest = results.read_text(encoding="utf-8").partition(begin)
    results.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
