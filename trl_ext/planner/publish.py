"""
`python -m trl_ext.planner.publish`, from the root of the repository, writes what the repository publishes of plans:
the files of `recipes/accelerate` and `recipes/deepspeed`, and the tables of `docs/launching.md`. A program, which no
room imports.
"""

import argparse
import re
from pathlib import Path

from ..errors import require
from .layout_files import FILES, accelerate_file, deepspeed_files
from .tables import TABLES


DOCS = Path("docs/launching.md")


def table_in(text: str, name: str, table: str | None = None) -> tuple[str, str]:
    """
    A table between its markers in a page.

    Args:
        text (`str`):
            The page.
        name (`str`):
            One of [`~trl_ext.planner.tables.TABLES`].
        table (`str`, *optional*):
            What takes its place.

    Returns:
        `tuple[str, str]`: what is there, and the page with the new one.
    """
    found = re.search(rf"(<!-- {name} -->\n)(.*?)\n?(<!-- end of {name} -->)", text, re.DOTALL)
    require(found is not None, f"{DOCS} has no markers for the table '{name}'.")
    assert found is not None
    return found[2], text[: found.end(1)] + (table or found[2]) + "\n" + text[found.start(3) :]


def texts(root: Path) -> dict[Path, str]:
    """What the files are to be, by their paths from the root."""
    found = {Path(f"recipes/accelerate/{name}.yaml"): accelerate_file(name) for name in FILES}
    found |= {Path(f"recipes/deepspeed/{name}.json"): text for name, text in deepspeed_files().items()}
    page = (root / DOCS).read_text(encoding="utf-8")
    for name, table in TABLES.items():
        page = table_in(page, name, table())[1]
    return found | {DOCS: page}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=Path(), help="of the repository (default: here)")
    root = parser.parse_args().root
    require((root / DOCS).is_file(), f"'{root}' has no {DOCS}: name the root of the repository.")
    for path, text in texts(root).items():
        file = root / path
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(f"Written: {path}")


if __name__ == "__main__":
    main()
