"""
How Sphinx builds these pages (`make docs`); `CONTRIBUTING.md` says why it is Sphinx.

Its source folder is the root of the repository, because pages link to the README, to results and to model cards, which
then are pages, too. The table of contents is `_toctree.yml`, in the form of Hugging Face's own documentation, and no
directive in a page, so that pages read as well on GitHub.
"""

from pathlib import Path
from typing import Any

import yaml


INDEX = "docs/index"

project = "trl_ext"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = INDEX
include_patterns = ["*.md", "docs/**.md", "benchmarks/*.md", "model_cards/**.md"]
exclude_patterns = [".*", "build", "dist", "recipes", "runs", "tests", "trl_ext*"]
suppress_warnings = ["toc.not_included"]  # of what is outside of docs/; a test compares `_toctree.yml` with docs/
html_theme = "furo"
html_title = project
html_show_copyright = False
myst_heading_anchors = 4  # links to headings, as GitHub names them


def setup(app: Any) -> None:
    app.connect("source-read", add_table_of_contents)


def add_table_of_contents(app: Any, page: str, source: list[str]) -> None:
    """Appends the table of contents to the index, hidden: it is what the sidebar shows."""
    if page != INDEX:
        return
    for part in yaml.safe_load((Path(__file__).parent / "_toctree.yml").read_text(encoding="utf-8")):
        lines = [
            f"{entry['title']} </docs/{entry['local']}>" for entry in part["sections"] if entry["local"] != "index"
        ]
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {part['title']}", "", *lines, "```", ""])
