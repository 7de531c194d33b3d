"""
How a recipe's command line and yaml file become values: TRL's parser, with errors that say which argument to change.
"""

import difflib
import inspect
import types
from argparse import Action
from collections.abc import Sequence
from dataclasses import Field, fields
from enum import EnumType
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ..errors import UserError
from .catalogue import find_config
from .program import KINDS, Parser


CONFIG = "--config"
PLAIN = {str, int, float, bool, list, dict, type(None)}  # kinds of values that YAML has


class RecipeParser(Parser, TrlParser):
    """
    TRL's parser. It refuses what it doesn't know with the nearest name, and checks the values of a yaml file, which
    TRL takes as they come. One value is a list of one where a list is meant. Its help begins with what is not TRL's.
    """

    actions_by_name: dict[str, list[Action]]

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        action = super().add_argument(*args, **kwargs)
        self.__dict__.setdefault("actions_by_name", {})  # argparse's constructor adds --help
        self.actions_by_name.setdefault(action.dest, []).append(action)  # a switch that is on has a second, --no_...
        return action

    def format_help(self) -> str:
        """The recipe's own arguments, those of its method, and after them TRL's and transformers'."""
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage("%(prog)s [--config FILE] [--name value ...] [--debug]", [], [], "usage: ")
        formatter.add_text(
            f"{CONFIG} names a yaml file with the same arguments; the command line wins. --debug, at the end, shows "
            "tracebacks. docs/arguments.md has all arguments in one table."
        )
        for title, names in in_sections([*self.dataclass_types]).items():
            formatter.start_section(title)
            formatter.add_arguments([action for name in names for action in self.actions_by_name[name]])
            formatter.end_section()
        return formatter.format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            if not word.startswith("--"):
                raise UserError(f"'{word}' belongs to no argument. Arguments are written as --name value.")
            raise UserError(f"{word} is no argument of this recipe.{nearest(word, [*self._arguments()])}")
        return found, unknown

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Takes over the values of a yaml file, as the method that it extends."""
        known = self._arguments()
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in values.items():
            if name not in known:
                raise UserError(f"'{name}' in the yaml file is no argument of this recipe.{nearest(name, [*known])}")
            values[name] = as_meant(name, value, hints[name], known[name].metadata.get("choices", ()))
        return super().set_defaults_with_config(**values)

    def _arguments(self) -> dict[str, Field[Any]]:
        return {field.name: field for kind in self.dataclass_types for field in fields(kind) if field.init}


def in_sections(kinds: Sequence[type]) -> dict[str, list[str]]:
    """
    The names of arguments under the headings of a help: first the recipe's, then those of each class of `trl_ext`,
    the method's own before those that it inherits, then TRL's and transformers'.

    Args:
        kinds (`Sequence[type]`):
            Dataclasses with the arguments. An argument belongs to the class that gave it its default.
    """
    found: dict[str, list[str]] = {"this recipe": []}
    last: dict[str, list[str]] = {"TRL": [], "transformers": []}
    for kind in kinds:
        names = [field.name for field in fields(kind) if field.init]
        for parent in kind.__mro__:
            module = parent.__module__
            own = [name for name in names if name in inspect.get_annotations(parent)]
            names = [name for name in names if name not in own]
            if module.startswith(f"{__package__}."):
                found["this recipe"] += own
            elif module.startswith("trl_ext."):
                found.setdefault(f"{parent.__name__} of trl_ext", []).extend(own)
            else:
                last["TRL" if module.startswith("trl.") else "transformers"] += own
    return {title: own for title, own in (found | last).items() if own}


def nearest(word: str, names: Sequence[str]) -> str:
    """A question after the name that a mistyped `word` may have meant, or where all are listed."""
    word = word.lstrip("-").replace("-", "_").lower()
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.75) or [name for name in names if word in name][:3]
    return f" Did you mean {' or '.join(f'--{name}' for name in found)}?" if found else " `--help` lists them."


def as_meant(name: str, value: Any, hint: Any, choices: Sequence[str] = (), in_list: bool = False) -> Any:
    """
    A value of a yaml file as the argument that it is for.

    Args:
        name (`str`):
            Name of the argument, for error messages.
        value (`Any`):
            What YAML makes of the text. Texts are left to the parser, which reads them like those of a command line.
        hint (`Any`):
            The argument's type.
        choices (`Sequence[str]`, *optional*):
            Allowed values; none: any.
        in_list (`bool`, *optional*, defaults to `False`):
            Whether it is an element of a list, which the parser doesn't read.

    Raises:
        UserError: if it is of a kind that the argument doesn't take, or none of its choices.
    """
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_origin(member) or member for member in members]
    if value is None:
        return value
    enums: list[Any] = [kind for kind in kinds if isinstance(kind, EnumType)]
    choices = [*choices, *(choice.value for enum in enums for choice in enum)]
    if choices:
        value = "no" if value is False and "no" in choices else value  # what YAML makes of an unquoted no
        if str(value) not in choices:
            raise UserError(f"--{name} is {value!r} in the yaml file. Choose one of {', '.join(choices)}.")
        return value
    if not set(kinds) <= PLAIN:
        return value
    if list in kinds and not isinstance(value, list) and str not in kinds:
        value = [value]
    if list in kinds and isinstance(value, list):
        (element,) = get_args(members[kinds.index(list)]) or (Any,)
        return [as_meant(name, part, element, in_list=True) for part in value]
    if type(value) in kinds or (isinstance(value, str) and not in_list):
        return value
    for kind in kinds:
        if (found := _converted(value, kind)) is not None:
            return found
    said = " or ".join(KINDS.get(kind.__name__, "text") for kind in kinds if kind is not type(None))
    raise UserError(f"--{name} is {value!r} in the yaml file, but takes {said}.")


def _converted(value: Any, kind: type) -> Any:
    """A value as one of another kind where both mean the same; `None` where they don't."""
    if kind is str and isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return kind(value) if float(value) == kind(value) else None
        except (ValueError, OverflowError):
            return None
    return None


def words_of(argv: Sequence[str]) -> list[str]:
    """The words of a command line, with `--config=FILE` as the two words that TRL looks for."""
    parts = [word.split("=", 1) if word.startswith(f"{CONFIG}=") else [word] for word in argv]
    return [word for part in parts for word in part]


def config_file(argv: Sequence[str]) -> Path | None:
    """
    The yaml file that a command line names, by its path or by its name among those that are installed, or `None`.

    Raises:
        UserError: if there is no such file.
    """
    words = words_of(argv)
    if CONFIG not in words:
        return None
    name = "".join(words[words.index(CONFIG) + 1 :][:1])
    if not name or name.startswith("--"):
        raise UserError(f"{CONFIG} is followed by no file. Name a yaml file.")
    return find_config(name, "configs", CONFIG)


def read_config(file: Path | None) -> dict[str, Any]:
    """
    What a yaml file says; empty without a file.

    Raises:
        UserError: if it isn't YAML, or no mapping of arguments to values.
    """
    if file is None:
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{CONFIG} is '{file}', which is no YAML: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{CONFIG} is '{file}', which has no arguments in it. Write one a line, as `name: value`.")
    return found
