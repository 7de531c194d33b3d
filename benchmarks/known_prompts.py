"""
What a trainer pays for what it knows of prompts: time of an optimizer step's bookkeeping, and seconds and MB of a
checkpoint, by the number of prompts that were seen.

Two trainers on a tiny model: DAPO with `refill_draws="informed"` (three outlooks), and GRPO with a curriculum. They
are shown groups of 4 completions with random outcomes in batches of 1,024 prompts, as generation would: fewer than 100
batches, so that no evidence has faded enough to be dropped. Then measured, as medians over `--repeats`, each after one
more batch of 64 prompts that were seen before:

Times are those of this process's CPU, so that other jobs on the machine count for little.

- `step_ms`: what the beginning of an optimizer step keeps, so that a failure in it can be undone;
- `first_save_s`, `save_s`: a whole checkpoint, the first one and later ones; `plain_save_s` is that of a trainer
  which has seen nothing;
- `state_mb`: the file with the state of the run; `read_s`: reading it, and putting it back.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from recipes.tasks.sort_digits import build_model, build_tokenizer
from trl_ext import DAPOConfig, DAPOTrainer, DifficultyCurriculum, GRPOConfig, GRPOTrainer
from trl_ext.rollouts.selection import has_variance
from trl_ext.trainers.seams.checkpoints import RUN_STATE_FILE, saved_state


GENERATIONS = 4
AT_ONCE = 1024
AGAIN = 64


def constant(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [0.0] * len(completion_ids)


def build(kind: str, directory: str) -> Any:
    tokenizer = build_tokenizer()
    settings = {
        "output_dir": directory,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "num_generations": GENERATIONS,
        "per_device_train_batch_size": GENERATIONS,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 4,
        "max_steps": 1,
        "logging_steps": 100,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    rows = Dataset.from_dict({"prompt": [f"s{i}=" for i in range(10, 74)], "level": list(range(64))})
    given = {"model": build_model(tokenizer, 0), "reward_funcs": constant, "processing_class": tokenizer}
    if kind == "informed":
        own = {"refill_draws": "informed", "updates_per_generation": 1, "soft_punish_cache": 0, "warmup_steps": 0}
        return DAPOTrainer(args=DAPOConfig(**settings, **own), train_dataset=rows, **given)
    curriculum = DifficultyCurriculum("frontier", "level")  # without a column it knows what "informed" does
    return GRPOTrainer(args=GRPOConfig(**settings), train_dataset=rows, curriculum=curriculum, **given)


def show(chooser: Any, numbers: range, generator: torch.Generator) -> None:
    """One generation batch with these prompts."""
    getattr(chooser, "tick", lambda: None)()
    outcomes = (torch.rand(len(numbers), GENERATIONS, generator=generator) < 0.5).float()
    chooser.observe([{"prompt": f"p{i}"} for i in numbers], outcomes, has_variance(outcomes).tolist())


def seconds(body: Callable[[], Any]) -> float:
    started = time.process_time()
    body()
    return time.process_time() - started


def begin_step(trainer: Any) -> None:
    trainer._window = (None, 0)
    trainer.begin_window()


def save(trainer: Any) -> None:
    trainer.state.global_step += 1
    trainer._save_checkpoint(trainer.model, trial=None)


def measure(kind: str, prompts: int, repeats: int, directory: str) -> dict[str, float]:
    trainer, generator = build(kind, directory), torch.Generator().manual_seed(0)
    trainer.train()  # an optimizer and a schedule to save
    save(trainer)  # whatever is done once
    plain = statistics.median(seconds(lambda: save(trainer)) for _ in range(3))
    for start in range(0, prompts, AT_ONCE):
        show(trainer.chooser, range(start, min(start + AT_ONCE, prompts)), generator)
    steps, saves = [], []
    for i in range(repeats):
        show(trainer.chooser, range(i * AGAIN, (i + 1) * AGAIN), generator)
        steps.append(seconds(lambda: begin_step(trainer)))
        saves.append(seconds(lambda: save(trainer)))
    checkpoint = Path(directory) / f"checkpoint-{trainer.state.global_step}"
    return {
        "step_ms": 1000 * statistics.median(steps),
        "plain_save_s": plain,
        "first_save_s": saves[0],
        "save_s": statistics.median(saves[1:] or saves),
        "state_mb": os.path.getsize(checkpoint / RUN_STATE_FILE) / 1e6,
        "read_s": seconds(lambda: trainer.load_run_state(saved_state(checkpoint)["run"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    args = parser.parse_args()
    found: dict[str, dict[int, dict[str, float]]] = {}
    for kind in ("informed", "curriculum"):
        found[kind] = {}
        for prompts in args.prompts:
            with tempfile.TemporaryDirectory() as directory:
                found[kind][prompts] = measured = measure(kind, prompts, args.repeats, directory)
            print(kind, prompts, *(f"{name} {value:.3g}" for name, value in measured.items()), flush=True)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
