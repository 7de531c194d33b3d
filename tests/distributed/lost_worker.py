"""
One of several processes, started without a launcher that would end them: `lost_worker.py OUTPUT CASE`. The last one is
killed, or stops, in the middle of training. In the case "elsewhere", the others aren't waiting in a collective at that
time, of which gloo would say that it has failed, but in something that never ends, as NCCL can be. In the
case "at once", the last one kills itself as soon as training begins.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from transformers import TrainerCallback

import trl_ext


RANK, LAST = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
output, case = Path(sys.argv[1]), sys.argv[2]


def judge(completion_ids: list[list[int]], trainer_state: Any, **kwargs: Any) -> list[float]:
    if trainer_state.global_step == 1:
        output.with_name(f"pid_{RANK}").write_text(str(os.getpid()))
        if RANK == LAST and case == "stops":
            raise KeyboardInterrupt("no more")
        if RANK == LAST or case == "elsewhere":
            time.sleep(600)
    return tiny.hashed(completion_ids)


class Dies(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = tiny.trainer(trl_ext.DAPOTrainer, output, judge, num_iterations=1, **settings)
    assert trainer.accelerator.num_processes == LAST + 1
    if RANK == LAST and case == "at once":
        trainer.add_callback(Dies())
    if RANK == 0 and case == "at once":
        time.sleep(1)  # the other is early
    trainer.train()


main()
