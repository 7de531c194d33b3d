"""
What a run has saved, whatever made it, and one of its roles exported.
"""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import require, require_one_of, require_type
from ..roles.export import EXPORTS, Export, export_folder
from ..roles.merging import ExportSettings
from ..roles.saved import form_of, read_json
from ..trainers.seams.whole_checkpoints import TRAINER_STATE, checkpoints_of, damage, newest_whole
from .stages import STATE_FILE


# Folder in that of a run
EXPORTED = "exported"
LAST, BEST = "last", "best"


def export_role(
    run: str | Path,
    role: str = "policy",
    *,
    merge: bool = False,
    checkpoint: int | str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Export:
    """
    Write a role of a run as files that plain `transformers` and `peft` load.

    ```python
    from trl_ext import export_role

    export = export_role("runs/ppo", "policy", merge=True, dtype="bfloat16")
    print(export.form, export.load)
    ```

    Args:
        run (`str` or `Path`):
            The output folder of a run of any trainer, a stage of [`DPOThenPPO`], or one checkpoint.
        role (`str`, *optional*, defaults to `"policy"`):
            `"policy"`, `"critic"`, `"reward"` or `"reference"`.
        merge (`bool`, *optional*, defaults to `False`):
            Whether the role's adapter is merged into its base.
        checkpoint (`int` or `str`, *optional*):
            The step of a checkpoint, `"last"` or `"best"`. By default the model that the run ended with, or the last
            whole checkpoint of a run that hasn't ended.
        output (`str` or `Path`, *optional*):
            The new folder, by default `exported/<role>` in that of the run.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a folder with files in it is replaced.
        settings:
            `base`, `dtype`, `full_precision` and `trust_remote_code` of
            [`~trl_ext.roles.merging.ExportSettings`].

    Returns:
        [`~trl_ext.roles.export.Export`]: where it is, what it is, and how it is loaded.

    Raises:
        ValueError: if there is no such run, checkpoint or role, there is nothing to merge, or the base can't be loaded
            or is of another shape.
        FileExistsError: if `output` isn't empty and is not to be replaced.
    """
    require_type("run", run, str | Path, "Pass the output folder of a run.")
    require_one_of("role", role, EXPORTS)
    wanted, run = ExportSettings(merge=merge, **settings), Path(run)
    source, notes = find_source(run, checkpoint)
    name = role if source == run else f"{role}-{source.name}"
    top = run.parent if run.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else run
    target = top / EXPORTED / name if output is None else Path(output)
    export = export_folder(source, target, role, wanted, overwrite)
    export.notes[:0] = notes
    return export


def find_source(run: Path, checkpoint: int | str | None = None) -> tuple[Path, list[str]]:
    """
    The folder in a run that has the weights that are meant.

    Args:
        run (`Path`):
            The output folder of a run, or one checkpoint.
        checkpoint (`int` or `str`, *optional*):
            The step of a checkpoint, `"last"` or `"best"`; `None`: what the run ended with, or its last checkpoint.

    Returns:
        `tuple[Path, list[str]]`: the folder, and what there is to say about the choice.

    Raises:
        ValueError: if there is no such run, nothing is saved in it, or the checkpoint isn't there or is damaged.
    """
    require(run.is_dir(), f"'{run}' is no folder. Pass the output folder of a run, or one of its checkpoints.")
    if checkpoint is not None:
        return _checkpoint_of(run, str(checkpoint))
    if form_of(run) is not None:
        problem = damage(run) if run.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else None
        require(problem is None, f"'{run}' is damaged: {problem}. Pass another checkpoint.")
        return run, []
    if checkpoints_of(run):
        source, notes = _checkpoint_of(run, LAST)
        return source, [
            f"The run has not ended with a model: exported is {source.name}, its last whole checkpoint.",
            *notes,
        ]
    stages = _stages_with_models(run)
    remedy = (
        f"It is a run of several stages that hasn't ended. Pass the folder of one: {', '.join(stages)}."
        if stages
        else "Pass the output folder of a run that has saved, or one of its checkpoints."
    )
    require(False, f"Nothing is saved in '{run}': no model and no checkpoint. {remedy}")
    raise AssertionError


def _checkpoint_of(run: Path, asked: str) -> tuple[Path, list[str]]:
    """A checkpoint of a run, by what is asked for."""
    found = checkpoints_of(run)
    there = f"There are: {', '.join(path.name for path in found)}." if found else "There are none."
    require(
        asked in (LAST, BEST) or asked.isdecimal(),
        f"checkpoint is '{asked}'. Name the step of a checkpoint, '{LAST}' or '{BEST}'. {there}",
    )
    newest, damaged = newest_whole(run)
    listed = "; ".join(f"{name}: {problem}" for name, problem in damaged.items())
    if asked == LAST:
        require(newest is not None, f"'{run}' has no whole checkpoint{f' ({listed})' if listed else ''}. {there}")
        assert newest is not None
        return newest, [f"Newer checkpoints are damaged and passed over: {listed}."] if damaged else []
    if asked == BEST:
        best = _best(run, found)
        require(
            best is not None,
            f"No checkpoint of '{run}' is marked as its best. Train with metric_for_best_model and eval_strategy, or "
            f"name a step. {there}",
        )
        asked = str(best).rpartition("-")[2]
    path = run / f"{PREFIX_CHECKPOINT_DIR}-{asked}"
    require(path in found, f"'{run}' has no {path.name}. {there}")
    problem = damage(path)
    instead = f"The newest whole one is {newest.name}." if newest else "There is no whole one."
    require(problem is None, f"'{path}' is damaged: {problem}. {instead}")
    return path, []


def _best(run: Path, checkpoints: list[Path]) -> str | None:
    """The name of the best checkpoint, as the newest state of the trainer has it."""
    for folder in (run, *checkpoints):
        try:
            best = read_json(folder / TRAINER_STATE).get("best_model_checkpoint")
        except (OSError, ValueError):
            continue
        return Path(best).name if best else None
    return None


def _stages_with_models(run: Path) -> list[str]:
    """Folders of the finished stages of a run, relative to the working directory as the run is, that have a model."""
    try:
        stages = json.loads((run / STATE_FILE).read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError):
        return []
    folders = dict.fromkeys(str(run / stage["folder"]) for stage in stages)
    return [folder for folder in folders if form_of(Path(folder)) is not None]
