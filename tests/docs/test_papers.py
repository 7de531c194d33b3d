"""The paper index has every paper that the code cites, beside a file that cites it and configurations that exist."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs" / "papers.md"
PAPER = re.compile(r"\b\d{4}\.\d{5}\b")  # as arXiv and the Hub number them
ROWS = [row for row in INDEX.read_text(encoding="utf-8").splitlines() if row.startswith("| [")]


def test_every_paper_that_the_code_cites_is_in_the_index() -> None:
    sources = [*(ROOT / "trl_ext").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    cited = {paper for file in sources for paper in PAPER.findall(file.read_text(encoding="utf-8"))}
    assert len(cited) > 20
    assert cited <= set(PAPER.findall(INDEX.read_text(encoding="utf-8")))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("]")[0].removeprefix("| ["))
def test_the_file_of_a_row_cites_its_papers(row: str) -> None:
    (file,) = re.findall(r"\((\S+\.py)\) \|$", row)
    assert set(PAPER.findall(row)) <= set(PAPER.findall((INDEX.parent / file).read_text(encoding="utf-8")))
