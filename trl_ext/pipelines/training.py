"""
Trains one stage of a run to its end, from its last complete checkpoint, and leaves the result in the stage's folder.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..evaluation.held_out import HeldOut, read_estimates
from ..evaluation.held_out_texts import HELD_OUT_TEXTS
from ..metric_keys import PREFERENCE_ACCURACY
from ..monitors.health import PreferenceAccuracyCheck
from ..roles.critic import CRITIC
from ..roles.trunk import REFERENCE_ADAPTER, load_adapter, save_adapter
from ..trainers.grpo import GRPOTrainer
from ..trainers.seams.checkpoints import saved_state
from .stages import whole_checkpoint


# Beginnings of the names of files that only a resumed training needs
FILES_OF_A_RUN = (
    "optimizer",
    "scheduler",
    "rng_state",
    "trl_ext_",
    "training_args",
    "README",
    TRAINER_STATE_NAME,
    HELD_OUT_TEXTS,
)


class StageStoppedError(RuntimeError):
    """A stage was stopped before its end by a callback or a signal. What was trained is saved in its checkpoints."""


class StaysAbove(TrainerCallback):
    """
    Ends DPO once preference accuracy has been above a threshold in several logs in a row.

    Args:
        threshold (`float`):
            Preference accuracy, in (0, 1).
        logs (`int`):
            How many logs in a row have to be above the threshold.
        metric (`str`, *optional*, defaults to `"rewards/accuracies"`):
            Key of preference accuracy in the logs.
    """

    def __init__(self, threshold: float, logs: int, metric: str = PREFERENCE_ACCURACY) -> None:
        self.logs = logs
        self.check = PreferenceAccuracyCheck(threshold, metric, patience=logs, grace=0.0)

    def reached(self, state: TrainerState) -> bool:
        """Whether the latest logs in the history of a run are above the threshold."""
        self.check.reset()
        for entry in state.log_history:
            self.check.observe(entry, int(entry.get("step", 0)), state.max_steps)
        return self.check.healthy_logs >= self.logs

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.reached(state)


class StopsRising(TrainerCallback):
    """
    Ends DPO once the held-out reward has not risen for several measurements in a row, and keeps the adapter of the
    best one. Held-out rewards are those that [`~trl_ext.evaluation.held_out.HeldOut`] logged, which must be added to
    the trainer first.

    Args:
        weights (`dict[str, float]`):
            Weight of each reward function.
        patience (`int`):
            Number of measurements.
        best (`Path`):
            Folder for the best adapter.
    """

    def __init__(self, weights: dict[str, float], patience: int, best: Path) -> None:
        self.weights, self.patience, self.best = weights, patience, best

    def rewards(self, state: TrainerState) -> list[float]:
        """The held-out rewards in the history of a run."""
        return [
            sum(self.weights[name] * estimate.mean for name, estimate in measured.items() if name in self.weights)
            for measured in read_estimates(state.log_history).values()
        ]

    def reached(self, state: TrainerState) -> bool:
        """Whether the best measurement is so many measurements ago."""
        found = self.rewards(state)
        return bool(found) and len(found) - 1 - found.index(max(found)) >= self.patience

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        measured, found = read_estimates(state.log_history), self.rewards(state)
        if state.global_step not in measured:
            return
        if found.index(max(found)) == len(found) - 1:
            self._keep(model)
        control.should_training_stop |= self.reached(state)

    # Where [`HeldOut`] measures, too
    on_train_begin = on_train_end = on_step_end

    def _keep(self, model: Any) -> None:
        process = PartialState()
        if process.is_main_process:
            partial = self.best.with_name(f"{self.best.name}.part")
            shutil.rmtree(partial, ignore_errors=True)
            save_adapter(getattr(model, "module", model), partial)
            shutil.rmtree(self.best, ignore_errors=True)
            partial.rename(self.best)
        process.wait_for_everyone()

    def use_best(self, trainer: Any, folder: Path) -> int:
        """
        Put the best adapter into a trainer's policy and its stage's folder. Every process must make the call.

        Returns:
            `int`: the optimizer step of the best measurement.
        """
        found, steps = self.rewards(trainer.state), list(read_estimates(trainer.state.log_history))
        step = steps[found.index(max(found))]
        if step != trainer.state.global_step:
            if PartialState().is_main_process:
                copy_model(self.best, folder)
            PartialState().wait_for_everyone()
            load_adapter(trainer.accelerator.unwrap_model(trainer.model), self.best)
        return step


def train_stage(
    trainer: Any,
    name: str,
    folder: Path,
    is_over: Callable[[TrainerState], bool],
    held_out: HeldOut | None = None,
) -> None:
    """
    Trains a stage to its end, from its last complete checkpoint if there is one. Every process must make the call.

    Args:
        trainer (trainer of `trl_ext`):
            The stage's trainer, with all callbacks.
        name (`str`):
            The stage's name in messages.
        folder (`Path`):
            The stage's folder, which is the trainer's `output_dir`. The adapter, the trainer's state and what belongs
            to them are written there.
        is_over (`Callable[[TrainerState], bool]`):
            Whether the stage has ended in this state.
        held_out ([`~trl_ext.evaluation.held_out.HeldOut`], *optional*):
            The callback that measures the policy, if there is one.

    Raises:
        StageStoppedError: if training stops in a state in which the stage isn't over.
    """
    checkpoint = whole_checkpoint(folder)
    state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if checkpoint is not None and state is not None and is_over(state):
        # It was killed between its last step and its end. Resuming would train one more step.
        _finish_from(checkpoint, state, trainer, folder, held_out)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if not is_over(trainer.state):
            raise StageStoppedError(
                f"{name} was stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, by a "
                "callback or a signal. The same call resumes from its last checkpoint."
            )
        trainer.save_model(str(folder))
    trainer.save_state()


def _finish_from(checkpoint: Path, state: TrainerState, trainer: Any, folder: Path, held_out: HeldOut | None) -> None:
    """Brings a trainer, and the stage's folder, into the state in which training would have left them."""
    trainer.state = state
    if PartialState().is_main_process:
        copy_model(checkpoint, folder)
    PartialState().wait_for_everyone()
    load_adapter(trainer.model, checkpoint)
    if isinstance(trainer, GRPOTrainer):
        trainer.load_run_state(saved_state(checkpoint)["run"])
    if getattr(trainer, "critic", None) is not None:
        trainer.critic.load(checkpoint / CRITIC)
    if held_out is not None:
        held_out.measured = read_estimates(state.log_history)
        if state.global_step not in held_out.measured:
            held_out.measure(state)


def copy_model(source: Path, target: Path) -> None:
    """Copies adapters, tokenizer and critic, without the files that only a resumed training needs."""
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(FILES_OF_A_RUN):
            shutil.copy2(path, target / path.name)
    for name in (CRITIC, REFERENCE_ADAPTER):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
