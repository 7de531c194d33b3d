"""
What does the engine cost when none of its features is used?

TRL's `GRPOTrainer` and a neutral `trl_ext.GRPOTrainer` train the same tiny model on the same data from the same seed,
in turn (A B, then B A, so that a drift of the machine falls on both). Reported: the ratio of training times, ours over
TRL's, as a median over pairs with a bootstrap interval, and whether the work was equal: weights bit for bit, forward
calls, generated tokens.

```shell
python benchmarks/overhead.py --json
```
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import numpy as np
import torch
import trl
from task import TrainingTask

import trl_ext


def matching_tokens(completion_ids: list[list[int]], answer_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A graded reward: an untrained model never sorts, and equal weights after no gradient would prove nothing."""
    return [
        sum(a == b for a, b in zip(ids, answer, strict=False)) / len(answer)
        for ids, answer in zip(completion_ids, answer_ids, strict=True)
    ]


def train(trainer_class: Any, config_class: Any, task: TrainingTask, steps: int) -> dict[str, Any]:
    """One run; only `train()` is timed."""
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trainer_class(args=config_class(**task.settings(output_dir, max_steps=steps)), **task.arguments())
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        trainer.model.register_forward_pre_hook(count)
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "wall": wall,
        "cpu": cpu,
        "calls": calls,
        "tokens": trainer.state.num_input_tokens_seen,
        "weights": [p.detach().clone() for p in trainer.model.parameters()],
    }


def interval(ratios: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(ratios, size=(10_000, len(ratios))), axis=1)
    return float(np.percentile(medians, 2.5)), float(np.percentile(medians, 97.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of runs (default: 15)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a run (default: 5)")
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)

    task = TrainingTask(reward_func=matching_tokens)
    neutral = partial(trl_ext.GRPOConfig, fit_micro_batches=False)
    sides = {"trl": (trl.GRPOTrainer, trl.GRPOConfig), "trl_ext": (trl_ext.GRPOTrainer, neutral)}
    for side in sides.values():  # warm-up, not counted
        train(*side, task, args.steps)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for pair in range(args.pairs):
        for name in sides if pair % 2 == 0 else reversed(sides):
            runs[name].append(train(*sides[name], task, args.steps))

    ratios = [ours["wall"] / theirs["wall"] for ours, theirs in zip(runs["trl_ext"], runs["trl"], strict=True)]
    cpu = [ours["cpu"] / theirs["cpu"] for ours, theirs in zip(runs["trl_ext"], runs["trl"], strict=True)]
    ours, theirs = runs["trl_ext"][0], runs["trl"][0]
    low, high = interval(ratios)
    result = {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "cpu_ratio": statistics.median(cpu),
        "cpu_low": interval(cpu)[0],
        "cpu_high": interval(cpu)[1],
        "pairs": args.pairs,
        "steps": args.steps,
        "seconds_trl": statistics.median(run["wall"] for run in runs["trl"]),
        "weights_equal": all(torch.equal(a, b) for a, b in zip(ours["weights"], theirs["weights"], strict=True)),
        "forward_calls_equal": ours["calls"] == theirs["calls"],
        "tokens_equal": ours["tokens"] == theirs["tokens"],
        "forward_calls": ours["calls"],
        "tokens": ours["tokens"],
    }
    for key, value in result.items():
        print(f"{key:>20}: {value:.4f}" if isinstance(value, float) else f"{key:>20}: {value}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
