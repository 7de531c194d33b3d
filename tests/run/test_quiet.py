"""What recipes leave out of the screen, and that the library doesn't."""

import ast
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import trl_ext
from trl_ext.run import quiet


@pytest.fixture
def logged(monkeypatch, caplog):
    """What the packages' loggers say after `be_quiet`, which is undone."""
    names = {message.logger for message in quiet.LEFT_OUT} - {""}
    before = {name: list(logging.getLogger(name).filters) for name in names}
    for name in quiet.BARS:
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet.be_quiet()
        yield caplog
    for name, filters in before.items():
        logging.getLogger(name).filters = filters


def test_only_what_is_named_is_left_out(logged):
    for message in quiet.LEFT_OUT:
        text = message.begins.replace(r"(is_)?", "").replace("(_kwargs)?", "").replace("\\", "")
        if message.logger:
            logging.getLogger(message.logger).warning(f"{text} and so on")
            logging.getLogger(message.logger).warning(f"Not {text}")
        else:
            warnings.warn(f"{text} and so on", FutureWarning, stacklevel=1)
            with pytest.raises(FutureWarning):
                warnings.warn(f"Not {text}", FutureWarning, stacklevel=1)
    with_logger = [message for message in quiet.LEFT_OUT if message.logger]
    assert len(logged.messages) == len(with_logger) and all(text.startswith("Not ") for text in logged.messages)


def test_the_library_leaves_out_nothing():
    """Only the command and its rooms import what is quiet."""
    package = Path(trl_ext.__file__).parent
    importing = [
        path
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level and (node.module or "").split(".")[0] == "run"
    ]
    assert set(importing) == {package / "cli.py"}


def test_recipes_are_quiet_before_they_import_anything_else():
    """The packages that speak while they are imported come later."""
    code = "import sys, trl_ext.run; assert not {'torch', 'trl', 'tqdm', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
