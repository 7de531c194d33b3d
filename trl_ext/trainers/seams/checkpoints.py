"""
Checkpoints of `trl.GRPOTrainer` that hold the whole run: what the trainer's own objects know, the state of each
process, and the generation batch that is in use, so that a resumed run equals the uninterrupted one.

Resuming starts between two optimizer steps. TRL's `_step` and buffer run ahead of the last finished one, so the state
at the beginning of the step, the *window*, is kept until the step ends.
"""

import copy
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...roles.saved import read_plain
from ...rollouts.ledger import read_ledger
from ...rollouts.micro_batches import Fit
from ...rollouts.prompt_features import read_features
from .evaluation import WholeEvaluations
from .whole_checkpoints import WholeCheckpoints


logger = get_logger(__name__)

RUN_STATE_FILE = "trl_ext_state.pt"
# What files of state hold beside tensors and plain values, and what makes it
STATE_TYPES: list[Any] = [Fit, read_ledger, read_features]


def random_states() -> dict[str, Any]:
    """States of the generators that transformers saves in a checkpoint."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_random_states(states: dict[str, Any]) -> None:
    """The reverse of [`random_states`]."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def read_state(file: str | os.PathLike[str]) -> Any:
    """
    Read a file of state that a trainer wrote, without running code that somebody may have put into it.

    Raises:
        ValueError: if the file holds anything but tensors, plain values and the types of `STATE_TYPES`.
    """
    return read_plain(file, STATE_TYPES)


