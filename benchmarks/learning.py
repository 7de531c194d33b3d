"""
Which method learns faster, and by what measure? GRPO (TRL's own trainer), DAPO, DUPO and GSPO on set A of the sorting
task: a model that was shown 3 to 8 digits is trained on 4 to 14.

Every method gets the same start (a supervised warm-up, one per seed), the same number of generation batches of 32
prompts × 8 completions, 4 optimizer steps on each, the same learning rate and schedule, and its own defaults for the
rest. pass@1 is sampled at temperature 1 on held-out prompts; tokens and CPU-seconds count everything but evaluation.

```shell
python benchmarks/learning.py --seeds 5 --report
```
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import trl
from scipy import stats
from task import ROOT, TrainingTask
from transformers import TrainerCallback

import trl_ext
from recipes.tasks.sort_digits import exact_match


mpl.use("Agg")

METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, {}),
    "DAPO": (trl_ext.DAPOTrainer, trl_ext.DAPOConfig, {"soft_punish_cache": 0, "warmup_steps": 0}),
    "DUPO": (trl_ext.DUPOTrainer, trl_ext.DUPOConfig, {}),
    "GSPO": (trl_ext.GSPOTrainer, trl_ext.GSPOConfig, {}),
}
# Okabe and Ito's colours
COLOURS = {"GRPO": "#000000", "DAPO": "#D55E00", "DUPO": "#009E73", "GSPO": "#0072B2"}
AXES = {"steps": "optimizer steps", "tokens": "generated tokens", "cpu": "CPU-seconds"}


class TokenCounter:
    """The reward, counting every token that was generated: the same count for every trainer."""

    __name__ = "exact_match"

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        return exact_match(completion_ids, **kwargs)


class Curve(TrainerCallback):
    """Samples pass@1 every few steps, outside the clocks and the random state of training."""

    def __init__(self, task: TrainingTask, counter: TokenCounter, every: int, samples: int) -> None:
        self.task, self.counter, self.every, self.samples = task, counter, every, samples
        self.points: list[dict[str, float]] = []
        self.evaluating = 0.0

    @torch.no_grad()
    def measure(self, model: Any) -> float:
        tokenizer, test = self.task.tokenizer, self.task.data["test"]
        right = 0.0
        training = model.training
        model.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for start in range(0, len(test), 256):
                rows = test[start : start + 256]
                inputs = tokenizer(rows["prompt"], return_tensors="pt", padding=True)
                out = model.generate(
                    **inputs,
                    do_sample=True,
                    max_new_tokens=18,
                    num_return_sequences=self.samples,
                    top_k=0,
                    pad_token_id=tokenizer.pad_token_id,
                )
                completions = out[:, inputs["input_ids"].size(1) :].tolist()
                answers = [ids for ids in rows["answer_ids"] for _ in range(self.samples)]
                for ids, answer in zip(completions, answers, strict=True):
                    right += ids[: len(answer)] == answer  # an answer ends with eos: what follows is padding
        model.train(training)
        return right / (len(test) * self.samples)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.started = time.process_time()
        self.point(state.global_step, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.point(state.global_step, model)

    def point(self, step: int, model: Any) -> None:
        cpu = time.process_time() - self.started - self.evaluating
        before = time.process_time()
        accuracy = self.measure(model)
        self.evaluating += time.process_time() - before
        self.points.append({"steps": step, "tokens": self.counter.tokens, "cpu": cpu, "pass@1": accuracy})


def warm_up(directory: Path, seed: int) -> Path:
    """The supervised start of a seed, by the recipe; made once."""
    target = directory / f"sft_{seed}"
    if (target / "config.json").exists():
        return target
    base = directory / f"task_{seed}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (
        ["recipes/tasks/sort_digits.py", "--output_dir", base, "--task_set", "A", "--seed", seed],
        [
            "recipes/sft.py",
            *("--config", "recipes/configs/quickstart_sft.yaml", "--model_name_or_path", base / "init"),
            *("--dataset_name", base / "data", "--output_dir", target, "--seed", seed),
            # From a start whose learning rate decayed to zero, no method improves within this budget
            *("--lr_scheduler_type", "constant"),
        ],
    ):
        subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True, capture_output=True
        )
    return target


def train(method: str, start: Path, seed: int, generations: int, every: int, samples: int) -> list[dict[str, float]]:
    trainer_class, config_class, settings = METHODS[method]
    counter = TokenCounter()
    task = TrainingTask("A", seed, str(start), counter)
    curve = Curve(task, counter, every, samples)
    with tempfile.TemporaryDirectory() as output_dir:
        settings = task.settings(
            output_dir, gradient_accumulation_steps=1, steps_per_generation=4, max_steps=4 * generations, **settings
        )
        trainer_class(args=config_class(**settings), callbacks=[curve], **task.arguments()).train()
    return curve.points


def code_version() -> str:
    """Digest of what a run depends on, so that results of other code are not taken for results of this."""
    sources = sorted([*(ROOT / "trl_ext").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def area(points: list[dict[str, float]], axis: str, budget: float) -> float:
    """Mean pass@1 over the axis, up to a budget that all methods reached."""
    xs, ys = np.array([p[axis] for p in points]), np.array([p["pass@1"] for p in points])
    grid = np.linspace(0, budget, 200)
    return float(np.interp(grid, xs, ys).mean())


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(half)


def table(curves: dict[str, dict[int, list[dict[str, float]]]]) -> list[dict[str, Any]]:
    """A row a method: final pass@1, and areas under the curve up to the smallest budget any run used."""
    runs = [points for seeds in curves.values() for points in seeds.values()]
    budgets = {axis: min(points[-1][axis] for points in runs) for axis in AXES}
    rows = []
    for method, seeds in curves.items():
        row: dict[str, Any] = {"method": method, "seeds": len(seeds)}
        row["final"] = mean_interval([points[-1]["pass@1"] for points in seeds.values()])
        for axis in AXES:
            row[axis] = mean_interval([area(points, axis, budgets[axis]) for points in seeds.values()])
            row[f"{axis}_used"] = float(np.mean([points[-1][axis] for points in seeds.values()]))
        # Paired by seed: the same start and data
        row["versus_grpo"] = {
            axis: mean_interval(
                [area(seeds[s], axis, budgets[axis]) - area(curves["GRPO"][s], axis, budgets[axis]) for s in seeds]
            )
            for axis in AXES
        }
        rows.append(row)
    return rows


def plot(curves: dict[str, dict[int, list[dict[str, float]]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        for method, seeds in curves.items():
            end = min(points[-1][axis] for points in seeds.values())
            grid = np.linspace(0, end, 100)
            ys = np.array(
                [np.interp(grid, [p[axis] for p in pts], [p["pass@1"] for p in pts]) for pts in seeds.values()]
            )
            mean, sd = ys.mean(axis=0), ys.std(axis=0, ddof=1) if len(ys) > 1 else 0
            panel.plot(grid, mean, color=COLOURS[method], label=method)
            panel.fill_between(grid, mean - sd, mean + sd, color=COLOURS[method], alpha=0.12, linewidth=0)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("pass@1 on held-out prompts")
    panels[0].legend(frameon=False)
    seeds = len(next(iter(curves.values())))
    figure.suptitle(f"Sorting digits, set A: mean of {seeds} seeds, bands ± 1 sd")
    figure.savefig(path, dpi=130)


def markdown(rows: list[dict[str, Any]]) -> str:
    def pm(value: tuple[float, float]) -> str:
        return f"{value[0]:.3f} ± {value[1]:.3f}"

    lines = [
        f"| method | final pass@1 | mean pass@1 over {AXES['steps']} | … over {AXES['tokens']} | … over {AXES['cpu']} "
        "| tokens (k) | CPU-s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {pm(row['final'])} | {pm(row['steps'])} | {pm(row['tokens'])} | {pm(row['cpu'])} "
            f"| {row['tokens_used'] / 1000:.0f} | {row['cpu_used']:.0f} |"
        )
    lines += [
        "",
        "Difference to TRL's GRPO, paired by seed:",
        "",
        "| method | steps | tokens | CPU-seconds |",
        "|---|---|---|---|",
    ]
    for row in rows[1:]:
        lines.append(f"| {row['method']} | " + " | ".join(pm(row["versus_grpo"][axis]) for axis in AXES) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--generations", type=int, default=40, help="generation batches of a run")
    parser.add_argument("--every", type=int, default=16, help="optimizer steps between two measurements")
    parser.add_argument("--samples", type=int, default=2, help="completions for each held-out prompt")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "benchmarks" / "learning")
    parser.add_argument("--report", action="store_true", help="write the table into benchmarks/RESULTS.md")
    parser.add_argument("--json", action="store_true", help="print the table as JSON in the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    curves: dict[str, dict[int, list[dict[str, float]]]] = {method: {} for method in args.methods}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        start = warm_up(args.output_dir, seed)
        for method in args.methods:
            # Each finished run is kept: an interrupted benchmark goes on where it was
            settings = f"{args.generations}_{args.every}_{args.samples}_{code_version()}"
            done = args.output_dir / f"{method}_{seed}_{settings}.json"
            if not done.exists():
                points = train(method, start, seed, args.generations, args.every, args.samples)
                done.write_text(json.dumps(points))
            curves[method][seed] = points = json.loads(done.read_text())
            print(
                f"seed {seed} {method}: {points[0]['pass@1']:.3f} → {points[-1]['pass@1']:.3f}, "
                f"{points[-1]['tokens']:.0f} tokens, {points[-1]['cpu']:.0f} CPU-s",
                flush=True,
            )

    rows = table(curves)
    text = markdown(rows)
    print(text)
    plot(curves, args.output_dir / "learning.png")
    if args.report:
        plot(curves, ROOT / "benchmarks" / "learning.png")
        results = ROOT / "benchmarks" / "RESULTS.md"
        begin, end = "<!-- learning.py -->", "<!-- /learning.py -->"
        before, _, rest = results.read_text(encoding="utf-8").partition(begin)
        results.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
