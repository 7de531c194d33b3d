"""
What every refusal has to be: an error of this package's own, of the type that Python has for wrong input, whose
message names the argument, shows what was given, and says what to change.
"""

import re
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl_ext


PACKAGE = str(Path(trl_ext.__file__).parent)
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
SITE_PACKAGES = sysconfig.get_paths()["purelib"]
# How a sentence begins that says what to do, and how one states what is allowed
REMEDY = re.compile(
    r"(^|[.,:;!?] |, or )(Add|Bring|Build|Call|Change|Choose|Convert|Did you mean|Drop|Fill|Give|Install|Leave|Load|"
    r"Lower|Name|Pass|Put|Raise|Remove|Rename|Set|Train|Use|Write|choose|leave|load|pass|read|set|write)\b|"
    r"must (be|ascend|lie|not)\b"
)


def raised_by(error: BaseException) -> str:
    """The file whose code raised an error, or called the function of Python's that did."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    of_python = [f.startswith("<") or (f.startswith(STANDARD_LIBRARY) and SITE_PACKAGES not in f) for f in files]
    return [file for file, skipped in zip(files, of_python, strict=True) if not skipped][-1]


def check(call: Callable[[], Any], parts: list[str]) -> None:
    """Makes a call that must be refused, with a message that has these parts."""
    message = refusal(call)
    assert all(part in message for part in parts), message


def refusal(call: Callable[[], Any]) -> str:
    """Makes a call that must be refused, checks how it is, and returns the message."""
    try:
        call()
    except (ValueError, TypeError) as error:
        message, where = str(error), raised_by(error)
    else:
        raise AssertionError("nothing was refused")
    assert where.startswith(PACKAGE), f"raised in {where}: {message}"
    assert REMEDY.search(message), f"no remedy: {message}"
    assert len(message) < 600, message
    return message
