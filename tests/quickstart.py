"""Recipes started in this process as a user starts them, with the quickstart's configurations."""

import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"


def start(recipe: str, argv: list[str]) -> None:
    """Runs the recipe's own file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"recipes/{recipe}.py", *argv])
        runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")


def arguments(config: str, task: Path, model: str, output: str) -> list[str]:
    """
    Those of a recipe with a configuration of the quickstart, on other folders.

    Args:
        config (`str`):
            `quickstart_{config}.yaml`.
        task (`Path`):
            Has `data/`, and the folders of models.
        model, output (`str`):
            The model's folder, and the run's, in `task`.
    """
    return [
        *("--config", str(RECIPES / f"configs/quickstart_{config}.yaml")),
        *("--model_name_or_path", str(task / model)),
        *("--dataset_name", str(task / "data")),
        *("--output_dir", str(task / output)),
    ]
