"""The rungs of the benchmark ladder: each commit has that date, and its file those numbers."""

import re
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
LADDER = (ROOT / "docs" / "ladder.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\| 2.*\|$", LADDER, re.MULTILINE)
]


def git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def test_the_ladder_has_rungs() -> None:
    assert len(ROWS) > 20
    assert all(len(row) == 5 and re.search(r"\d", row[3]) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[1].strip('`')} {row[2][:30]}")
def test_a_rung_is_what_the_file_said_at_that_commit(row: list[str]) -> None:
    date, commit, _, numbers, file = row
    commit, file = commit.strip("`"), file.strip("`")
    dated = git("show", "--no-patch", "--format=%ad", "--date=short", commit)
    if dated is None:
        pytest.skip("the history isn't here")
    text = git("show", f"{commit}:{file}")
    assert (dated.strip(), text is None) == (date, False)
    assert text is not None
    assert [number for number in re.findall(r"\d+\.\d+", numbers) if number not in text] == []
