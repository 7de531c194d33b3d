"""
One of several processes, started without a launcher that would end them: `lost_worker.py OUTPUT CASE`. The last one is
killed, or stops, in the middle of training. In the case "elsewhere", the others aren't waiting in a collective at that
time, of which gloo would say that it has failed, but in something that never ends, as NCCL can be.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

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


def main() -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = tiny.trainer(trl_ext.DAPOTrainer, output, judge, num_iterations=1, **settings)
    assert trainer.accelerator.num_processes == LAST + 1
    trainer.train()


main()
