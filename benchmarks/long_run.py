"""
Does a run of thousands of steps grow? Memory, time of a step, and the size of what a checkpoint holds, against the
number of steps.

A tiny model (109k parameters) sorts digits: DAPO with informed draws and refill, and PPO with a head critic, a
reference and a KL. Every `--every` steps are noted, each in a process of its own:

- `rss_mb`: memory of the process, as the system counts it, and `tensor_mb`, the bytes of all tensors that Python
  holds, each storage once;
- `step_s`: CPU time of a step, the mean since the last note, without checkpoints;
- `state_mb`: the run's own state in the last checkpoint (`trl_ext_state.pt`), `log_mb`: `trainer_state.json`, where
  transformers keeps everything that was logged, and `checkpoint_mb`: all files of it; `prompts`: how many prompts the
  outlook knows.

`--report` writes a table and a picture.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from learning_report import write_report
from task import ROOT, TrainingTask, apart
from transformers import TrainerCallback

from trl_ext import DAPOConfig, DAPOTrainer, PPOConfig, PPOTrainer
from trl_ext.rollouts.informed import AdaptiveOutlook
from trl_ext.trainers.seams.checkpoints import RUN_STATE_FILE
from trl_ext.trainers.seams.whole_checkpoints import TRAINER_STATE, checkpoints_of


METHODS = ("DAPO", "PPO")
MEGABYTE = 1e6
COLUMNS = {
    "rss_mb": "memory, MB",
    "tensor_mb": "tensors, MB",
    "step_s": "step, CPU-s",
    "prompts": "prompts known",
    "state_mb": "state, MB",
    "log_mb": "log, MB",
    "checkpoint_mb": "checkpoint, MB",
}


def tensor_bytes() -> int:
    """The storages of all tensors that Python's collector knows."""
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Notes(TrainerCallback):
    """Notes what a run takes."""

    def __init__(self, method: str, every: int) -> None:
        self.method, self.every = method, every
        self.trainer: Any = None  # set when there is one
        self.rows: list[dict[str, float]] = []
        self._seconds = self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.process_time() - self._started
        if state.global_step % self.every:
            return
        gc.collect()
        row = {"step": state.global_step, "step_s": self._seconds / self.every}
        row |= {"rss_mb": resident_bytes() / MEGABYTE, "tensor_mb": tensor_bytes() / MEGABYTE}
        if isinstance(self.trainer.chooser, AdaptiveOutlook):
            row["prompts"] = float(len(self.trainer.chooser.outlooks[-1].state_dict()["prompts"]))
        newest = next(iter(checkpoints_of(Path(args.output_dir))), None)
        if newest is not None:
            sizes = {path.name: path.stat().st_size / MEGABYTE for path in newest.rglob("*") if path.is_file()}
            row |= {"state_mb": sizes[RUN_STATE_FILE], "log_mb": sizes[TRAINER_STATE]}
            row |= {"checkpoint_mb": sum(sizes.values())}
        self.rows.append(row)
        self._seconds = 0.0
        print(self.method, json.dumps(row), flush=True)


def matching(prompts: list[str], completion_ids: list[list[int]], answer_ids: list[list[int]], **kwargs: Any) -> Any:
    """How much of an answer is right, so that an untrained model learns, and nothing for every other prompt."""
    shares = [
        sum(a == b for a, b in zip(ids, answer, strict=False)) / len(answer)
        for ids, answer in zip(completion_ids, answer_ids, strict=True)
    ]
    return [share * (sum(map(ord, prompt)) % 2) for share, prompt in zip(shares, prompts, strict=True)]


def run(method: str, steps: int, every: int, prompts: int) -> list[dict[str, float]]:
    """Trains, and returns what was noted."""
    with tempfile.TemporaryDirectory() as folder:
        return trained(method, steps, every, prompts, folder)


def trained(method: str, steps: int, every: int, prompts: int, folder: str) -> list[dict[str, float]]:
    """[`run`] with its output in a folder."""
    task = TrainingTask(train_size=prompts, reward_func=matching)
    settings = task.settings(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        max_completion_length=8,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=10,
    )
    if method == "DAPO":
        own = {"refill_draws": "informed", "updates_per_generation": 1, "soft_punish_cache": 0, "warmup_steps": 0}
        trainer: Any = DAPOTrainer(args=DAPOConfig(**settings, **own), **task.arguments())
    else:
        trainer = PPOTrainer(args=PPOConfig(**settings, num_iterations=1), **task.arguments())
    notes = Notes(method, every)
    notes.trainer = trainer
    trainer.add_callback(notes)
    trainer.train()
    return notes.rows


def growth(rows: list[dict[str, float]], column: str) -> float:
    """How much larger the median of the last quarter of a run is than that of its second, as a share of the latter."""
    values = [row[column] for row in rows if column in row] or [0.0]
    quarter = max(len(values) // 4, 1)
    before, after = (statistics.median(part) for part in (values[quarter : 2 * quarter] or values, values[-quarter:]))
    return after / before - 1 if before else 0.0


def markdown(found: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"| | step | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS)]
    for method, rows in found.items():
        for share in (0.1, 0.25, 0.5, 0.75, 1.0):
            row = rows[max(round(share * len(rows)), 1) - 1]
            cells = [f"{row[name]:.4g}" if name in row else "" for name in COLUMNS]
            lines.append(f"| {method} | {row['step']:.0f} | {' | '.join(cells)} |")
        cells = [f"{growth(rows, name):+.1%}" for name in COLUMNS]
        lines.append(f"| {method} | last quarter against second | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"memory, MB": ("rss_mb",), "step, CPU-s": ("step_s",), "in a checkpoint, MB": ("state_mb", "log_mb")}
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.6), layout="constrained")
    for axis, (label, columns) in zip(axes, panels.items(), strict=True):
        for method, colour in zip(found, ("#D55E00", "#0072B2"), strict=False):
            for column, style in zip(columns, ("-", "--"), strict=False):
                points = [(row["step"], row[column]) for row in found[method] if column in row]
                name = f"{method}, {COLUMNS[column].split(',')[0]}" if len(columns) > 1 else method
                axis.plot(*zip(*points, strict=True), style, color=colour, label=name)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--every", type=int, default=50, help="steps between two notes, and between two checkpoints")
    parser.add_argument("--prompts", type=int, default=20_000, help="size of the data set")
    parser.add_argument("--report", action="store_true", help="write the table into benchmarks/RESULTS.md")
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {method: apart(run, method, args.steps, args.every, args.prompts) for method in args.methods}
    print(markdown(found))
    if args.report:
        plot(found, ROOT / "benchmarks" / "long_run.png")
        write_report("long_run.py", None, markdown(found))
    if args.json:
        print(json.dumps({method: {name: growth(rows, name) for name in COLUMNS} for method, rows in found.items()}))


if __name__ == "__main__":
    main()
