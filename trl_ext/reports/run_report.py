"""
`trl-ext report`: one or several runs side by side in one HTML file, which needs no network and runs no code.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.held_out_texts import Change, changes
from ..monitors.progress import count
from .curves import plot_curves
from .health_words import findings
from .html import element, escaped, page, paragraph, picture, side_by_side, table
from .run_files import PLACES, Run, read_run
from .summary import held_out_cell, machine_in_words


REPORT = "report.html"
MOST_SHOWN = 5  # completions that improved, and that got worse
LONGEST_SETTING = 200  # characters


def write_report(folders: Sequence[str | Path], file: str | Path | None = None) -> Path:
    """
    Writes the report of one or several runs: settings (of several runs those that differ), held-out results with
    their intervals, curves, health checks in words, and completions that improved and that got worse.

    Args:
        folders (`Sequence[str]`):
            Output folders of recipes or trainers. Runs that are under way are read from their newest checkpoints.
        file (`str` or `Path`, *optional*):
            Where the page goes. `None`: `report.html`, in the folder of a single run or else in the working directory.

    Returns:
        `Path`: the file.

    Raises:
        UserError: if a folder has no run, the file can't be written, or there is no folder.
    """
    if not folders:
        raise UserError("Name one or several output folders of runs, such as runs/dapo.")
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    file = Path(file) if file is not None else (runs[0].folder if len(runs) == 1 else Path()) / REPORT
    text = render(runs)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"The report can't be written to '{file}': {error}.") from error
    return file


def render(runs: Sequence[Run]) -> str:
    """The page for runs that were read."""
    title = f"Report of {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs side by side"
    parts = [
        *("<h2>What was run</h2>", _what(runs)),
        *_results(runs),
        *("<h2>Curves</h2>", picture(plot_curves(runs), f"curves of {', '.join(run.name for run in runs)}")),
        paragraph("Thin lines are what was logged, thick ones moving averages; steps are optimizer steps.", "note"),
        *_stages(runs),
        *("<h2>Health checks</h2>", *_health(runs)),
        *_settings(runs),
        *("<h2>Completions</h2>", *(part for run in runs for part in _completions(run, len(runs) > 1))),
    ]
    return page(title, parts)


def _names(folders: Sequence[str | Path]) -> list[str]:
    """The last parts of the paths; as much more of them as tells the runs apart."""
    short = [Path(folder).resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def _what(runs: Sequence[Run]) -> str:
    rows: dict[str, list[Any]] = {
        "method": [run.summary.get("method") for run in runs],
        "model": [run.summary.get("model") or run.settings.get("model_name_or_path") for run in runs],
        "data": [run.summary.get("dataset") or run.settings.get("dataset_name") for run in runs],
        "optimizer steps": [_steps(run) for run in runs],
        "tokens generated": [_count(run.summary.get("generated_tokens")) for run in runs],
        "tokens trained on": [_count(run.summary.get("trained_tokens")) for run in runs],
        "wall-clock seconds": [run.summary.get("seconds") for run in runs],
        "machine": [(made_on := run.summary.get("machine")) and machine_in_words(made_on) for run in runs],
        "seed": [run.summary.get("seed", run.settings.get("seed")) for run in runs],
        "versions": [", ".join(f"{k} {v}" for k, v in run.summary.get("versions", {}).items()) for run in runs],
        "command": [run.summary.get("command") for run in runs],
    }
    known = ((name, cells) for name, cells in rows.items() if any(cell not in (None, "") for cell in cells))
    return table(["", *(run.name for run in runs)], [[name, *map(_cell, cells)] for name, cells in known])


def _steps(run: Run) -> str:
    done, planned = (sum(getattr(stage, name) for stage in run.stages) for name in ("steps", "max_steps"))
    under_way = "" if run.summary else ", not finished, or not run by a recipe"
    return f"{done} of {planned}{under_way}"


def _count(number: float | None) -> str | None:
    return None if number is None else count(number)


def _cell(value: Any) -> str:
    return "–" if value in (None, "") else str(value)


def _results(runs: Sequence[Run]) -> list[str]:
    rows = []
    for run in runs:
        parts = [run.summary.get(name) or {} for name in ("before", "after", "gain")]
        for metric in parts[1].get("intervals", ()):
            on = f"{parts[1]['prompts']} prompts, {parts[1]['samples']} samples"
            rows.append([run.name, metric, *(held_out_cell(part, metric) for part in parts), on])
    if not rows:
        return []
    header = ["run", "metric", "before", "after", "gain", "measured on"]
    note = "95 % intervals that take the prompt as the unit. They don't cover what another seed would have given."
    return ["<h2>Held-out results</h2>", table(header, rows), paragraph(note, "note")]


def _stages(runs: Sequence[Run]) -> list[str]:
    parts = []
    for run in (run for run in runs if run.summary.get("stages")):
        stages = run.summary["stages"]
        metrics = list(stages[-1]["intervals"])
        header = ["stage", *metrics, "optimizer steps", "tokens generated", "seconds"]
        rows = [
            [
                stage["name"],
                *(held_out_cell(stage, metric) for metric in metrics),
                *(stage["steps"], count(stage["generated_tokens"]), f"{stage['seconds']:.0f}"),
            ]
            for stage in stages
        ]
        parts += [f"<h2>Stages{escaped(_of(run, runs))}</h2>", table(header, rows)]
    return parts


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f" of {run.name}" if len(runs) > 1 else ""


def _health(runs: Sequence[Run]) -> list[str]:
    parts = []
    for run in runs:
        rows = []
        for finding in findings(run):
            if finding.value is not None:
                place = f" ({finding.stage})" if finding.stage else ""
                mark = "alarm" if finding.lasts else "passed" if finding.episodes else "healthy"
                rows.append([f"{finding.check.replace('_', ' ')}{place}", mark, finding.words])
        parts += [element("h3", escaped(run.name))] if len(runs) > 1 else []
        parts.append(table([], rows) if rows else paragraph("No check's quantity was logged."))
    return parts


def _settings(runs: Sequence[Run]) -> list[str]:
    known = [run for run in runs if run.settings]
    if not known:
        return ["<h2>Settings</h2>", paragraph("No recipe wrote down its settings.", "note")]
    if len(runs) == 1:
        rows = [[name, _setting(runs[0].settings.get(name))] for name in runs[0].chosen if name not in PLACES]
        chosen = table(["setting", "value"], rows) if rows else paragraph("All settings are the defaults.")
        return ["<h2>Settings that were chosen</h2>", chosen]
    names = sorted({name for run in known for name in run.settings} - set(PLACES))
    rows = []
    for name in names:
        values = [_setting(run.settings.get(name)) if run.settings else "not known" for run in runs]
        if len({value for value, run in zip(values, runs, strict=True) if run.settings}) > 1:
            rows.append([name, *values])
    differ = table(["setting", *(run.name for run in runs)], rows) if rows else paragraph("None differ.")
    return ["<h2>Settings that differ</h2>", differ]


def _setting(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST_SETTING else text[:LONGEST_SETTING] + "…"


def _completions(run: Run, several: bool) -> list[str]:
    parts = [element("h3", escaped(run.name))] if several else []
    metric = run.metric
    found = changes(run.before, run.after, metric) if metric is not None else []
    if not found:
        return [*parts, paragraph("No held-out completions of before and after training were kept.", "note")]
    better, worse = [c for c in found if c.gain > 0], [c for c in found if c.gain < 0]
    same = len(found) - len(better) - len(worse)
    samples = len(run.after[0].completions)
    counted = f"rose on {len(better)}, fell on {len(worse)} and stayed on {same}"
    parts += [
        paragraph(f"Of {len(found)} held-out prompts, the mean {metric} of {samples} completion(s) {counted}."),
        paragraph(f"Shown is, for each policy, the completion whose {metric} is nearest to the mean.", "note"),
    ]
    for title, kind, chosen in (
        ("Improved most", "good", better[:MOST_SHOWN]),
        ("Got worse", "bad", worse[::-1][:MOST_SHOWN]),
    ):
        if chosen:
            parts += [element("h3", title, kind), *(_change(change, str(metric)) for change in chosen)]
    return parts


def _change(change: Change, metric: str) -> str:
    def told(name: str, text: str, reward: float) -> str:
        return element("b", escaped(f"{name}: {metric} {reward:.3g}")) + element("pre", escaped(text) or "(nothing)")

    before, after = (
        told("before", change.before, change.reward_before),
        told("after", change.after, change.reward_after),
    )
    return side_by_side(element("pre", escaped(change.prompt)), before, after)
