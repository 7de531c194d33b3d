"""Runs whose logs are written by hand, for callbacks that watch."""

from typing import Any

from transformers import TrainerControl, TrainerState

from trl_ext.monitors.health import ExplainedVarianceCheck


class Run:
    """A run whose logs are written by hand."""

    def __init__(self, callback: Any, max_steps: int = 100, history: Any = (), main: bool = True) -> None:
        self.callback = callback
        self.state = TrainerState(
            max_steps=max_steps, log_history=list(history), is_world_process_zero=main, global_step=len(history)
        )
        self.control = TrainerControl()
        callback.on_train_begin(None, self.state, self.control)

    def log(self, *logs: dict[str, Any], control: TrainerControl | None = None) -> "Run":
        """One log a step."""
        for log in logs:
            self.state.global_step += 1
            self.state.log_history.append({**log, "step": self.state.global_step})
            self.callback.on_log(None, self.state, control or self.control, logs=dict(log))
        return self

    def series(self, key: str, *values: Any) -> "Run":
        return self.log(*({key: value} for value in values))

    @property
    def flags(self) -> tuple[bool, bool]:
        return self.control.should_save, self.control.should_training_stop

    def logged(self, key: str) -> list[Any]:
        return [entry.get(key) for entry in self.state.log_history]


EV = "val/explained_variance"


def variance(**settings: Any) -> ExplainedVarianceCheck:
    """The check whose quantity is read as it is."""
    return ExplainedVarianceCheck(**{"patience": 3, "grace": 0.0, **settings})
