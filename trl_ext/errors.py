"""
How bad input is refused: one clear error, early, that says what to change.
"""

from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """
    Something on a command line, or in a yaml file, that can't be used. The `trl-ext` command prints the message and
    no traceback.
    """


def require(condition: bool, message: str) -> None:
    """Raises `ValueError` with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raises `ValueError` unless the argument `name` has one of the values in `known`; `None` is not listed as one."""
    known = tuple(known)
    choices = ", ".join(repr(choice) for choice in known if choice is not None)
    require(value in known, f"{name}={value!r} is unknown. Choose one of {choices}.")
