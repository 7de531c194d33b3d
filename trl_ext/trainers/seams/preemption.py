"""
SIGTERM, which schedulers send before they take a machine away. Training ends after the optimizer step that is under
way, on all processes after the same one, with a checkpoint; then the process ends with a status of its own, so that
nothing that comes after `train` takes the run for finished. A second signal ends the process at once.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback


logger = get_logger(__name__)

# Exit status of a process whose training was ended by SIGTERM and is saved: `EX_TEMPFAIL`, "try again later"
PREEMPTED = 75


class PreemptedError(SystemExit):
    """Training was ended by SIGTERM, and what was trained is saved. Ends the process with the status `PREEMPTED`."""

    def __init__(self, message: str) -> None:
        super().__init__(PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption(TrainerCallback):
    """
    Ends training when a signal asks for it.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.

    Attributes:
        asked (`bool`):
            Whether this process got the signal.
        agreed (`bool`):
            Whether all processes stop.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.asked = self.agreed = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = True
        # Not print: the signal may have interrupted one, whose buffer then refuses a second with a RuntimeError
        os.write(
            2, b"SIGTERM: training ends after this optimizer step, with a checkpoint. A second one ends it now.\n"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accelerator = self.trainer.accelerator
        asked = torch.tensor([float(self.asked)], device=accelerator.device)
        if not bool(accelerator.reduce(asked, reduction="sum") > 0):
            return
        self.agreed = control.should_save = control.should_training_stop = True

    def leave_if_asked(self) -> None:
        """
        After training.

        Raises:
            PreemptedError: if a signal ended it.
        """
        if not self.agreed:
            return
        step = self.trainer.state.global_step
        message = (
            f"Training was ended by SIGTERM after step {step} and is saved in {self.trainer.args.output_dir}. Resume "
            "with resume_from_checkpoint=True."
        )
        accelerator = self.trainer.accelerator
        accelerator.print(message, flush=True)
        accelerator.end_training()
        if accelerator.num_processes > 1:
            # A thread of gloo that releases its last tensor after the interpreter has ended aborts the process
            time.sleep(0.1)
        raise PreemptedError(message)


@contextmanager
def _handling(number: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within this context, `handler` takes a signal; afterwards whatever took it before, also if that is no Python."""
    before = ctypes.create_string_buffer(1024)  # more than `struct sigaction` has anywhere
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is not None:
        libc.sigaction(int(number), None, before)
    # `None` for a handler that was there before Python. Of one that a library has set since, Python knows nothing
    known = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if known is None else known)
        if libc is not None:
            libc.sigaction(int(number), before, None)


@contextmanager
def preemption_of(trainer: Any) -> Iterator[Preemption]:
    """Handle SIGTERM while a trainer trains, if its process lets this thread handle signals."""
    preemption = Preemption(trainer)
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    trainer.add_callback(preemption)
    try:
        with _handling(signal.SIGTERM, preemption.handle):
            yield preemption
    finally:
        trainer.remove_callback(preemption)
