"""
Uploads to the Hub that fail or get no answer. They cost the upload, never the training or what it left on the disk.
"""

import concurrent.futures
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.logging import get_logger


logger = get_logger(__name__)

# How long the end of a training waits for checkpoints that are still being uploaded, in seconds
PATIENCE = 600.0


def save_without_push(trainer: Any) -> None:
    """Save the model into the output folder. `save_model` alone would upload it, before anything else is written."""
    trainer.save_model(trainer.args.output_dir, _internal_call=True)


@contextmanager
def push_of_checkpoint(trainer: Any) -> Iterator[None]:
    """Within this context, a checkpoint is handed to the Hub's client. What fails is reported, and ends nothing."""
    report_failed(trainer)
    try:
        yield
    except Exception as error:
        _report(trainer, error)


def report_failed(trainer: Any) -> None:
    """Report uploads in the background that have failed, each once."""
    jobs = getattr(trainer.push_in_progress, "jobs", []) if hasattr(trainer, "push_in_progress") else []
    for job in [job for job in jobs if job.done()]:
        jobs.remove(job)
        error = None if job.cancelled() else job.exception()
        if error is not None:
            _report(trainer, error)


def _report(trainer: Any, error: BaseException) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    logger.warning(
        f"A checkpoint was not pushed to {trainer.hub_model_id} ({reason}). Training goes on, and checkpoints are "
        f"saved in {trainer.args.output_dir} as always."
    )


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
