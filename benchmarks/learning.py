"""
Which method learns faster, and by what measure? Two studies on set A of the sorting task: a model that was shown 3 to
8 digits is trained on 4 to 14.

- `methods`: GRPO (TRL's own trainer), DAPO, DUPO and GSPO, each with its own defaults, over the same number of
  generation batches.
- `refill`: TRL's GRPO against the same loss with refilled batches, from blind and from informed draws, over the same
  number of generated tokens: 2,000 prompts, passed several times.

Every method gets the same start (a supervised warm-up, one per seed), batches of 32 prompts × 8 completions (or what
its name says), 4 optimizer steps on each, the same learning rate and schedule. pass@1 is sampled at temperature 1 on
held-out prompts; tokens and CPU-seconds count everything but evaluation.

```shell
python benchmarks/learning.py --seeds 5 --report
python benchmarks/learning.py --study refill --seeds 10 --report
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import torch
import trl
from scipy import stats
from task import ROOT, TrainingTask
from transformers import TrainerCallback

import trl_ext
from recipes.tasks.sort_digits import exact_match


mpl.use("Agg")

OURS, OUR_CONFIG = trl_ext.GRPOTrainer, trl_ext.GRPOConfig
INFORMED = {"rollout_selection": "refill", "refill_draws": "informed"}
BY_LENGTH = {**INFORMED, "similar_prompts_columns": ["digits"]}
HALF_BATCH = {"per_device_train_batch_size": 32}
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, {}),
    "DAPO": (trl_ext.DAPOTrainer, trl_ext.DAPOConfig, {"soft_punish_cache": 0, "warmup_steps": 0}),
    "DUPO": (trl_ext.DUPOTrainer, trl_ext.DUPOConfig, {}),
    "GSPO": (trl_ext.GSPOTrainer, trl_ext.GSPOConfig, {}),
    "blind": (OURS, OUR_CONFIG, {"rollout_selection": "refill"}),
    "informed": (OURS, OUR_CONFIG, INFORMED),
    "informed+length": (OURS, OUR_CONFIG, BY_LENGTH),
    # What is missing after one more round is filled with copies
    "informed+length, 1 round": (
        OURS,
        OUR_CONFIG,
        {**BY_LENGTH, "max_refill_rounds": 1},
    ),
    "GRPO, 16 prompts": (trl.GRPOTrainer, trl.GRPOConfig, HALF_BATCH),
    "informed+length, 16 prompts": (OURS, OUR_CONFIG, {**BY_LENGTH, **HALF_BATCH}),
}
STUDIES: dict[str, list[str]] = {
    "methods": ["GRPO", "DAPO", "DUPO", "GSPO"],
    "refill": [
        "GRPO",
        "blind",
        "informed+length",
        "informed+length, 1 round",
        "GRPO, 16 prompts",
        "informed+length, 16 prompts",
    ],
}
# Okabe and Ito's colours
COLOURS = {
    "GRPO": "#000000",
    "DAPO": "#D55E00",
    "DUPO": "#009E73",
    "GSPO": "#0072B2",
    "blind": "#D55E00",
    "informed": "#0072B2",
    "informed+length": "#009E73",
    "informed+length, 1 round": "#CC79A7",
    "GRPO, 16 prompts": "#999999",
    "informed+length, 16 prompts": "#F0E442",
}
BASELINES = {"GRPO": "TRL's GRPO", "blind": "blind refill"}
AXES = {"steps": "optimizer steps", "tokens": "generated tokens", "cpu": "CPU-seconds"}


class TokenCounter:
    """The reward, counting every token that was generated: the same count for every trainer."""

    __name__ = "exact_match"

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        return exact_match(completion_ids, **kwargs)


@dataclass
class Budget:
    """
    How long a run is.

    Args:
        generations (`int`):
            Generation batches, at most.
        tokens (`float`):
            Generated tokens, after which the next optimizer step is the last.
        points (`int`):
            Measurements of pass@1 on the way.
    """

    generations: int
    tokens: float
    points: int


class Curve(TrainerCallback):
    """
    Samples pass@1 (or another score of completions) at even distances, outside the clocks and the random state of
    training; ends the run.
    """

    metric = "pass@1"

    def score(self, ids: list[int], answer: list[int]) -> float:
        """Of a completion and the padding after it."""
        return float(ids[: len(answer)] == answer)  # an answer ends with eos

    def __init__(self, task: TrainingTask, counter: TokenCounter, budget: Budget, samples: int) -> None:
        self.task, self.counter, self.budget, self.samples = task, counter, budget, samples
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
                    right += self.score(ids, answer)
        model.train(training)
        return right / (len(test) * self.samples)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.started = time.process_time()
        self.point(state.global_step, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        done = max(state.global_step / state.max_steps, self.counter.tokens / self.budget.tokens)
        if done >= len(self.points) / self.budget.points:
            self.point(state.global_step, model)
        control.should_training_stop |= done >= 1

    def point(self, step: int, model: Any) -> None:
        cpu = time.process_time() - self.started - self.evaluating
        before = time.process_time()
        accuracy = self.measure(model)
        self.evaluating += time.process_time() - before
        self.points.append({"steps": step, "tokens": self.counter.tokens, "cpu": cpu, self.metric: accuracy})


def run_recipe(*command: Any) -> None:
    """A recipe or the script of a task, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True, capture_output=True)


