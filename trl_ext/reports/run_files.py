"""
A run as its folder tells it: settings, log, summary, stages and held-out texts. What is there is read; a run that is
under way, or that wasn't started by a recipe, has less of it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UserError
from ..evaluation.held_out_texts import HELD_OUT_TEXTS, PromptTexts, read_texts
from ..pipelines.stages import PAIRS, START, STATE_FILE
from ..redaction import hidden_tokens, redact
from .summary import SUMMARY


SETTINGS = "settings.json"
# Settings that say where a run is, and nothing of what it does
PLACES = ("output_dir", "run_name", "config_file", "logging_dir", "hub_model_id", "project", "trackio_space_id")


@dataclass
class TrainedStage:
    """
    A part of a run that one trainer trained.

    Args:
        name (`str`):
            Name of the stage; `""` for the only one.
        log_history (`list[dict]`):
            What its trainer logged.
        steps (`int`):
            Optimizer steps so far.
        max_steps (`int`):
            Optimizer steps that it was to have.
        start (`int`):
            Optimizer steps of the stages before it.
    """

    name: str
    log_history: list[dict[str, Any]]
    steps: int
    max_steps: int
    start: int = 0


@dataclass
class Run:
    """
    What the folder of a run holds.

    Args:
        name (`str`):
            How reports call it.
        folder (`Path`):
            Its folder.
        stages (`list[TrainedStage]`):
            What was trained, in order; at least one.
        summary (`dict`):
            Its `summary.json`; empty without one.
        settings (`dict`):
            All arguments by name; empty where no recipe wrote them.
        chosen (`list[str]`):
            The arguments that its yaml file or command line named.
        before, after (`list[PromptTexts]`):
            Held-out texts of the first and the last measurement.
    """

    name: str
    folder: Path
    stages: list[TrainedStage]
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    chosen: list[str] = field(default_factory=list)
    before: list[PromptTexts] = field(default_factory=list)
    after: list[PromptTexts] = field(default_factory=list)

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """The logs of all stages, their steps counted from the start of the run."""
        return [
            {**entry, "step": stage.start + int(entry.get("step", 0))}
            for stage in self.stages
            for entry in stage.log_history
        ]

    @property
    def metric(self) -> str | None:
        """The held-out metric that stands for the run: the first one that was measured."""
        intervals = (self.summary.get("after") or {}).get("intervals", {})
        found = self.summary.get("metric") or next(iter(intervals), None)
        return found or next((name for one in self.after for name in one.rewards), None)


def write_settings(folder: str | Path, settings: Mapping[str, Any], chosen: Sequence[str]) -> None:
    """
    Writes the arguments of a run beside what it trains. Access tokens in them are replaced by `***`.

    Args:
        folder (`str` or `Path`):
            Folder of the run; made if it doesn't exist.
        settings (`Mapping[str, Any]`):
            All arguments by name. Values that JSON lacks are written as text.
        chosen (`Sequence[str]`):
            Those that the user named.
    """
    shown = {name: _without_tokens(name, value) for name, value in sorted(settings.items())}
    text = json.dumps({"chosen": sorted(set(chosen)), "settings": shown}, indent=1, default=str, ensure_ascii=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / SETTINGS).write_text(text + "\n", encoding="utf-8")


def _without_tokens(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return hidden_tokens({str(key): _without_tokens(str(key), one) for key, one in value.items()})
    if isinstance(value, list | tuple):
        return [_without_tokens(name, one) for one in value]
    return redact(f"{name}: {value}").removeprefix(f"{name}: ") if isinstance(value, str) else value


def read_settings(folder: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The arguments of a run and the names of those that its user chose; both empty if no recipe wrote them."""
    found = _json(Path(folder) / SETTINGS)
    return found.get("settings", {}), found.get("chosen", [])


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """
    Reads the folder of a run, one of several stages too. A run without its end is read from its newest checkpoint.

    Args:
        folder (`str` or `Path`):
            Output folder of a recipe or a trainer, or one checkpoint.
        name (`str`, *optional*):
            How reports call it. `None`: the folder's name.

    Raises:
        UserError: if there is no such folder, or nothing was logged in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder. Name the output folder of a run, such as runs/dapo.")
    stages, before, after = _of_stages(folder) if (folder / STATE_FILE).is_file() else _of_one(folder)
    if not stages:
        raise UserError(
            f"'{folder}' has no log: there is no {TRAINER_STATE_NAME} in it, nor in a checkpoint in it. Name the "
            "output folder of a run that has ended or has saved a checkpoint."
        )
    settings, chosen = read_settings(folder)
    summary = _json(folder / SUMMARY)
    return Run(name or folder.resolve().name, folder, stages, summary, settings, chosen, before, after)


Found = tuple[list[TrainedStage], list[PromptTexts], list[PromptTexts]]


def _of_one(folder: Path) -> Found:
    states = [folder / TRAINER_STATE_NAME, *(path / TRAINER_STATE_NAME for path in reversed(_checkpoints(folder)))]
    file = next((state for state in states if state.is_file()), None)
    texts = list(read_texts(folder / HELD_OUT_TEXTS).values())
    before, after = (texts[0], texts[-1]) if len(texts) > 1 else ([], texts[0] if texts else [])
    return [] if file is None else [_stage(file, "", 0)], before, after


def _of_stages(folder: Path) -> Found:
    stages: list[TrainedStage] = []
    texts: list[list[PromptTexts]] = []
    finished = _json(folder / STATE_FILE)["stages"]
    several = max((entry["round"] for entry in finished), default=1) > 1
    for entry in finished:
        own = folder / entry["folder"]
        texts += read_texts(own / HELD_OUT_TEXTS).values()
        if entry["name"] not in (START, PAIRS) and (own / TRAINER_STATE_NAME).is_file():
            name = f"{entry['name']} {entry['round']}" if several else entry["name"]
            start = stages[-1].start + stages[-1].steps if stages else 0
            stages.append(_stage(own / TRAINER_STATE_NAME, name, start))
    return stages, texts[0] if len(texts) > 1 else [], texts[-1] if texts else []


def _stage(file: Path, name: str, start: int) -> TrainedStage:
    state = _json(file)
    return TrainedStage(name, state["log_history"], state["global_step"], state["max_steps"], start)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by rising step."""
    named = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in folder.glob("*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def _json(file: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none."""
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{file}' can't be read: {error}. It may be cut off; remove it to do without.") from error
    return content
