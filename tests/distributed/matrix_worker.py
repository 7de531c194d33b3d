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


class Ended(TrainerCallback):
    """Looks at a trainer at the end of its training, before a schedule lets go of it."""

    def __init__(self, engine: str, trainer: Any) -> None:
        self.engine, self.trainer = engine, trainer
        self.seen: dict[str, Any] = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = {
            "engine": self.engine != ALONE and ENGINES[self.engine].is_it(self.trainer),
            "last": weights_of(self.trainer),
            "processes": self.trainer.accelerator.num_processes,
        }


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
        "log": trainer.state.log_history,
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

    def watched(where: Path, *callbacks: TrainerCallback, resumed: bool = False) -> dict[str, Any]:
        """What was seen of the last stage."""
        seen: dict[str, Any] = {}

        def prepare(stage: str, trainer: Any) -> None:
            with_momentum(trainer)
            if stage == "ppo":
                seen.update(before=weights_of(trainer), compared=Compared(trainer), ended=Ended(engine, trainer))
                trainer.rollout_func = None if resumed else trainer.rollout_func
                for callback in (seen["compared"], seen["ended"], *callbacks):
                    trainer.add_callback(callback)

        schedule = make(where)
        schedule.prepare = prepare
        schedule.train()
        return {"before": seen["before"], "after": seen["compared"].weights, **seen["ended"].seen}

    found = watched(output)
    if processes == 1:
        return found
    found["moved on"] = bool(differences(found["last"], found["after"]))
    cut = output.with_name(f"{output.name}_resumed")
    with suppress(KeyboardInterrupt):
        watched(cut, Interruption())
    found["not resumed"] = differences(watched(cut, resumed=True)["last"], found["last"])
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
