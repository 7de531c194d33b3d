"""
An extension layer on Hugging Face TRL: trainers that subclass TRL's.

Whoever can use `trl.GRPOTrainer` can use it: change the import, keep the rest.
"""

from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any


FOLDER = str(Path(__file__).parent)

if TYPE_CHECKING:
    from .public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Imports torch and TRL with the first name that is used, so that `trl-ext --help` doesn't wait for them."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # `from trl_ext import errors` asks here before it imports a module of the package
    if PathFinder.find_spec(f"{__name__}.{name}", [FOLDER]) is not None:
        raise AttributeError(f"module {__name__!r} has not imported {name!r} yet")
    public = import_module(".public", __name__)
    if name != "__all__" and name not in public.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(public, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
