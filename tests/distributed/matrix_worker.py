"""
Runs the cells of one engine one after another, on however many processes it was started with: `matrix_worker.py ENGINE
FOLDER [ROW ...]`, rows by their numbers. It writes what it found of each, and goes on where one is refused.
"""

import os
import sys
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from distributed.fsdp_worker import allow_fsdp_on_cpus
from distributed.matrix import ALONE, COMPARED, ENGINES, PIPELINE, REFUSED, ROWS, build, with_momentum
from transformers import TrainerCallback

from trl_ext.trainers.seams.whole_checkpoints import gathered_weights


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return gathered_weights(trainer.accelerator.unwrap_model(trainer.model))


class Compared(TrainerCallback):
    """Keeps the weights after the steps that one process takes as well, and has the trainer sample from then on."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == COMPARED:
            self.weights = weights_of(self.trainer)
            self.trainer.rollout_func = None


class Interruption(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == COMPARED:
            raise KeyboardInterrupt


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, weight in expected.items() if name not in found or not torch.equal(found[name], weight)]


def run(engine: str, method: str, weights: str, folder: Path, output: Path, processes: int) -> dict[str, Any]:
    """What a cell comes to: weights after the compared steps, and what is wrong with the rest, if anything is."""
    make = partial(build, method, weights, folder, processes=processes)
    if method == PIPELINE:
        return run_pipeline(engine, make, output, processes)
    trainer = make(output)
    before = weights_of(trainer) if processes == 1 else {}
    trainer.add_callback(compared := Compared(trainer))
    trainer.train()
    found: dict[str, Any] = {
        "before": before,
        "after": compared.weights,
        "processes": trainer.accelerator.num_processes,
    }
    if processes == 1:
        return found
    found["engine"] = ENGINES[engine].is_it(trainer)
    found["last"] = last = weights_of(trainer)
    trainer.save_model()
    again = make(output.with_name(f"{output.name}_resumed"), resumed=True)
    again.train(resume_from_checkpoint=str(output / f"checkpoint-{COMPARED}"))
    found["not resumed"] = differences(weights_of(again), last)
    found["moved on"] = bool(differences(last, compared.weights))
    return found


def run_pipeline(engine: str, make: Any, output: Path, processes: int) -> dict[str, Any]:
    """As [`run`]. A schedule that is interrupted resumes by itself."""

    def watched(where: Path, *callbacks: TrainerCallback, resumed: bool = False) -> tuple[Any, dict[str, Any]]:
        """The trainer of the last stage after its training, and what was seen of it."""
        seen: dict[str, Any] = {}

        def prepare(stage: str, trainer: Any) -> None:
            with_momentum(trainer)
            if stage == "ppo":
                seen.update(trainer=trainer, before=weights_of(trainer), compared=Compared(trainer))
                trainer.rollout_func = None if resumed else trainer.rollout_func
                for callback in (seen["compared"], *callbacks):
                    trainer.add_callback(callback)

        schedule = make(where)
        schedule.prepare = prepare
        schedule.train()
        return seen.pop("trainer"), seen

    trainer, seen = watched(output)
    compared = seen["compared"].weights
    found = {"before": seen["before"], "after": compared, "processes": trainer.accelerator.num_processes}
    if processes == 1:
        return found
    found["engine"] = ENGINES[engine].is_it(trainer)
    found["last"] = last = weights_of(trainer)
    found["moved on"] = bool(differences(last, compared))
    cut = output.with_name(f"{output.name}_resumed")
    with suppress(KeyboardInterrupt):
        watched(cut, Interruption())
    trainer, _ = watched(cut, resumed=True)
    found["not resumed"] = differences(weights_of(trainer), last)
    return found


def main(engine: str, folder: Path, rows: list[int]) -> None:
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if "FSDP" in engine:
        allow_fsdp_on_cpus(ENGINES[engine].fsdp)
    for number in rows or range(len(ROWS)):
        method, weights = ROWS[number]
        if engine == ALONE and all((name, method, weights) in REFUSED for name in ENGINES):
            continue
        output = folder / "runs" / engine / str(number)
        try:
            found = run(engine, method, weights, folder, output, processes)
        except (ValueError, TypeError, NotImplementedError) as error:
            found = {"refused": str(error), "traceback": traceback.format_exc()}
        torch.save(found, folder / f"{engine}_{number}_{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(number) for number in sys.argv[3:]])
    tiny.leave()
