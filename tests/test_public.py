"""The names of the package, which are imported when they are used."""

import subprocess
import sys
from pathlib import Path

import pytest

import trl_ext


def test_every_name_is_there():
    for name in trl_ext.__all__:
        assert getattr(trl_ext, name).__name__ == name
    assert {*trl_ext.__all__, "__name__"} <= set(dir(trl_ext))


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'trl_ext' has no attribute 'TRPOTrainer'"):
        _ = trl_ext.TRPOTrainer
    with pytest.raises(ImportError, match="cannot import name 'TRPOTrainer'"):
        from trl_ext import TRPOTrainer  # noqa: F401


def test_the_package_alone_imports_nothing_that_takes_time():
    """`import trl_ext` then takes no longer than `import trl`; names are looked up when they are used."""
    heavy = {
        "torch",
        "trl",
        "transformers",
        "accelerate",
        "datasets",
        "peft",
        "evaluate",
        "matplotlib",
        "numpy",
        "scipy",
    }
    code = f"import sys, trl_ext, trl_ext.cli, trl_ext.run.catalogue; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(trl_ext.__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"
