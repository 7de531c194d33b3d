"""
A run that gets SIGTERM: `preemption_worker.py OUTPUT [resume] [long]`. It writes its process id beside OUTPUT, and a
line for each generation batch. With `long`, a step takes a minute.
"""

import os
import sys
import time
from pathlib import Path

import tiny
import torch

from trl_ext import DAPOTrainer


output = Path(sys.argv[1])
rank = os.environ.get("RANK", "0")


def slow(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    with (output.parent / f"batches_{rank}").open("a") as file:
        file.write("x")
    time.sleep(60 if "long" in sys.argv else 0.1)
    return tiny.hashed(completion_ids)


def main() -> None:
    trainer = tiny.trainer(DAPOTrainer, output, slow, max_steps=30, num_iterations=2, save_strategy="no")
    output.parent.joinpath(f"pid_{rank}").write_text(str(os.getpid()))
    trainer.train(resume_from_checkpoint="resume" in sys.argv)
    if trainer.is_world_process_zero():
        torch.save(tiny.weights(trainer.model), output.parent / "weights.pt")
    print("AFTER TRAINING", flush=True)
    trainer.accelerator.wait_for_everyone()


main()
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    tiny.leave()
