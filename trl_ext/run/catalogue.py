"""
The installed recipes: what each is for, which configurations it has, and how they are copied to be changed.

What is known of a recipe is read from its file without importing it: the phrase is the first sentence of its
docstring, its configurations are those that the docstring names. Nothing here imports torch.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .files import RECIPES, recipes_folder


_CONFIG = re.compile(rf"{RECIPES}/configs/([\w.-]+\.yaml)")
_FUNCTION_FILE = re.compile(rf"{RECIPES}/([\w./-]+\.py):")  # file.py:function, in a yaml file
_LINK = re.compile(r" \(https?://[^()]*\)|https?://[^\s,()]+, ")


@dataclass(frozen=True)
class Recipe:
    """
    A script that trains something, or makes what others train on.

    Args:
        name (`str`):
            Of the file, without `.py`.
        file (`Path`):
            The script.
        phrase (`str`):
            What it does.
        configs (`tuple[str, ...]`):
            File names of its configurations, in the folder `configs` of the recipes.
    """

    name: str
    file: Path
    phrase: str
    configs: tuple[str, ...]

    @classmethod
    def read(cls, file: Path) -> "Recipe":
        """Reads the docstring of a script."""
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        paragraph = " ".join(text.split("\n\n")[0].split())
        sentence = re.split(r"\.(?= |$)", _LINK.sub("", paragraph))[0]
        return cls(file.stem, file, sentence, tuple(dict.fromkeys(_CONFIG.findall(text))))


def list_recipes() -> list[Recipe]:
    """Every recipe that is installed, by name, and after them the tasks that make their own data."""
    folder = recipes_folder()
    tasks = [file for file in sorted(folder.glob("tasks/*.py")) if "__main__" in file.read_text(encoding="utf-8")]
    return [Recipe.read(file) for file in [*sorted(folder.glob("*.py")), *tasks]]


def find_recipe(name: str) -> Recipe:
    """
    A recipe by its name, or by the path of a script.

    Raises:
        UserError: if there is none; the message lists those that are installed.
    """
    if name.endswith(".py") and Path(name).is_file():
        return Recipe.read(Path(name))
    installed = list_recipes()
    found = next((recipe for recipe in installed if recipe.name == name), None)
    if found is None:
        names = ", ".join(recipe.name for recipe in installed)
        raise UserError(f"there is no recipe '{name}'. Choose one of {names}, or name a file.")
    return found


def find_config(name: str, folder: str, argument: str) -> Path:
    """
    A yaml file by its path, or, if there is none, by its name among those that are installed.

    Args:
        name (`str`):
            Path, or name with or without `.yaml`.
        folder (`str`):
            Folder of the recipes where named ones are: `"configs"` or `"accelerate"`.
        argument (`str`):
            The argument that names it, for the error message.

    Raises:
        UserError: if there is no such file; the message lists those that are installed.
    """
    if Path(name).is_file():
        return Path(name)
    installed = sorted((recipes_folder() / folder).glob("*.yaml"))
    found = next((file for file in installed if name in (file.name, file.stem)), None)
    if found is None:
        names = ", ".join(file.name for file in installed)
        raise UserError(f"{argument} is '{name}', which is no file in '{Path.cwd()}', nor one of {names}.")
    return found


def copy_recipe(recipe: Recipe, folder: Path) -> list[Path]:
    """
    Copies a recipe, its configurations, and the files that these take functions from. The copies name each other, and
    work wherever the folder goes.

    Args:
        recipe ([`Recipe`]):
            An installed one.
        folder (`Path`):
            Destination. It is made if it doesn't exist.

    Returns:
        `list[Path]`: the copies, the script first.

    Raises:
        UserError: if one of the files exists, or `folder` is a file. Nothing is copied then.
    """
    if folder.is_file():
        raise UserError(f"'{folder}' is a file. Name a folder.")
    source = recipes_folder()
    texts = {folder / recipe.file.name: _in_folder(recipe.file.read_text(encoding="utf-8"), recipe, folder)}
    for name in recipe.configs:
        text = (source / "configs" / name).read_text(encoding="utf-8")
        for path in _FUNCTION_FILE.findall(text):
            texts[folder / path] = (source / path).read_text(encoding="utf-8")
        # Relative to the yaml file
        texts[folder / name] = _FUNCTION_FILE.sub(r"\1:", text)
    there = [str(path) for path in texts if path.exists()]
    if there:
        raise UserError(f"{', '.join(there)} would be overwritten. Name a new folder, or remove them.")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _in_folder(text: str, recipe: Recipe, folder: Path) -> str:
    """The script, with commands in its docstring that start the copies."""
    text = _CONFIG.sub(lambda match: (folder / match[1]).as_posix(), text)
    return text.replace(f"{RECIPES}/{recipe.file.name}", (folder / recipe.file.name).as_posix())
