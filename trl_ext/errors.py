"""
How bad input is refused: one clear error, early, that says what to change.
"""

import difflib
import reprlib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


class UserError(ValueError):
    """
    Something on a command line, or in a yaml file, that can't be used. The `trl-ext` command prints the message and
    no traceback.
    """


_SHORT = reprlib.Repr()  # Python 3.11 takes no arguments here
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist = 80, 80, 4


def shown(value: Any) -> str:
    """A value as an error message shows it: plain values as they are written, short, and other objects by type."""
    kind = type(value).__name__
    if value is None or isinstance(value, bool | int | float | str):
        return _SHORT.repr(value)
    if isinstance(value, list | tuple | dict | set):
        return f"{_SHORT.repr(value)} (a {kind})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def require(condition: bool, message: str) -> None:
    """Raises `ValueError` with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raises `ValueError` unless the argument `name` has one of the values in `known`; `None` is not listed as one."""
    known = tuple(known)
    choices = ", ".join(repr(choice) for choice in known if choice is not None)
    require(value in known, f"{name}={value!r} is unknown. Choose one of {choices}.")


def require_type(name: str, value: Any, kind: Any, remedy: str) -> None:
    """Raises `TypeError` unless the argument `name` is an instance of `kind`. `remedy` is a sentence: what to pass."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {shown(value)}. {remedy}")


def require_number(name: str, value: Any) -> None:
    """Raises `TypeError` unless the argument `name` is a number."""
    require_type(name, None if isinstance(value, bool) else value, Real, "Pass a number.")


def require_count(name: str, value: Any, least: int = 1) -> None:
    """Raises an error unless the argument `name` is a whole number of at least `least`."""
    require_type(name, None if isinstance(value, bool) else value, Integral, "Pass a whole number.")
    require(value >= least, f"{name}={value} must be at least {least}.")


def meant(value: Any, known: Iterable[Any]) -> str:
    """` Did you mean 'x'?` if the name `value` is nearly one of `known`, else nothing."""
    names = [name for name in known if isinstance(name, str)]
    near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""
