"""
What runs of the studies on learning have in common: where they start, how long they are, and what is measured on the
way.
"""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from automaton import AutomatonTask
from task import ROOT, TrainingTask
from transformers import TrainerCallback

from recipes.tasks.sort_digits import exact_match
from trl_ext.evaluation.metrics import load_metric


class TokenCounter:
    """The reward, counting every token that was generated: the same count for every trainer."""

    __name__ = "exact_match"

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        return exact_match(completion_ids, **kwargs)


@dataclass(frozen=True)
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
    training; ends the run. With at least 8 samples for each prompt, pass@8 is measured as well.

    Args:
        task ([`~task.TrainingTask`]):
            Its held-out prompts are sampled.
        counter (`TokenCounter`):
            Of the run.
        budget (`Budget`):
            Of the run.
        samples (`int`):
            Completions for each held-out prompt.
    """

    metric = "pass@1"
    # What a point takes over from the trainer's log, where it is logged
    logged = {
        "calibration_error": "selection/calibration_error",
        "prediction_tokens": "compute/prediction_tokens",
        "groups_generated": "selection/groups_generated",
        "groups_kept": "selection/groups_kept",
        "explained_variance": "val/explained_variance",
    }

    def score(self, ids: list[int], answer: list[int]) -> float:
        """Of a completion and the padding after it."""
        return float(ids[: len(answer)] == answer)  # an answer ends with eos

    def __init__(self, task: TrainingTask, counter: TokenCounter, budget: Budget, samples: int) -> None:
        self.task, self.counter, self.budget, self.samples = task, counter, budget, samples
        self.points: list[dict[str, float]] = []
        self.latest: dict[str, float] = {}
        self.evaluating = 0.0

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        tokenizer, test = self.task.tokenizer, self.task.data["test"]
        scores: list[list[float]] = []  # by prompt
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
                    max_new_tokens=self.task.completion_tokens,
                    num_return_sequences=self.samples,
                    top_k=0,
                    pad_token_id=tokenizer.pad_token_id,
                )
                completions = iter(out[:, inputs["input_ids"].size(1) :].tolist())
                scores += [
                    [self.score(next(completions), answer) for _ in range(self.samples)]
                    for answer in rows["answer_ids"]
                ]
        model.train(training)
        found = {self.metric: sum(map(sum, scores)) / (len(test) * self.samples)}
        if self.metric == "pass@1" and self.samples >= 8:
            metric = load_metric("pass_at_k", experiment_id=str(os.getpid()), keep_in_memory=True)
            found |= metric.compute(predictions=scores, k=[8])
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.started = time.process_time()
        self.point(state.global_step, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        done = max(state.global_step / state.max_steps, self.counter.tokens / self.budget.tokens)
        if done >= len(self.points) / self.budget.points:
            self.point(state.global_step, model)
        control.should_training_stop |= done >= 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.latest |= {name: logs[key] for name, key in self.logged.items() if logs.get(key) is not None}

    def point(self, step: int, model: Any) -> None:
        cpu = time.process_time() - self.started - self.evaluating
        before = time.process_time()
        found = self.measure(model)
        self.evaluating += time.process_time() - before
        self.points.append({"steps": step, "tokens": self.counter.tokens, "cpu": cpu, **found, **self.latest})


Work = Callable[[Callable[..., Any], list[tuple[Any, ...]]], Iterator[tuple[int, Any]]]


@contextmanager
def workers(count: int) -> Iterator[Work]:
    """
    A function that does jobs, so many at a time, each in a process of its own: it takes a function and the arguments
    of each call, and gives the place of a call and what it returned, as they are done.
    """
    if count == 1:
        yield lambda function, calls: ((place, function(*call)) for place, call in enumerate(calls))
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))

    def do(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        places = {pool.submit(function, *call): place for place, call in enumerate(calls)}
        for future in as_completed(places):
            yield places[future], future.result()

    try:
        yield do
    finally:
        pool.shutdown(cancel_futures=True)


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
    return warmed(base, target, seed, steps)


def warm_up_automaton(directory: Path, seed: int, steps: int | None = None) -> Path:
    """The same on the automaton."""
    base, target = directory / f"task_automaton_{seed}", directory / f"sft_automaton_{seed}"
    if not (target / "config.json").exists():
        AutomatonTask(seed=seed, train_size=1).write(base, demonstrations=25_600)
    return warmed(base, target, seed, steps)


def warmed(base: Path, target: Path, seed: int, steps: int | None) -> Path:
    # From a start whose learning rate decayed to zero, no method improves within this budget
    more = () if steps is None else ("--max_steps", steps)
    return supervised(base / "init", base / "data", target, seed, "--lr_scheduler_type", "constant", *more)


def code_version(*scripts: str) -> str:
    """
    Digest of what a run depends on, so that results of other code are not taken for results of this.

    Args:
        scripts (`str`):
            Names of benchmarks, beside what all of them have in common.
    """
    names = ("learning_runs.py", "automaton.py", "task.py", *scripts)
    sources = sorted([*(ROOT / "trl_ext").rglob("*.py"), *(ROOT / "benchmarks" / name for name in names)])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
