"""Every recipe's smoke configuration through `accelerate launch`, as a user starts it, in a folder without a clone."""

import json
import os
from pathlib import Path

import processes
import pytest
import quickstart
from recipes.smoke import FIRST, LAUNCHER, TASK, smoke_configs

from trl_ext.run.catalogue import list_recipes


CONFIGS = smoke_configs()
LAUNCH = ["-m", "accelerate.commands.launch", *LAUNCHER]


def launch(recipe: str, folder: Path) -> None:
    script = quickstart.RECIPES / f"{recipe}.py"
    processes.run([*LAUNCH, script, "--config", CONFIGS[recipe]], {"HF_HUB_OFFLINE": "1"}, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the data, and what the recipes that come first leave there."""
    found = tmp_path_factory.mktemp("smoke")
    processes.run([quickstart.RECIPES / "tasks" / "sort_digits.py", *TASK], cwd=found)
    for recipe in FIRST:
        launch(recipe, found)
    return found


def test_every_recipe_has_a_smoke_configuration() -> None:
    assert set(CONFIGS) == {recipe.name for recipe in list_recipes() if recipe.file.parent.name != "tasks"}
    assert tuple(CONFIGS)[: len(FIRST)] == FIRST


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.distributed
@pytest.mark.parametrize("recipe", [name for name in CONFIGS if name not in FIRST])
def test_a_recipe_runs_from_its_smoke_configuration(recipe: str, folder: Path) -> None:
    before = set(os.listdir(folder / "runs/smoke"))
    launch(recipe, folder)
    (output,) = set(os.listdir(folder / "runs/smoke")) - before
    made = folder / "runs/smoke" / output
    if recipe in ("make_pairs", "filter_prompts"):
        assert (made / "dataset_dict.json").is_file()
    else:
        summary = json.loads((made / "summary.json").read_text())
        last = summary["stages"][-1] if "stages" in summary else summary["after"]
        assert 0 <= last["digits_in_place"] <= 1 and summary["steps"] >= 2
        assert (made / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.distributed
def test_what_comes_first_leaves_a_model(folder: Path) -> None:
    assert (folder / "runs/smoke/sft/model.safetensors").is_file()
    assert json.loads((folder / "runs/smoke/reward_model/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
