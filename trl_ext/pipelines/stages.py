"""
Where a run of several stages is: a small file beside them, and which checkpoint of a stage is whole. A process that is
killed leaves both as they were.
"""

import hashlib
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
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..evaluation.held_out import Estimate


STATE_FILE = "stages.json"
START, PAIRS, DPO = "start", "pairs", "dpo"
POLICY = "policy"  # the second stage, whatever its method
DATA = "data"  # no stage: what the start is measured by and pairs are made of

# What may be another when a run goes on: where it runs, is logged and pushed, and how much of it is kept
FREE_SETTINGS = re.compile(
    r"^(output_dir|run_name|project|trackio_.*|report_to|log_.*|logging_dir|disable_tqdm|push_to_hub.*|hub_.*|"
    r"save_.*|dataloader_.*|resume_from_checkpoint|local_rank|ddp_.*|deepspeed|fsdp.*|_n_gpu|skip_memory_metrics|"
    r"vllm_server_.*|vllm_gpu_.*|(gradient|activation)_checkpointing.*)$"
)
# Rows that tell one data set from another
ROWS_OF_A_FINGERPRINT = 256


@dataclass
class StageResult:
    """
    A finished stage.

    Args:
        name (`str`):
            `"pairs"`, `"dpo"`, or the method of the second stage, such as `"ppo"`. `"start"`: the policy as it came.
        round (`int`):
            From 1; 0 for the start.
        folder (`str`):
            With the adapter, or the pairs.
        steps (`int`):
            Optimizer steps.
        generated_tokens (`int`):
            Completion tokens sampled for it, evaluation aside.
        seconds (`float`):
            Wall-clock seconds, without what was done before a kill.
        measured (`dict[str, Estimate]`):
            The policy after it, on held-out prompts.
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
        """What its trainer logged; empty where nothing was trained."""
        file = Path(self.folder) / TRAINER_STATE_NAME
        return list(json.loads(file.read_text(encoding="utf-8"))["log_history"]) if file.is_file() else []


class StageFile:
    """
    The stages that are finished, in `stages.json`. The main process reads and writes; all know the same.

    Args:
        folder (`Path`):
            Of the run.
        settings (`Mapping[str, Mapping[str, Any]]`):
            What the result depends on, by what it decides first: `START`, `DATA`, `PAIRS`, `DPO` or `POLICY`. JSON, or
            turned into strings. Those of a stage that hasn't begun may be others than before.

    Raises:
        ValueError: if the folder holds a run with other settings of what has begun, or stages of nobody knows which.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.path = folder / STATE_FILE
        self.settings = json.loads(json.dumps(settings, default=_plain, sort_keys=True))
        outcome: list[Any] = [None, set()]
        if PartialState().is_main_process:
            if self.path.is_file():
                outcome[0] = json.loads(self.path.read_text(encoding="utf-8"))
            outcome[1] = _begun(folder, {entry["name"] for entry in (outcome[0] or {"stages": []})["stages"]})
        broadcast_object_list(outcome)
        found, begun = outcome
        if found is None and begun:
            raise ValueError(
                f"{folder} holds stages of a run, but no {STATE_FILE} that says which. Name another output_dir, or "
                "remove them."
            )
        self.changed: list[str] = []  # what is another than before, and may be
        if found is not None:
            self._check(found["settings"], begun)
        self.stages = [self._read(entry, folder) for entry in (found or {"stages": []})["stages"]]

    def _check(self, before: dict[str, dict[str, Any]], begun: set[str]) -> None:
        refused: list[str] = []
        for stage, now in self.settings.items():
            then = before.get(stage, {})
            for name in sorted({*then, *now}):
                if then.get(name) != now.get(name):
                    told = f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
                    (refused if stage in begun else self.changed).append(told)
        if refused:
            raise ValueError(
                f"{self.path.parent} holds a run with other settings, which can't go on with these: "
                f"{'; '.join(refused[:8])}. Put them back, or name another output_dir. (A stage that isn't "
                "finished begins anew, with others, without its folder.)"
            )

    @staticmethod
    def _read(entry: dict[str, Any], folder: Path) -> StageResult:
        entry["folder"] = str(folder / entry["folder"])
        measured = {name: Estimate(**numbers) for name, numbers in entry.pop("measured").items()}
        return StageResult(**entry, measured=measured)

    def find(self, name: str, round_: int) -> StageResult | None:
        """A finished stage, or `None`."""
        return next((stage for stage in self.stages if (stage.name, stage.round) == (name, round_)), None)

    def finish(self, stage: StageResult) -> None:
        """Takes a stage for finished. Every process must make the call, when all its files are there."""
        self.stages.append(stage)
        self.save()

    def save(self) -> None:
        """Writes the file, at once or not at all."""
        state = PartialState()
        state.wait_for_everyone()
        if state.is_main_process:
            stages = [asdict(stage) for stage in self.stages]
            for entry in stages:
                # So that the run may be moved
                entry["folder"] = os.path.relpath(entry["folder"], self.path.parent)
                for estimate in entry["measured"].values():
                    del estimate["per_prompt"]
            text = json.dumps({"settings": self.settings, "stages": stages}, indent=1) + "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".part")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.path)
        state.wait_for_everyone()


def _begun(folder: Path, finished: set[str]) -> set[str]:
    """Of which stages there is something that depends on their settings, and would go on."""
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


def _plain(value: Any) -> Any:
    # PEFT keeps names in sets, whose order is another in every process
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def settings_of(args: Any, prefix: str) -> dict[str, Any]:
    """What of a configuration decides the result, by name."""
    return {f"{prefix}.{name}": value for name, value in args.to_dict().items() if not FREE_SETTINGS.match(name)}


def fingerprint(dataset: Dataset | None) -> str | None:
    """The same for data sets with the same rows, as far as some of them, evenly spaced, and their number tell."""
    if dataset is None:
        return None
    rows = dataset.select(range(0, len(dataset), max(1, len(dataset) // ROWS_OF_A_FINGERPRINT)))
    text = json.dumps([len(dataset), sorted(dataset.column_names), rows.to_list()], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def whole_checkpoint(folder: Path) -> Path | None:
    """
    The last whole checkpoint in a folder. One that was being written when its process was killed is removed: nobody
    could go on from it, and `resume_from_checkpoint=True` would take it. Every process must make the call.
    """
    state = PartialState()
    named = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in folder.glob("*")]
    numbered = {int(match[1]): path for match, path in named if match}
    whole = {step: path for step, path in numbered.items() if _is_whole(path)}
    state.wait_for_everyone()
    if state.is_main_process:
        for step in numbered.keys() - whole.keys():
            shutil.rmtree(numbered[step])
    state.wait_for_everyone()
    return whole[max(whole)] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the last one to be written
    except (OSError, ValueError):
        return False
    return True