def supervised(init: Path, data: Path, target: Path, seed: int, *more: Any) -> Path:
    """A start by the recipe for supervised training; made once."""
    if not (target / "config.json").exists():
        run_recipe(
            "recipes/sft.py",
            *("--config", "recipes/configs/quickstart_sft.yaml", "--model_name_or_path", init),
            *("--dataset_name", data, "--output_dir", target, "--seed", seed, *more),
        )
    return target


def warm_up(directory: Path, seed: int, steps: int | None = None) -> Path:
    """The supervised start of a seed on set A, after so many steps or as many as the recipe says; made once."""
    base, target = directory / f"task_{seed}", directory / f"sft_{seed}"
    if not (target / "config.json").exists():
        task = ("--output_dir", base, "--task_set", "A", "--seed", seed, "--pairs_size", 0)
        run_recipe("recipes/tasks/sort_digits.py", *task)
    # From a start whose learning rate decayed to zero, no method improves within this budget
    more = () if steps is None else ("--max_steps", steps)
    return supervised(base / "init", base / "data", target, seed, "--lr_scheduler_type", "constant", *more)


def train(method: str, start: Path, seed: int, budget: Budget, samples: int, prompts: int) -> list[dict[str, float]]:
    trainer_class, config_class, settings = METHODS[method]
    counter = TokenCounter()
    task = TrainingTask("A", seed, str(start), counter, prompts)
    curve = Curve(task, counter, budget, samples)
    with tempfile.TemporaryDirectory() as output_dir:
        settings = task.settings(
            output_dir,
            gradient_accumulation_steps=1,
            steps_per_generation=4,
            max_steps=4 * budget.generations,
            **settings,
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


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds."""
    means = np.random.default_rng(seed).choice(values, size=(10_000, len(values))).mean(axis=1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


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
        row["versus"] = {}
        for other in [name for name in BASELINES if name in curves and name != method]:
            differences = {
                axis: [
                    area(seeds[s], axis, budgets[axis]) - area(curves[other][s], axis, budgets[axis]) for s in seeds
                ]
                for axis in AXES
            }
            row["versus"][other] = {
                axis: (*mean_interval(found), *bootstrap_interval(found)) for axis, found in differences.items()
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
        panel.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
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
    for other in [name for name in BASELINES if name in rows[-1]["versus"]]:
        lines += [
            "",
            f"Difference to {BASELINES[other]}, paired by seed (mean ± t interval, bootstrap interval):",
            "",
            "| method | steps | tokens | CPU-seconds |",
            "|---|---|---|---|",
        ]
        for row in rows:
            if other in row["versus"]:
                found = [row["versus"][other][axis] for axis in AXES]
                cells = [f"{mean:+.3f} ± {half:.3f} ({low:+.3f} to {high:+.3f})" for mean, half, low, high in found]
                lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_report(script: str, study: str, text: str) -> None:
    """Put the table of a study into its place in `RESULTS.md`."""
    results = ROOT / "benchmarks" / "RESULTS.md"
    begin, end = (f"<!-- {slash}{script} --study {study} -->" for slash in ("", "/"))
    before, _, rest = results.read_text(encoding="utf-8").partition(begin)
    results.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="methods")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: those of the study")
    parser.add_argument("--generations", type=int, help="generation batches of a run, at most (methods: 40)")
    parser.add_argument("--tokens", type=float, help="generated tokens of a run (refill: 400,000)")
    parser.add_argument("--sft_steps", type=int, help="steps of the supervised warm-up (default: the recipe's)")
    parser.add_argument("--points", type=int, default=20, help="measurements of a run (default: 20)")
    parser.add_argument("--samples", type=int, default=2, help="completions for each held-out prompt")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "benchmarks" / "learning")
    parser.add_argument("--report", action="store_true", help="write the table into benchmarks/RESULTS.md")
    parser.add_argument("--json", action="store_true", help="print the table as JSON in the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    refill = args.study == "refill"
    methods = args.methods or STUDIES[args.study]
    budget = Budget(
        generations=args.generations or (100_000 if refill else 40),
        tokens=args.tokens or (400_000 if refill else float("inf")),
        points=args.points,
    )
    prompts = 2000 if refill else 2048

    curves: dict[str, dict[int, list[dict[str, float]]]] = {method: {} for method in methods}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        start = warm_up(args.output_dir, seed, args.sft_steps)
        for method in methods:
            # Each finished run is kept: an interrupted benchmark goes on where it was
            settings = f"{budget.generations}_{budget.tokens:.0f}_{budget.points}_{args.samples}_{prompts}"
            done = args.output_dir / f"{method}_{seed}_{settings}_{code_version()}.json"
            if not done.exists():
                points = train(method, start, seed, budget, args.samples, prompts)
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
    picture = "refill.png" if refill else "learning.png"
    plot(curves, args.output_dir / picture)
    if args.report:
        plot(curves, ROOT / "benchmarks" / picture)
        write_report("learning.py", args.study, text)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
