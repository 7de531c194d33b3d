"""One process doesn't come, and the others wait for it: what they say, and after how long."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from distributed.dpo_worker import pairs

import trl_ext


SECONDS = 4  # that processes wait
RANK = int(os.environ.get("RANK", "0"))


def judge(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Doesn't return on the last process."""
    if RANK == 1:
        time.sleep(600)
    return tiny.hashed(completion_ids)


async def judge_later(**columns: Any) -> list[float]:
    return judge(**columns)


def hang(output_dir: Path, **settings: Any) -> None:
    func = judge_later if settings.pop("later", False) else judge
    trainer = tiny.trainer(trl_ext.GRPOTrainer, output_dir, func, ddp_timeout=SECONDS, **settings)
    trainer.train()


def wait(output_dir: Path) -> None:
    trainer = trl_ext.DPOTrainer(
        tiny.qwen2(),
        ref_model=tiny.qwen2(),
        args=trl_ext.DPOConfig(**tiny.pair_settings(output_dir, ddp_timeout=SECONDS)),
        train_dataset=pairs(4),
        processing_class=tiny.tokenizer(),
    )
    if RANK == 1:
        time.sleep(600)
    trainer.accelerator.wait_for_everyone()


CASES: dict[str, Any] = {
    "function": hang,
    "async function": lambda output_dir: hang(output_dir, later=True),
    "in flight": lambda output_dir: hang(output_dir, rewards_in_flight=2),
    "no function": wait,
}


if __name__ == "__main__":
    start = time.monotonic()
    try:
        CASES[sys.argv[2]](Path(sys.argv[1], "out"))
    except RuntimeError as raised:
        said = {"error": type(raised).__name__, "message": str(raised), "seconds": time.monotonic() - start}
        Path(sys.argv[1], "said.json").write_text(json.dumps(said))
        os._exit(3)  # gloo would wait for the other process at the end
