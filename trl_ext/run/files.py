"""
Where recipes lie, and where the files lie that a command line or a yaml file names.

Nothing here imports torch: `trl-ext recipes` answers at once.
"""

from pathlib import Path

from ..errors import UserError


RECIPES = "recipes"  # how yaml files and command lines name the folder


def recipes_folder() -> Path:
    """The folder of the recipes: inside the package in a wheel, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / RECIPES
    return inside if inside.is_dir() else package.parent / RECIPES


def places(path: str | Path, beside: Path | None = None) -> list[Path]:
    """
    Where a file may be that a command line or a yaml file names, in the order in which these places are tried.

    Args:
        path (`str` or `Path`):
            As it is named. An absolute path has one place.
        beside (`Path`, *optional*):
            Folder of the yaml file that names it.

    Returns:
        `list[Path]`: the path from the working directory; from `beside`; and, for `recipes/...`, in the folder of the
        recipes, wherever that is installed.
    """
    path = Path(path)
    if path.is_absolute():
        return [path]
    found = [path]
    if beside is not None:
        found.append(beside / path)
    if path.parts[:1] == (RECIPES,):
        found.append(recipes_folder().joinpath(*path.parts[1:]))
    return found


def find_file(path: str | Path, named_by: str, beside: Path | None = None) -> Path:
    """
    The first of [`places`] where the file exists.

    Args:
        path (`str` or `Path`):
            As it is named.
        named_by (`str`):
            What names it, for the error message, such as `"--prepare_row is 'tasks/mine.py:row'"`.
        beside (`Path`, *optional*):
            Folder of the yaml file that names it.

    Raises:
        UserError: if none of the places has it; the message lists them.
    """
    tried = places(path, beside)
    found = next((place for place in tried if place.is_file()), None)
    if found is None:
        looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in tried))
        raise UserError(f"{named_by}, but there is no file '{path}'. Looked for {looked}.")
    return found
