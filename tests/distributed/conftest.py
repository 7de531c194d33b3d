"""The matrix of methods and engines, as a table after its tests."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    cells: dict[tuple[str, str], str] = {}
    reasons: dict[str, None] = {}
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
    if not cells:
        return
    engines = list(dict.fromkeys(engine for engine, _ in cells))
    terminalreporter.section("distance to one process, as a share of what the steps moved")
    width = max(len(row) for _, row in cells)
    terminalreporter.write_line(" " * width + "".join(f"{engine:>17}" for engine in engines))
    for row in dict.fromkeys(row for _, row in cells):
        told = "".join(f"{cells.get((engine, row), '-'):>17}" for engine in engines)
        terminalreporter.write_line(f"{row:<{width}}{told}")
    for reason in reasons:
        terminalreporter.write_line(f"refused: {reason}")
