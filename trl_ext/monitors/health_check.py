"""
The base of every health check: it reads what a trainer logs, counts healthy and unhealthy logs in a row, and begins
and ends episodes. The checks themselves are in [`trl_ext.monitors.health`].
"""

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import require, require_number


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
            Optimizer step of the log that began the episode.
        message (`str`):
            The warning that was logged.
        stops (`bool`):
            Whether the episode ends the run.
    """

    check: str
    step: int
    message: str
    stops: bool


class HealthCheck(TrainerCallback, ABC):
    """
    Watches one quantity. A subclass has a `name` and an `advice`, and implements `read`, which finds the quantity in a
    log, and `complaint`, which says what is wrong with it. To have [`HealthChecks`] run it by default, add it to
    [`trl_ext.monitors.health.CHECKS`].

    Args:
        patience (`int`, *optional*, defaults to `5`):
            How many unhealthy logs in a row begin an episode, and how many healthy ones end it.
        grace (`float`, *optional*, defaults to `0.0`):
            Share of the run, in [0, 1), during which a quantity that takes time to become healthy isn't judged.
        stop (`bool`, *optional*, defaults to `False`):
            Whether an episode ends the run, with a checkpoint of that step. (With `save_strategy="best"`, transformers
            decides alone which steps are saved: if that step is also evaluated, it may not be.)

    Attributes:
        name (`str`):
            Class attribute: under which the check is logged and found in [`HealthChecks`].
        advice (`str`):
            Class attribute: what to try, in a sentence or two.
        alarms (`list[Alarm]`):
            Episodes so far, including those before a resume.
        value (`float`, *optional*):
            The quantity in the latest log; `None` if that log doesn't contain it.
        healthy_logs (`int`):
            How many logs in a row have been healthy.

    Raises:
        ValueError: for settings outside of their range.
        TypeError: for a subclass without a name or without advice.
    """

    name: ClassVar[str]
    advice: ClassVar[str]

    def __init__(self, *, patience: int = 5, grace: float = 0.0, stop: bool = False) -> None:
        for attribute in ("name", "advice"):
            if not isinstance(getattr(self, attribute, None), str):
                raise TypeError(f"{type(self).__name__} has no `{attribute}`. Set it as a class attribute, a `str`.")
        require(
            isinstance(patience, int) and patience >= 1, f"patience={patience!r} must be a whole number, 1 or more."
        )
        require_number("grace", grace)
        require(0 <= grace < 1, f"grace={grace!r} is a share of the run and must be in [0, 1).")
        self.patience = patience
        self.grace = grace
        self.stop = stop
        self.reset()

    def reset(self) -> None:
        """Forget everything that was observed."""
        self.value: float | None = None
        self.alarms: list[Alarm] = []
        self.in_episode = False
        self.healthy_logs = self.unhealthy_logs = 0
        self._stopping = False

    @abstractmethod
    def read(self, logs: Logs) -> float | None:
        """The quantity, or `None` if this log doesn't contain it."""

    @abstractmethod
    def complaint(self, value: float, early: bool) -> str | None:
        """
        What is wrong with `value`, as the middle of a sentence; `None` if it is healthy. `early` is true during the
        grace period.
        """

    def observe(self, logs: Logs, step: int, max_steps: int) -> Alarm | None:
        """Take a log into account, and return the alarm if an episode begins with it."""
        value = self.read(logs)
        self.value = None if value is None or not math.isfinite(value) else value
        if self.value is None:
            return None
        complaint = self.complaint(self.value, early=step < self.grace * max_steps)
        self.unhealthy_logs = self.unhealthy_logs + 1 if complaint else 0
        self.healthy_logs = 0 if complaint else self.healthy_logs + 1
        if self.healthy_logs >= self.patience:
            self.in_episode = False
        if self.in_episode or self.unhealthy_logs < self.patience:
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
        for entry in state.log_history:  # of a resumed run
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
            logs |= found  # for the trackers that are called after this callback
            if state.log_history:
                state.log_history[-1] |= found
        if alarm is not None:
            if state.is_world_process_zero:
                logger.warning(alarm.message)
            self._stopping = alarm.stops
        self._pass_stop_on(control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pass_stop_on(control)

    def _pass_stop_on(self, control: TrainerControl) -> None:
        # At every event until the run ends, because the control that comes with a held-out measurement is not the
        # trainer's own
        if self._stopping:
            control.should_save = control.should_training_stop = True
