"""The quickstart's task made small, once for all recipes. Tasks are imported as the files that they are."""

import sys
from pathlib import Path

import pytest
import quickstart


sys.path.insert(0, str(quickstart.ROOT / "recipes" / "tasks"))


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/` and `init/`, and, after a few supervised steps with the quickstart's configuration, `sft/`."""
    folder = tmp_path_factory.mktemp("task")
    sizes = ["--sft_size", "256", "--train_size", "256", "--test_size", "40", "--pairs_size", "256"]
    quickstart.start("tasks/sort_digits", ["--output_dir", str(folder), *sizes])
    quickstart.start("sft", [*quickstart.arguments("sft", folder, "init", "sft"), "--max_steps", "4"])
    return folder
