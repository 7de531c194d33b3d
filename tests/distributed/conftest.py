"""The matrix of methods and engines, as a table after its tests. `ENGINES_REPORT=1` writes it into a page, too."""

import os
from pathlib import Path
from typing import Any


PAGE = Path(__file__).parents[2] / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- make test-distributed -->", "<!-- /make test-distributed -->"
TOOK = "seconds"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    cells: dict[tuple[str, str], str] = {}
    reasons: dict[str, None] = {}
    took: dict[tuple[str, str], str] = {}
    for kind in ("passed", "failed"):
        for report in terminalreporter.getreports(kind):
            told = dict(report.user_properties) if report.when == "call" else {}
            if "cell" not in told:
                continue
            place = tuple(told["cell"])
            # A failed part of a cell is a report of its own, and the cell's comes with it
            if kind == "failed" or cells.get(place) != "FAILED":
                cells[place] = "FAILED" if kind == "failed" else told["outcome"]
            if "reason" in told:
                reasons[f"{place[0]}, {place[1]}: {told['reason']}"] = None
            took[place[0], TOOK] = f"{told['took']:.0f}"
    if not cells:
        return
    cells |= took
    engines = list(dict.fromkeys(engine for engine, _ in cells))
    rows = list(dict.fromkeys(row for _, row in cells))
    terminalreporter.section("distance to one process, as a share of what the steps moved")
    width = max(len(row) for row in rows)
    terminalreporter.write_line(" " * width + "".join(f"{engine:>17}" for engine in engines))
    for row in rows:
        told = "".join(f"{cells.get((engine, row), '-'):>17}" for engine in engines)
        terminalreporter.write_line(f"{row:<{width}}{told}")
    for reason in reasons:
        terminalreporter.write_line(f"refused: {reason}")
    if os.environ.get("ENGINES_REPORT"):
        lines = [f"| | {' | '.join(engines)} |", "|---" * (len(engines) + 1) + "|"]
        lines += [f"| {row} | {' | '.join(cells.get((name, row), '-') for name in engines)} |" for row in rows]
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        table = "\n".join(lines)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
