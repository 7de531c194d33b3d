"""
Checks of the types of a configuration's values. Python's dataclasses don't look at them, and a number in quotes, as
yaml files and environment variables give it, would fail far from its name, or, as `"False"`, count as true.
"""

import inspect
import types
import typing
from dataclasses import fields
from typing import Any

from ..errors import shown


# Settings that TRL takes both as a list and as a single value
ALSO_SINGLE = ("loss_type",)


def check_types(config: Any) -> None:
    """
    Raises `TypeError` for text where a dataclass wants a number or a truth value, and for a single value where it
    wants a list.
    """
    annotations: dict[str, Any] = {}  # not the fields' `type`, which transformers' argument parser changes
    for part in reversed(type(config).__mro__):
        annotations |= inspect.get_annotations(part)
    for f in fields(config):
        value = getattr(config, f.name)
        kinds = _kinds(annotations[f.name])
        if isinstance(value, str) and kinds and kinds <= {int, float, bool}:
            wanted = "True or False" if kinds == {bool} else "a number"
            raise TypeError(f"{f.name}={shown(value)} is text. Write {wanted}, without quotes.")
        if kinds == {list} and isinstance(value, str | int | float) and f.name not in ALSO_SINGLE:
            raise TypeError(f"{f.name}={shown(value)} is a single value. Write a list: {f.name}=[{shown(value)}].")


def _kinds(annotation: Any) -> set[Any]:
    """The types in an annotation, without `None` and without what lists hold."""
    parts = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = list(typing.get_args(annotation))
    return {typing.get_origin(part) or part for part in parts} - {type(None)}
