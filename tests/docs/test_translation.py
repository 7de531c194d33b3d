"""README.zh.md says what README.md says: the same commands, code, links, pictures, numbers and headings."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
OTHER_LANGUAGE = re.compile(r"\[(?:English|中文)\]\(README[\w.]*\)\n*")


def found(pattern: str, text: str) -> list[str]:
    return re.findall(pattern, OTHER_LANGUAGE.sub("", text), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^```(?:shell|python)\n.*?^```$",  # code, comments included
        r"^  ?[\w.]+/?(?=  )|^\w+/(?=  )",  # the plan's files and folders
    ],
    ids=["code", "plan"],
)
def test_what_is_not_translated_is_the_same(pattern: str) -> None:
    english = found(pattern, ENGLISH)
    assert len(english) > 1
    assert found(pattern, CHINESE) == english


def test_commands_are_the_same() -> None:
    """Those in the text. The translation also says what those of the first block do."""
    english, chinese = (
        {" ".join(command.split()) for command in found(r"`(?:make|pip install|source|trl-ext) [^`]+`", text)}
        for text in (ENGLISH, CHINESE)
    )
    assert len(english) > 5
    assert chinese - english <= {"`make setup`", "`make quickstart`"}
    assert english <= chinese


def test_links_and_pictures_are_the_same() -> None:
    links = found(r"\]\(([^)]+)\)", ENGLISH)
    assert len(links) > 40
    assert sorted(found(r"\]\(([^)]+)\)", CHINESE)) == sorted(links)


def test_there_are_as_many_headings_and_rows() -> None:
    for pattern in (r"^#+ ", r"^\|", r"^> ", r"^!\["):
        assert len(found(pattern, CHINESE)) == len(found(pattern, ENGLISH))


def test_numbers_are_the_same() -> None:
    """Those with a fraction, and of versions."""
    assert sorted(found(r"\d+\.\d+", CHINESE)) == sorted(found(r"\d+\.\d+", ENGLISH))


def test_each_names_the_other() -> None:
    assert "](README.zh.md)" in ENGLISH and "](README.md)" in CHINESE
