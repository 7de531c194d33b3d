"""
How long does a run with a million prompts take to its first step, and how much memory, next to one with a thousand?

GRPO, DAPO with blind and with informed draws, and GRPO with a curriculum, by predictions and by a column, on a tiny
model. For each number of prompts, in a process of its own: CPU seconds and wall-clock time from the construction of
the trainer to the end of the first optimizer step, what the process's memory grew by in that time, and how many rows
of the data set were read. The data set is in a file, as `datasets` keeps one that was loaded, and is made beforehand.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from task import apart

from recipes.tasks.sort_digits import build_model, build_tokenizer
from trl_ext import DAPOConfig, DAPOTrainer, DifficultyCurriculum, GRPOConfig, GRPOTrainer


KINDS = ("GRPO", "blind", "informed", "curriculum", "column")
MEGABYTE = 1e6


def first_even(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Half of the completions of an untrained model."""
    return [float(ids[0] % 2) for ids in completion_ids]


def build(kind: str, data: Any, directory: str) -> Any:
    tokenizer = build_tokenizer()
    settings = {
        "output_dir": directory,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 4,
        "max_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    given = {"model": build_model(tokenizer, 0), "reward_funcs": first_even, "processing_class": tokenizer}
    if kind in ("blind", "informed"):
        own = {"refill_draws": kind, "updates_per_generation": 1, "soft_punish_cache": 0, "warmup_steps": 0}
        return DAPOTrainer(args=DAPOConfig(**settings, **own), train_dataset=data, **given)
    curriculum = {"curriculum": DifficultyCurriculum(), "column": DifficultyCurriculum(column="level")}.get(kind)
    return GRPOTrainer(args=GRPOConfig(**settings), train_dataset=data, curriculum=curriculum, **given)


@contextmanager
def counting_rows() -> Iterator[dict[str, int]]:
    """Counts what is read of data sets: rows, and values of whole columns."""
    counts = {"rows": 0, "values": 0}
    read = Dataset.__getitem__

    def counted(self: Any, key: Any) -> Any:
        if isinstance(key, int):
            counts["rows"] += 1
        elif isinstance(key, slice):  # of one column, from which all is read at once, or of rows
            counts["values" if len(self.column_names) == 1 else "rows"] += len(range(len(self))[key])
        elif not isinstance(key, str):  # which reads nothing yet
            counts["rows"] += len(key)
        return read(self, key)

    Dataset.__getitem__ = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Dataset.__getitem__ = read  # type: ignore[method-assign]


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def measure(kind: str, folder: str) -> dict[str, float]:
    """One run to its first step, after a shorter one that does whatever is done once."""
    with tempfile.TemporaryDirectory() as directory:
        build(
            kind, Dataset.from_dict({"prompt": [f"s{i}=" for i in range(64)], "level": list(range(64))}), directory
        ).train()
    data = load_from_disk(folder)
    with tempfile.TemporaryDirectory() as directory, counting_rows() as counts:
        wall, cpu, memory = time.perf_counter(), time.process_time(), resident()
        build(kind, data, directory).train()
        return {
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.perf_counter() - wall,
            "memory_mb": resident() - memory,
            "rows_read": counts["rows"],
            "values_read": counts["values"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in args.kinds}
    with tempfile.TemporaryDirectory() as folder:
        for prompts in args.prompts:
            rows = {"prompt": [f"s{i}=" for i in range(prompts)], "level": list(range(prompts))}
            Dataset.from_dict(rows).save_to_disk(f"{folder}/{prompts}")
        for kind in args.kinds:
            for prompts in args.prompts:
                found[kind][prompts] = measured = apart(measure, kind, f"{folder}/{prompts}")
                print(kind, prompts, *(f"{name} {value:.4g}" for name, value in measured.items()), flush=True)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
