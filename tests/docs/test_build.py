"""The documentation as pages: Sphinx has nothing to complain of, and every page is in the table of contents."""

import subprocess
import sys
from pathlib import Path

import yaml


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def table_of_contents() -> list[str]:
    parts = yaml.safe_load((DOCS / "_toctree.yml").read_text(encoding="utf-8"))
    return [entry["local"] for part in parts for entry in part["sections"]]


def test_every_page_is_in_the_table_of_contents_once() -> None:
    pages = [str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")]
    assert sorted(table_of_contents()) == sorted(pages)


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    """As `make docs` does. The pages that others link to are among them."""
    build = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-c", str(DOCS)]
    done = subprocess.run([*build, str(ROOT), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    for page in [*(f"docs/{local}" for local in table_of_contents()), "README", "benchmarks/RESULTS"]:
        assert (tmp_path / f"{page}.html").is_file(), page
    assert "methods/vapo.html" in (tmp_path / "docs/index.html").read_text(encoding="utf-8")
