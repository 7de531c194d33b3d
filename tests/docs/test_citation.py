"""The citation file is YAML of its kind, and of the version that the package has."""

import tomllib
from pathlib import Path

import yaml


ROOT = Path(__file__).parents[2]


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert project["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
