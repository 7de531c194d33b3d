"""
Which stages of a run are finished, in a small file in the run's folder, and which checkpoints of a stage are complete.
Both stay readable if the process is killed at any moment.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..evaluation.held_out import Estimate
from ..trainers.seams.whole_checkpoints import damage, put_back
from .settings import as_json


STATE_FILE = "stages.json"
# Names of stages
START, PAIRS, DPO = "start", "pairs", "dpo"
# Further keys of settings: of the second stage, whatever its method, and of the data that both stages use
POLICY, DATA = "policy", "data"


@dataclass
class StageResult:
    """
    A finished stage.

    Args:
        name (`str`):
            `"pairs"`, `"dpo"`, or the method of the second stage, such as `"ppo"`; `"start"` for the policy before any
            stage.
        round (`int`):
            Round, from 1; 0 for the start.
        folder (`str`):
            Folder with the stage's adapter or pairs.
        steps (`int`):
            Optimizer steps.
        generated_tokens (`int`):
            Completion tokens that were sampled for the stage, not counting evaluation.
        seconds (`float`):
            Wall-clock seconds of the process that finished the stage.
        measured (`dict[str, Estimate]`):
            How good the policy is after the stage, on held-out prompts.
    """

    name: str
    round: int
    folder: str
    steps: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    measured: dict[str, Estimate] = field(default_factory=dict)

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """What the stage's trainer logged; empty for a stage that trains nothing."""
        file = Path(self.folder) / TRAINER_STATE_NAME
        return list(json.loads(file.read_text(encoding="utf-8"))["log_history"]) if file.is_file() else []


class StageFile:
    """
    The finished stages of a run, and its settings, in `stages.json`. The main process reads and writes the file, and
    all processes know its content.

    Args:
        folder (`Path`):
            The run's folder.
        settings (`Mapping[str, Mapping[str, Any]]`):
            Everything on which the result depends, grouped by the first stage that uses it: `START`, `DATA`, `PAIRS`,
            `DPO` or `POLICY`. Values that JSON lacks are stored as strings. Settings of a stage that hasn't begun may
            differ from those in the file.

    Attributes:
        stages (`list[StageResult]`):
            The finished stages, in order.
        changed (`list[str]`):
            Settings that differ from those in the file, and may, a sentence each.

    Raises:
        ValueError: if the folder holds a run with different settings of a stage that has begun, or stages without the
            file that describes them.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.path = folder / STATE_FILE
        self.settings = as_json(settings)
        outcome: list[Any] = [None, set()]
        if PartialState().is_main_process:
            if self.path.is_file():
                outcome[0] = json.loads(self.path.read_text(encoding="utf-8"))
            outcome[1] = _begun(folder, {entry["name"] for entry in (outcome[0] or {"stages": []})["stages"]})
        broadcast_object_list(outcome)
        found, begun = outcome
        if found is None and begun:
            raise ValueError(
                f"{folder} holds stages of a run, but no {STATE_FILE} that describes them. Choose a different "
                "output_dir, or remove the stages."
            )
        self.changed: list[str] = []
        if found is not None:
            self._compare(found["settings"], begun)
        self.stages = [self._read(entry, folder) for entry in (found or {"stages": []})["stages"]]

    def _compare(self, before: dict[str, dict[str, Any]], begun: set[str]) -> None:
        refused: list[str] = []
        for stage, now in self.settings.items():
            then = before.get(stage, {})
            for name in sorted({*then, *now}):
                if then.get(name) != now.get(name):
                    difference = f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
                    (refused if stage in begun else self.changed).append(difference)
        if refused:
            raise ValueError(
                f"{self.path.parent} holds a run with different settings, which can't be continued with these: "
                f"{'; '.join(refused[:8])}. Restore the settings, or choose a different output_dir. (A stage that "
                "isn't finished can be started again with different settings if its folder is removed.)"
            )

    @staticmethod
    def _read(entry: dict[str, Any], folder: Path) -> StageResult:
        measured = {name: Estimate(**numbers) for name, numbers in entry["measured"].items()}
        return StageResult(**{**entry, "folder": str(folder / entry["folder"]), "measured": measured})

    def find(self, name: str, round_: int) -> StageResult | None:
        """A finished stage, or `None`."""
        return next((stage for stage in self.stages if (stage.name, stage.round) == (name, round_)), None)

    def finish(self, stage: StageResult) -> None:
        """Records a stage as finished. Every process must make the call, after all files of the stage are written."""
        self.stages.append(stage)
        self.save()

    def save(self) -> None:
        """Writes the file in one atomic step. Every process must make the call."""
        state = PartialState()
        state.wait_for_everyone()
        if state.is_main_process:
            stages = [asdict(stage) for stage in self.stages]
            for entry in stages:
                # Relative, so that the run's folder can be moved
                entry["folder"] = os.path.relpath(entry["folder"], self.path.parent)
                for estimate in entry["measured"].values():
                    del estimate["per_prompt"]
            text = json.dumps({"settings": self.settings, "stages": stages}, indent=1) + "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".part")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.path)
        state.wait_for_everyone()


def print_once(text: str) -> None:
    """Prints a line on the main process."""
    PartialState().print(text, flush=True)


def _begun(folder: Path, finished: set[str]) -> set[str]:
    """The stages that have left something that depends on their settings and would be used by this run."""
    begun = {stage for stage in (PAIRS, DPO) if stage in finished}
    if finished:
        begun.add(DATA)
    if (folder / START).is_dir():
        begun.add(START)
    for checkpoint in folder.glob(f"round_*/*/{PREFIX_CHECKPOINT_DIR}-*"):
        begun.add(DPO if checkpoint.parent.name == DPO else POLICY)
    if finished - {START, PAIRS, DPO}:
        begun.add(POLICY)
    return begun


def whole_checkpoint(folder: Path) -> Path | None:
    """
    The last complete checkpoint in a folder. Checkpoints that were being written when their process was killed are
    removed, because they can't be resumed from and `resume_from_checkpoint=True` would choose them. Every process must
    make the call.
    """
    state = PartialState()
    if state.is_main_process:
        put_back(folder)
    state.wait_for_everyone()
    named = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in folder.glob("*")]
    numbered = {int(match[1]): path for match, path in named if match}
    whole = {step: path for step, path in numbered.items() if damage(path) is None}
    state.wait_for_everyone()
    if state.is_main_process:
        for step in numbered.keys() - whole.keys():
            shutil.rmtree(numbered[step])
    state.wait_for_everyone()
    return whole[max(whole)] if whole else None
