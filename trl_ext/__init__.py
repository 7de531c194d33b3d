"""
An extension layer on Hugging Face TRL: trainers that subclass TRL's.

Whoever can use `trl.GRPOTrainer` can use it: change the import, keep the rest.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Imports torch and TRL with the first name that is used, so that `trl-ext --help` doesn't wait for them."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if (
        name.isidentifier() and find_spec(f"{__name__}.{name}") is not None
    ):  # `from trl_ext import errors`: Python imports it by itself
        raise AttributeError(f"module {__name__!r} has not imported {name!r} yet")
    public = import_module(".public", __name__)
    if name != "__all__" and name not in public.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(public, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
