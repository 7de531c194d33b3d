"""
Uploads to the Hub that fail or get no answer. They cost the upload, never the training or what it left on the disk.
"""

import concurrent.futures
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer_utils import HubStrategy

from ...roles.critic_contract import CRITIC


logger = get_logger(__name__)

# Answers by which the Hub is busy or has failed. By others it refuses: the user has something to change.
BUSY_OR_BROKEN = (429, *range(500, 600))
# How long the end of a training waits for checkpoints that are still being uploaded, in seconds
PATIENCE = 600.0


def save_without_push(trainer: Any) -> None:
    """Save the model into the output folder. `save_model` alone would upload it, before anything else is written."""
    trainer.save_model(trainer.args.output_dir, _internal_call=True)


@contextmanager
def creation_of_repository(trainer: Any) -> Iterator[None]:
    """
    Within this context, the main process creates the repository. A Hub that is out of reach when a trainer is made
    costs the pushes of checkpoints; the final one tries again.
    """
    try:
        yield
    except Exception as error:
        if hasattr(trainer, "control") or not out_of_reach(error):  # the trainer has been made
            raise
        logger.warning(
            f"The Hub could not be asked for a repository ({_in_short(error)}). Training starts without one: no "
            f"checkpoint is pushed, all is saved in {trainer.args.output_dir}, and `push_to_hub` tries again."
        )


@contextmanager
def push_of_checkpoint(trainer: Any) -> Iterator[None]:
    """Within this context, a checkpoint is handed to the Hub's client. What fails is reported, and ends nothing."""
    report_failed(trainer)
    try:
        yield
    except Exception as error:
        _report(trainer, error)


def copy_critic(trainer: Any, checkpoint: str) -> None:
    """Copy the critic of a checkpoint into the output folder, which is pushed. Transformers copies only the policy."""
    source, under_way = Path(checkpoint) / CRITIC, getattr(trainer, "push_in_progress", None)
    waits = under_way is not None and not under_way.is_done() and not trainer.args.hub_always_push
    pushes = trainer.is_world_process_zero() and trainer.args.hub_strategy != HubStrategy.END and not waits
    if pushes and source.is_dir():
        shutil.copytree(source, Path(trainer.args.output_dir) / CRITIC, dirs_exist_ok=True)


def report_failed(trainer: Any) -> None:
    """Report uploads in the background that have failed, each once."""
    jobs = getattr(trainer.push_in_progress, "jobs", []) if hasattr(trainer, "push_in_progress") else []
    for job in [job for job in jobs if job.done()]:
        jobs.remove(job)
        error = None if job.cancelled() else job.exception()
        if error is not None:
            _report(trainer, error)


def _report(trainer: Any, error: BaseException) -> None:
    logger.warning(
        f"A checkpoint was not pushed to {trainer.hub_model_id} ({_in_short(error)}). Training goes on, and "
        f"checkpoints are saved in {trainer.args.output_dir} as always."
    )


def out_of_reach(error: BaseException) -> bool:
    """Whether an error of the Hub's client may pass: there was no connection, or the Hub has failed to answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    # By its name, because httpx goes by another in newer clients
    return status in BUSY_OR_BROKEN or any(cls.__name__ == "TransportError" for cls in type(error).__mro__)


def _in_short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def wait_for_pushes(trainer: Any) -> None:
    """Wait until uploads in the background have ended, for `PATIENCE` at most, and report those that failed."""
    pushes = getattr(trainer, "push_in_progress", None)
    if pushes is None:
        return
    _, unfinished = concurrent.futures.wait(pushes.jobs, timeout=PATIENCE)
    report_failed(trainer)
    if unfinished:
        logger.warning(
            f"The upload of a checkpoint to {trainer.hub_model_id} has not ended after {PATIENCE:.0f} s. It is left "
            "to itself; it can keep the process from ending, until the Hub's client gives up."
        )
        trainer.push_in_progress = None
