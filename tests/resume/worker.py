"""
A run in a process of its own, which may send itself a signal: `worker.py TRAINER FEATURE FOLDER OUTPUT [MOMENT COUNT
SIGNAL [RANK]]`. At the COUNT-th MOMENT it gets the signal; it goes on from its last checkpoint if there is one. At its
end it writes what it was left with, and how many moments of each kind there were. Of several processes, each writes
for itself, and RANK gets the signal.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from resume.cases import PIPELINE, built
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from trl_ext.trainers.seams.whole_checkpoints import checkpoints_of


FORWARD, BEFORE_STEP, AFTER_STEP, SAVE, FLUSH, MOVE = "forward", "before step", "after step", "save", "flush", "move"


class Moments:
    """Counts them, and sends the signal at one."""

    def __init__(self, kind: str = "", count: int = 0, number: int = 0) -> None:
        self.chosen, self.number = (kind, count), number
        self.counts: dict[str, int] = {}

    def at(self, kind: str) -> bool:
        """Whether this is the moment, which it counts."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return (kind, self.counts[kind]) == self.chosen

    def strike(self, kind: str) -> None:
        if self.at(kind):
            os.kill(os.getpid(), self.number)

    def watch(self) -> None:
        save, flush, move = torch.save, os.fsync, Path.rename

        def forward(module: torch.nn.Module, args: Any) -> None:
            if isinstance(module, PreTrainedModel):
                self.strike(FORWARD)

        def torn(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            save(value, file, *args, **kwargs)
            if self.at(SAVE):
                if isinstance(file, str | Path):
                    os.truncate(file, os.path.getsize(file) // 2)
                os.kill(os.getpid(), self.number)

        def flushed(descriptor: int) -> None:
            self.strike(FLUSH)
            flush(descriptor)

        def moved(path: Path, target: Any) -> Path:
            self.strike(MOVE)
            return move(path, target)

        torch.save, os.fsync, Path.rename = torn, flushed, moved  # type: ignore[assignment, method-assign]
        register_module_forward_pre_hook(forward)
        register_optimizer_step_pre_hook(lambda *args: self.strike(BEFORE_STEP))
        register_optimizer_step_post_hook(lambda *args: self.strike(AFTER_STEP))


def run(trainer: str, name: str, folder: Path, output: Path, moments: Moments) -> dict[str, Any]:
    """Trains to the end. Returns weights and state."""
    made = built(trainer, name, folder, output)
    moments.watch()
    if trainer == PIPELINE:
        made.train()
        files = [path for path in output.rglob("*.safetensors") if "checkpoint-" not in str(path)]
        return {str(path.relative_to(output)): path.read_bytes() for path in files}
    made.train(resume_from_checkpoint=bool(checkpoints_of(output)))
    return result(made)


def result(made: Any) -> dict[str, Any]:
    """What has to be equal bit for bit: weights, the reference, the optimizer, what the run knows."""
    found = {"policy": tiny.weights(made.model), "optimizer": made.optimizer.state_dict()}
    if made.ref_model is not None:
        found["reference"] = tiny.weights(made.ref_model)
    if hasattr(made, "run_state"):
        found["run"], found["process"] = made.run_state(), made.process_state()
    return found


if __name__ == "__main__":
    _, trainer, name, folder, output, *when = sys.argv
    rank = os.environ.get("RANK", "0")
    moments = Moments()
    if when and rank == (when[3] if len(when) > 3 else "0"):
        moments = Moments(when[0], int(when[1]), int(signal.Signals[when[2]]))
    found = run(trainer, name, Path(folder), Path(output), moments)
    counts = dict(moments.counts)
    torch.save(found, f"{output}.{rank}.pt")
    Path(f"{output}.{rank}.json").write_text(json.dumps(counts))
    tiny.leave()
