"""
One readable line per log, instead of a dictionary of forty numbers.

    step  12/60 · reward 0.412 · 32 groups kept of 58 · 131k tokens generated · 0.61 s/step · 0:29 left
"""

import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .. import metric_keys
from ..evaluation.held_out import read_estimates
from ..metric_keys import EVALUATION


class ProgressLines(TrainerCallback):
    """
    Prints a line for each log, with what a person who waits wants to know: the step, how good the policy is, the pace,
    and the time that is left. All numbers are still in `state.log_history` and in the trackers. Between logs, the
    first step has a line, and so has whatever takes long: a step, or a generation within a step.

    Args:
        stream (`TextIO`, *optional*):
            Where lines are written, by default what is the standard output at that moment.
        clock (`Callable[[], float]`, *optional*):
            Returns seconds since any origin; only differences are used.
        silence (`float`, *optional*, defaults to `30.0`):
            Seconds without a line after which one is printed in any case.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, silence: float = 30.0
    ):
        self.stream = stream
        self.clock = clock
        self.silence = silence
        self.first = self.last = (0, 0.0)  # (step, time) at the session's start, and at the last line of a step
        self.spoke = self.step_began = 0.0  # times of the last line, and of the running step's first moment
        self.ended = threading.Event()
        self.ended.set()

    @classmethod
    def instead_of_bars(cls, trainer: Any) -> "ProgressLines":
        """Adds a new instance to a trainer, and removes transformers' progress bar and printer of dictionaries."""
        lines = cls()
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(lines)
        return lines

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run starts at the checkpoint's step, and the pace is that of this session
        self.first = self.last = (state.global_step, self.clock())
        self.spoke = self.step_began = self.clock()
        if state.is_world_process_zero:
            self.ended = threading.Event()
            arguments = (weakref.ref(self), weakref.ref(state), self.ended)
            threading.Thread(target=_speak_up, args=arguments, daemon=True).start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_began = self.clock()
        if control.should_log or not state.is_world_process_zero:
            return
        if state.global_step == self.first[0] + 1 or self.clock() - self.spoke >= self.silence:
            self._print(self._step_line(state, {}))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ended.set()

    def speak_up(self, state: TrainerState) -> None:
        """Prints which step is running, and for how long, if there was no line for a while."""
        now = self.clock()
        if now - self.spoke < self.silence:
            return
        where = f"{_step(state, min(state.global_step + 1, state.max_steps))} · running for"
        self._print(f"{where} {_clock_face(now - self.step_began)}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        held_out = read_estimates([{**logs, "step": state.global_step}])
        if held_out:
            for name, e in held_out[state.global_step].items():
                self._print(
                    f"held-out {name} at step {state.global_step}: {e.mean:.3f}, 95 % between {e.low:.3f} and "
                    f"{e.high:.3f} ({e.prompts} prompts, {e.samples} samples)"
                )
        elif "train_runtime" in logs:
            self._print(f"trained {state.global_step} steps in {_clock_face(float(logs['train_runtime']))}")
        else:
            self._print(self._step_line(state, logs))

    def _step_line(self, state: TrainerState, logs: dict[str, Any]) -> str:
        step, now = state.global_step, self.clock()
        parts = [_step(state, step), *_facts(logs)]
        # Two logs can be of one step, for example when it is evaluated
        pace = (now - self.last[1]) / max(step - self.last[0], 1)
        parts.append(f"{pace:.2f} s/step")
        if step > self.first[0]:
            left = (now - self.first[1]) / (step - self.first[0]) * (state.max_steps - step)
            parts.append(f"{_clock_face(left)} left")
        self.last = (step, now)
        return " · ".join(parts)

    def _print(self, line: str) -> None:
        self.spoke = self.clock()
        print(line, file=self.stream or sys.stdout, flush=True)


def _speak_up(lines: Any, state: Any, ended: threading.Event) -> None:
    """
    In a thread of its own, which ends with the training; or, if that ends with an error, with the trainer that holds
    what `lines` and `state` refer to.
    """
    while not ended.wait(1.0):
        callback, its_state = lines(), state()
        if callback is None or its_state is None:
            return
        callback.speak_up(its_state)
        del callback, its_state


def _step(state: TrainerState, step: int) -> str:
    return f"step {step:>{len(str(state.max_steps))}}/{state.max_steps}"


def _facts(logs: dict[str, Any]) -> list[str]:
    """The quantities of a log as words and numbers, without those that it lacks, or whose value is `None`: NaN."""
    logs = {key: value for key, value in logs.items() if value is not None}
    rewards = (metric_keys.REWARD, f"{EVALUATION}{metric_keys.REWARD}")
    supervised = (
        *("loss", f"{EVALUATION}loss", "mean_token_accuracy"),
        *(metric_keys.REWARD_MODEL_ACCURACY, f"{EVALUATION}{metric_keys.REWARD_MODEL_ACCURACY}"),
    )
    keys = [key for key in rewards if key in logs] or [key for key in supervised if key in logs]
    facts = [f"{key.replace('_', ' ')} {float(logs[key]):.3f}" for key in keys]
    for key, text in (
        (metric_keys.PREFERENCE_ACCURACY, "preference accuracy {:.3f}"),
        (metric_keys.KL_PER_COMPLETION, "KL {:.2f}"),
        (metric_keys.KL_PER_TOKEN, "KL {:.4f} a token"),
        (metric_keys.EXPLAINED_VARIANCE, "explained variance {:.2f}"),
    ):
        if key in logs:
            facts.append(text.format(float(logs[key])))
    if metric_keys.GROUPS_GENERATED in logs:
        kept, generated = logs[metric_keys.GROUPS_KEPT], logs[metric_keys.GROUPS_GENERATED]
        facts.append(f"{kept:.0f} groups kept of {generated:.0f}")
        if logs.get(metric_keys.GROUPS_DUPLICATED):
            facts.append(f"{logs[metric_keys.GROUPS_DUPLICATED]:.0f} duplicated")
    if metric_keys.GENERATED_TOKENS in logs:
        facts.append(f"{count(logs[metric_keys.GENERATED_TOKENS])} tokens generated")
    if (logs.get(metric_keys.COMPUTE_SAVED) or 0) >= 0.01:  # where there was something to save
        facts.append(f"{float(logs[metric_keys.COMPUTE_SAVED]):.0%} compute saved")
    return facts


def count(number: float) -> str:
    """A count in about three digits and a unit: `950`, `13.1k`, `131k`, `2M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{0 if scaled >= 100 else 1}f}".removesuffix(".0") + unit
    return f"{number:.0f}"


def _clock_face(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