def saved_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What [`GRPOSeams`] wrote into a checkpoint: `run`, and where in a generation batch it was."""
    state: dict[str, Any] = read_state(os.path.join(checkpoint, RUN_STATE_FILE))
    return state


class EpochSampler(Sampler[int]):
    """
    TRL's sampler with its order tied to the epoch: TRL's generator starts over when a run is resumed, so that a later
    epoch would repeat the order of the first.

    Args:
        sampler (`Sampler`):
            TRL's `RepeatSampler`.
        epoch (`Callable[[], int]`):
            The epoch that is about to be walked.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self.sampler = sampler
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class CheckpointSeams(WholeCheckpoints, WholeEvaluations, trl.GRPOTrainer):
    """
    Hooks for checkpoints, neutral here.

    - `run_state`, `load_run_state`: what a checkpoint must hold beside the trainer's own, equal on all processes.
    - `process_state`, `load_process_state`: what it must hold for each process.
    """

    # Narrower than upstream's annotations: never None once a trainer exists
    args: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._window: tuple[int | None, int] = (None, 0)  # global step and micro-step at which it began
        self._before_window: dict[str, Any] = {}  # state of the run at that moment
        super().__init__(*args, **kwargs)

    def run_state(self) -> dict[str, Any]:
        """What a resumed run needs beside the trainer's own checkpoint."""
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """The reverse of [`run_state`]."""

    def process_state(self) -> dict[str, Any]:
        """What a resumed process needs of its own: written once a checkpoint, for every process."""
        return {}

    def load_process_state(self, state: dict[str, Any]) -> None:
        """The reverse of [`process_state`]."""

    def load_share_of_process_states(self, states: list[dict[str, Any]]) -> None:
        """Take over this process's share of the [`process_state`] of a different number of processes."""

    @property
    def train_metrics(self) -> dict[str, list[float]]:
        """What TRL averages into its next log of training."""
        return self._metrics["train"]

    def begin_window(self) -> None:
        """Keep the state of the run if an optimizer step begins with this micro-batch."""
        if self._window[0] == self.state.global_step:
            return
        self._window = (self.state.global_step, self._step)
        self._before_window = {
            "random": random_states(),
            "run": copy.deepcopy(self.run_state()),
            "process": self.process_state(),
            "metrics": self._copied_metrics(),
            "num_input_tokens_seen": self.state.num_input_tokens_seen,
        }

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        return EpochSampler(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    @property
    def _finished_micro_steps(self) -> int:
        """Micro-batches of finished optimizer steps; TRL's `_step` runs ahead of it inside a step."""
        global_step, start = self._window
        return start if global_step == self.state.global_step else self._step

    def _buffer_file(self, checkpoint: str | Path) -> str:
        return os.path.join(checkpoint, f"trl_ext_buffer_{self.accelerator.process_index}.pt")

    def _process_file(self, checkpoint: str | Path, process: int | None = None) -> str:
        index = self.accelerator.process_index if process is None else process
        return os.path.join(checkpoint, f"trl_ext_process_{index}.pt")

    def _load_process_states(self, checkpoint: str, processes: int) -> None:
        """Load what each of so many processes wrote. Every process makes the call, and all of them raise or none."""
        if processes == self.accelerator.num_processes:
            if os.path.exists(self._process_file(checkpoint)):
                self.load_process_state(read_state(self._process_file(checkpoint)))
            return
        files = [self._process_file(checkpoint, process) for process in range(processes)]
        missing = [os.path.basename(file) for file in files if not os.path.exists(file)]
        lacking: list[list[str]] = gather_object([missing])
        if all(len(of_process) == processes for of_process in lacking):
            return  # there was nothing to write
        if any(lacking):
            index, names = next((i, names) for i, names in enumerate(lacking) if names)
            raise ValueError(
                f"{checkpoint} was written by {processes} processes, this run has {len(lacking)}, and process "
                f"{index} doesn't find {', '.join(names)}. Each process needs the files of all: put the checkpoint "
                f"where every machine sees it whole, or resume on {processes} processes."
            )
        self.load_share_of_process_states([read_state(file) for file in files])

    @property
    def _layout(self) -> dict[str, int]:
        """What a half-used generation batch depends on."""
        names = ("steps_per_generation", "per_device_train_batch_size", "gradient_accumulation_steps")
        layout = {name: getattr(self.args, name) for name in names}
        return layout | {"num_iterations": self.num_iterations, "num_processes": self.accelerator.num_processes}

    def write_own_files(self, directory: Path) -> None:
        super().write_own_files(directory)
        step = self._finished_micro_steps
        state = {"layout": self._layout, "step": step, "metrics": self._copied_metrics(), "run": self.run_state()}
        if self.args.should_save:
            torch.save(state, os.path.join(directory, RUN_STATE_FILE))
        own = self.process_state()
        if own:
            torch.save(own, self._process_file(directory))
        # Between two generations, the rest of a generation batch is still to be trained on
        if step % (self.args.steps_per_generation * self.num_iterations):
            torch.save(self._buffered_inputs, self._buffer_file(directory))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not os.path.exists(os.path.join(checkpoint, RUN_STATE_FILE)):
            return
        state = saved_state(checkpoint)
        self.load_run_state(state["run"])
        self._load_process_states(checkpoint, state["layout"]["num_processes"])
        self._metrics["train"].update(state["metrics"])
        if state["layout"] != self._layout:
            others = state["layout"]["num_processes"] != self.accelerator.num_processes
            drawn = ", and every process draws other random numbers" if others else ""
            logger.warning(
                f"The checkpoint was written with {state['layout']}, this run has {self._layout}. The generation "
                f"batch that was in use doesn't fit and is generated anew{drawn}; the rest of the run goes on as it "
                "was."
            )
            return
        self._step = state["step"]
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            buffer = read_state(self._buffer_file(checkpoint))
            self._buffered_inputs = send_to_device(buffer, self.accelerator.device)

    def save_before_stopping(self, error: Exception) -> None:
        """Write a checkpoint of the last finished optimizer step before an error ends the process."""
        step = self.state.global_step
        if step == 0 or self.optimizer is None:
            return
        if self.saved_step != step:
            if self._window[0] == step:
                # What the failed generation drew is undone, so that a resumed run draws it again
                set_random_states(self._before_window["random"])
                self.load_run_state(self._before_window["run"])
                self.load_process_state(self._before_window["process"])
                self._metrics["train"] = defaultdict(list, self._before_window["metrics"])
                self.state.num_input_tokens_seen = self._before_window["num_input_tokens_seen"]
            self._save_checkpoint(self.model, trial=None)
        saved = f"{self.args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{step}"
        go_on = (
            "" if self.args.save_only_model else " Go on with `resume_from_checkpoint=True` once the cause is mended."
        )
        error.add_note(f"What was trained until then is saved in {saved}.{go_on}")

    def _copied_metrics(self) -> dict[str, list[float]]:
        return {key: list(values) for key, values in self.train_metrics.items()}
