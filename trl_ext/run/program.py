"""
A recipe as a program: what its user got wrong ends it with one line on the standard error and exit status 2. `--debug`
brings the traceback back.
"""

import argparse
import functools
import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

from ..errors import UserError


DEBUG = "--debug"
STATUS = 2  # as argparse's
# Seconds for which the processes beside the first keep quiet. A launcher ends them when the first one has ended, which
# takes seconds where torch was imported, and more on a busy machine.
OTHERS_WAIT = 30.0

# What argparse and Python call the kinds of values
KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "list": "a list", "dict": "a mapping"}

P = ParamSpec("P")
R = TypeVar("R")


class Parser(argparse.ArgumentParser):
    """Reports what it can't read as a `UserError`: the usage of a recipe is hundreds of lines long."""

    def error(self, message: str) -> NoReturn:
        unread = re.match(r"argument (--\w+)\S*: invalid (\w+) value: (.*)", message)
        if unread is not None:
            argument, kind, value = unread.groups()
            message = f"{argument} is {value}, but takes {KINDS.get(kind, f'a {kind}')}."
        raise UserError(re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message))


def program(body: Callable[P, R]) -> Callable[P, R]:
    """
    Makes a function with the argument `argv` the whole of a program. Called with `argv`, it raises what it raises.
    Called without, it takes the arguments of the process, and a `UserError` ends the process.
    """
    signature = inspect.signature(body)

    @functools.wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs)
        if given.arguments.get("argv") is not None:
            return body(*args, **kwargs)
        given.arguments["argv"], debug = without_debug(sys.argv[1:])
        try:
            return body(*given.args, **given.kwargs)
        except UserError as error:
            if debug:
                raise
            end(error)

    return run


def without_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """
    The words of a command line without a `--debug` of ours, and whether there was one. Followed by a value it is the
    argument of transformers.
    """
    ours = [word == DEBUG and (i + 1 == len(words) or words[i + 1].startswith("--")) for i, word in enumerate(words)]
    return [word for word, is_ours in zip(words, ours, strict=True) if not is_ours], any(ours)


@contextmanager
def preparing() -> Iterator[None]:
    """
    Within this context, before anything is trained, an error that says what is wrong with a value is the user's. Later
    ones keep their traceback, as does whatever else goes wrong.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, TypeError) and not _raised_on_purpose(error):
            raise
        raise UserError(str(error)) from error


def _raised_on_purpose(error: Exception) -> bool:
    """Whether a statement raised it, which has a message for its reader, and not an operation that can't be done."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (last.line or "").startswith("raise")


def say(error: UserError, name: str) -> None:
    """Prints an error on one line."""
    hint = "" if error.__cause__ is None else f" ({DEBUG} shows the traceback)"
    print(f"{name}: error: {' '.join(str(error).split())}{hint}", file=sys.stderr, flush=True)


def end(error: UserError) -> NoReturn:
    """Ends the process with one line. Of several processes the first speaks, unless it has none of the trouble."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHERS_WAIT)
    say(error, Path(sys.argv[0]).name)
    sys.exit(STATUS)
