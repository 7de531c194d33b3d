"""
How long processes wait for each other, and what they say when one of them doesn't come because its reward function
doesn't return.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer
from typing import Any

import torch.distributed as dist
from accelerate.logging import get_logger
from torch.distributed import distributed_c10d

from ...rewards.guard import RewardFunctionError, RewardTimeoutError


logger = get_logger(__name__)

# Share of `ddp_timeout` after which a process that is in a reward function says so: before the others give up
SPEAKS_AFTER = 0.75
# Where it says so: keys of the store that the process group has for all processes
KEY = "trl_ext/reward_function/{}"


def limit_waiting(args: Any) -> None:
    """
    Have `ddp_timeout` limit how long processes wait for each other on CPUs, too: with `use_cpu`, transformers makes a
    process group without passing it on.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The trainer's arguments.
    """
    if dist.is_available() and dist.is_initialized() and args.device.type == "cpu":
        distributed_c10d._set_pg_timeout(timedelta(seconds=args.ddp_timeout))


class RewardWatch:
    """
    Watches the reward functions of a process while the others may be waiting for it.

    Args:
        trainer ([`~trl_ext.trainers.seams.grpo.GRPOSeams`]):
            The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seconds = float(trainer.args.ddp_timeout)
        self.store = distributed_c10d._get_default_store() if trainer.accelerator.num_processes > 1 else None
        self._told = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """
        Around the calls of all reward functions, and the exchange of what they returned.

        Raises:
            RewardTimeoutError: if another process didn't come within `ddp_timeout`, and is in a reward function. (By
                NCCL, a process that waits in vain is ended without an exception. The log says which function it was.)
        """
        if self.store is None:
            yield
            return
        timer = Timer(SPEAKS_AFTER * self.seconds, self._tell)
        timer.daemon = True
        timer.start()
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            notes = [] if time.monotonic() - start < self.seconds else self._notes_of_others()
            if isinstance(error, RewardFunctionError) or not notes:
                raise
            raise RewardTimeoutError(f"{' '.join(notes)} {self._remedy}") from error
        finally:
            timer.cancel()
            if self._told:
                self.store.set(self._key(self._index), "")
                self._told = False

    @property
    def _index(self) -> int:
        index: int = self.trainer.accelerator.process_index
        return index

    @property
    def _remedy(self) -> str:
        return (
            f"Processes wait for each other for ddp_timeout={self.seconds:g} seconds. Set reward_timeout, so that a "
            "call which takes longer is given up and its completions count as not applicable, or raise ddp_timeout."
        )

    def _key(self, index: int) -> str:
        return KEY.format(index)

    def _tell(self) -> None:
        """In a thread of its own, because the main thread is in the function."""
        names = dict.fromkeys(func.__name__ for func in self.trainer.reward_guards if func.running)
        if self.trainer.rewards_ahead is not None:
            names |= dict.fromkeys(self.trainer.rewards_ahead.running)
        if not names:
            return
        assert self.store is not None
        shown = ", ".join(f"`{name}`" for name in names)
        note = f"The reward function {shown} of process {self._index} has not returned."
        self._told = True
        self.store.set(self._key(self._index), note)
        logger.error(f"{note} {self._remedy}", main_process_only=False)

    def _notes_of_others(self) -> list[str]:
        assert self.store is not None
        others = [i for i in range(self.trainer.accelerator.num_processes) if i != self._index]
        keys = [self._key(i) for i in others if self.store.check([self._key(i)])]
        return [note for note in (self.store.get(key).decode() for key in keys) if note]
