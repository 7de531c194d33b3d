"""
What every health check does: it reads what a trainer logs, counts healthy and unhealthy logs, and begins and ends
episodes. What is checked is in [`trl_ext.monitors.health`].
"""

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import require


logger = logging.getLogger(__name__)

METRIC_PREFIX = "health/"

Logs = dict[str, Any]


@dataclass(frozen=True)
class Alarm:
    """
    The start of an episode.

    Args:
        check (`str`):
            Name of the check.
        step (`int`):
            Optimizer step of the log.
        message (`str`):
            What was told.
        stops (`bool`):
            Whether it ends the run.
    """

    check: str
    step: int
    message: str
    stops: bool


class HealthCheck(TrainerCallback, ABC):
    """
    One quantity that is watched. A subclass says what it is (`read`) and what is wrong with it (`complaint`).

    Args:
        patience (`int`, *optional*, defaults to `5`):
            Logs in a row that begin an episode, and that end it.
        grace (`float`, *optional*, defaults to `0.0`):
            Share of the run, in [0, 1), at whose start a quantity that has yet to get somewhere isn't judged.
        stop (`bool`, *optional*, defaults to `False`):
            Whether an episode ends the run, with a checkpoint of that step. (Where transformers alone decides which
            steps are worth saving, `save_strategy="best"`, a step that is also evaluated may not be saved.)

    Attributes:
        alarms (`list[Alarm]`):
            Episodes so far, those before a resume included.
        value (`float`, *optional*):
            What was read last.
        healthy_logs (`int`):
            Healthy logs in a row until now.

    Raises:
        ValueError: for settings outside of their range.
    """

    name: ClassVar[str]
    advice: ClassVar[str]

    def __init__(self, *, patience: int = 5, grace: float = 0.0, stop: bool = False) -> None:
        require(
            isinstance(patience, int) and patience >= 1, f"patience={patience!r} must be a whole number, 1 or more."
        )
        require(0 <= grace < 1, f"grace={grace!r} is a share of the run and must be in [0, 1).")
        self.patience = patience
        self.grace = grace
        self.stop = stop
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self.value: float | None = None
        self.alarms: list[Alarm] = []
        self.in_episode = False
        self.healthy_logs = self.sick_logs = 0
        self._stopping = False

    @abstractmethod
    def read(self, logs: Logs) -> float | None:
        """The quantity, `None` if this log doesn't tell it."""

    @abstractmethod
    def complaint(self, value: float, early: bool) -> str | None:
        """What is wrong with it, as the middle of a sentence; `early` in the run, what is yet to come isn't."""

    def observe(self, logs: Logs, step: int, max_steps: int) -> Alarm | None:
        """Take in a log. Returns the alarm if an episode begins with it."""
        value = self.read(logs)
        self.value = None if value is None or not math.isfinite(value) else value
        if self.value is None:
            return None
        complaint = self.complaint(self.value, early=step < self.grace * max_steps)
        self.sick_logs = self.sick_logs + 1 if complaint else 0
        self.healthy_logs = 0 if complaint else self.healthy_logs + 1
        if self.healthy_logs >= self.patience:
            self.in_episode = False
        if self.in_episode or self.sick_logs < self.patience:
            return None
        self.in_episode = True
        self.alarms.append(Alarm(self.name, step, self._message(complaint, step), self.stop))
        return self.alarms[-1]

    def _message(self, complaint: str | None, step: int) -> str:
        times = "" if self.patience == 1 else f", {self.patience} logs in a row"
        end = " The run stops here, with a checkpoint." if self.stop else ""
        return f"Health check `{self.name}` at step {step}: {complaint}{times}. {self.advice}{end}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.reset()
        for entry in state.log_history:
            self.observe(entry, int(entry.get("step", 0)), state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs:
            return
        alarm = self.observe(logs, state.global_step, state.max_steps)
        if self.value is not None:
            found = {f"{METRIC_PREFIX}{self.name}": self.value}
            found[f"{METRIC_PREFIX}{self.name}_alarm"] = float(self.in_episode)
            logs |= found  # for trackers that come after this callback
            if state.log_history:
                state.log_history[-1] |= found
        if alarm is not None:
            if state.is_world_process_zero:
                logger.warning(alarm.message)
            self._stopping = alarm.stops
        self._hand_over(control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._hand_over(control)

    def _hand_over(self, control: TrainerControl) -> None:
        # Again with every event until the run ends: the control of a log that isn't the trainer's own (held-out
        # measurements) leads nowhere
        if self._stopping:
            control.should_save = control.should_training_stop = True
