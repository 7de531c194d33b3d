"""Training with one trainer. Whole runs are in `tests/recipes`."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from trl_ext.run.training import train_and_save


@dataclass
class Trainer:
    """Notes what it is asked for."""

    resume: str | None
    done: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.args = SimpleNamespace(resume_from_checkpoint=self.resume, output_dir="out")

    def add_callback(self, callback: Any) -> None:
        self.done.append(type(callback).__name__)

    def remove_callback(self, callback: Any) -> None:
        pass

    def train(self, resume_from_checkpoint: Any) -> None:
        self.done.append(resume_from_checkpoint)

    def save_model(self, folder: str, _internal_call: bool) -> None:
        self.done.append((folder, _internal_call))

    def save_state(self) -> None:
        self.done.append("state")


@pytest.mark.parametrize(
    ("given", "taken"), [(None, None), ("true", True), ("True", True), ("false", None), ("out/checkpoint-2",) * 2]
)
def test_where_training_resumes(given, taken):
    trainer = Trainer(given)
    train_and_save(trainer)
    assert trainer.done == ["ProgressLines", taken, ("out", True), "state"]  # saved at once, and not pushed yet
