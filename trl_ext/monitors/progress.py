"""
One readable line per log, instead of a dictionary of forty numbers.

    step  12/60 · reward 0.412 · 32 groups kept of 58 · 131k tokens generated · 0.61 s/step · 0:29 left
"""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..evaluation.held_out import read_estimates


class ProgressLines(TrainerCallback):
    """
    Prints what a person who waits wants to know: how far, how good, how fast, how long still. Every number stays in
    `state.log_history` and in the trackers.

    Args:
        stream (`TextIO`, *optional*):
            Where to, by default the standard output of the moment.
        clock (`Callable[[], float]`, *optional*):
            Seconds, any origin. Only differences are used.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.stream = stream
        self.clock = clock
        self.first = self.last = (0, 0.0)  # (step, time) of the session's start, and of the last line

    @classmethod
    def instead_of_bars(cls, trainer: Any) -> "ProgressLines":
        """Adds itself to a trainer and takes out transformers' progress bar and dictionary printer."""
        lines = cls()
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(lines)
        return lines

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run starts at the checkpoint's step: the pace is that of this session.
        self.first = self.last = (state.global_step, self.clock())

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
        parts = [f"step {step:>{len(str(state.max_steps))}}/{state.max_steps}", *_facts(logs)]
        # `max`: two logs at one step (an evaluation, say) have no pace of their own
        pace = (now - self.last[1]) / max(step - self.last[0], 1)
        parts.append(f"{pace:.2f} s/step")
        if step > self.first[0]:
            left = (now - self.first[1]) / (step - self.first[0]) * (state.max_steps - step)
            parts.append(f"{_clock_face(left)} left")
        self.last = (step, now)
        return " · ".join(parts)

    def _print(self, line: str) -> None:
        print(line, file=self.stream or sys.stdout, flush=True)


def _facts(logs: dict[str, Any]) -> list[str]:
    """What a log says, in words. Quantities that a trainer doesn't log are left out."""
    facts = [f"{key.replace('_', ' ')} {float(logs[key]):.3f}" for key in ("reward", "eval_reward") if key in logs]
    if not facts:  # supervised training
        shown = ("loss", "eval_loss", "mean_token_accuracy", "accuracy", "eval_accuracy")
        keys = [key for key in shown if key in logs]
        facts = [f"{key.replace('_', ' ')} {float(logs[key]):.3f}" for key in keys]
    if "rewards/accuracies" in logs:
        facts.append(f"preference accuracy {float(logs['rewards/accuracies']):.3f}")
    if "objective/kl" in logs:
        facts.append(f"KL {float(logs['objective/kl']):.2f}")
    if "val/explained_variance" in logs:
        facts.append(f"explained variance {float(logs['val/explained_variance']):.2f}")
    if "selection/groups_generated" in logs:
        kept, generated = logs["selection/groups_kept"], logs["selection/groups_generated"]
        facts.append(f"{kept:.0f} groups kept of {generated:.0f}")
        if logs.get("selection/groups_duplicated"):
            facts.append(f"{logs['selection/groups_duplicated']:.0f} duplicated")
    if "selection/generated_tokens" in logs:
        facts.append(f"{count(logs['selection/generated_tokens'])} tokens generated")
    if logs.get("compute/saved") is not None:
        facts.append(f"{float(logs['compute/saved']):.0%} compute saved")
    return facts


def count(number: float) -> str:
    """A count of things in about three digits and a unit: `950`, `13.1k`, `131k`, `2M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{0 if scaled >= 100 else 1}f}".removesuffix(".0") + unit
    return f"{number:.0f}"


def _clock_face(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
