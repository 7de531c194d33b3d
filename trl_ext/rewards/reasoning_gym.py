"""
Tasks of Reasoning Gym (https://huggingface.co/papers/2505.24760; `pip install trl_ext[tasks]`): a hundred generators
of questions, each with a program that verifies answers, as a data set and as a reward.

```python
from trl_ext.rewards.reasoning_gym import build_dataset, reasoning_gym_reward

data = build_dataset(["chain_sum"], {"max_terms": 3, "size": 500})
trainer = DAPOTrainer(model, reasoning_gym_reward, train_dataset=data["train"])
```

On the command line: `--dataset_name reasoning_gym:chain_sum --reward_funcs reasoning_gym_reward`.
"""

import dataclasses
import json
import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TextIO

from datasets import Dataset, DatasetDict

from ..errors import meant, require, require_count, require_type


logger = logging.getLogger(__name__)

INSTRUCTION = "Put the final answer between <answer> and </answer>."
ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
OWN = {"size": 2000, "test_size": 256, "seed": 0, "evaluate_answers": False}
# Tasks whose verifiers run what the policy wrote as Python (`eval`, or SymPy's `parse_expr`, which calls it)
EVALUATING = (
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24"),
    *("simple_integration", "spiral_matrix", "string_insertion"),
)
# Verifiers that run what is in a row of the data set: harmless in rows that were made here
EVALUATING_ROWS = ("bitwise_arithmetic", "number_sorting")
APART = 1_000_003  # generators make row i from seed + i: splits whose seeds were closer would share rows
_TUPLE = "__tuple__"
_made_here: set[str] = set()  # tasks whose verifiers may run code in this process


def build_dataset(tasks: Sequence[str], settings: Mapping[str, Any] | None = None) -> DatasetDict:
    """
    Questions of one task, or of several in turn, with different questions in the two splits. The same arguments give
    the same rows on every process and in every run.

    Args:
        tasks (`Sequence[str]`):
            Names of the generators, e.g. `chain_sum`.
        settings (`Mapping[str, Any]`, *optional*):
            `size` (default: 2000) and `test_size` (256), questions made for the splits; `seed` (0); and whatever the
            generators can be told, such as `max_terms` for `chain_sum`: to all tasks that know the name, or to one by
            `chain_sum.max_terms`. A question that was made before is left out, so that easy tasks have fewer rows.
            `evaluate_answers` (`False`) has to be `True` for the tasks in `EVALUATING`, whose verifiers run the
            policy's answers as Python code.

    Returns:
        [`~datasets.DatasetDict`]: splits `train` and `test` with the columns `prompt` (a conversation of one message),
        `completion` (the answer that the generator knows, in the form that is asked for: what SFT trains on; not
        there if a task only has a verifier), `task` (its name) and `entry` (what the verifier needs, as JSON).

    Raises:
        ImportError: without Reasoning Gym.
        ValueError: for an unknown task or setting, or one that the generator refuses.
    """
    require(len(tasks) > 0, "no task of Reasoning Gym is named. Write e.g. reasoning_gym:chain_sum.")
    require(len(set(tasks)) == len(tasks), f"{', '.join(tasks)}: a task is named twice.")
    told = OWN | dict(settings or {})
    sizes = {"test": told.pop("test_size"), "train": told.pop("size")}
    require_count("size", sizes["train"])
    require_count("test_size", sizes["test"])
    require_count("seed", seed := told.pop("seed"), 0)
    require_type("evaluate_answers", evaluates := told.pop("evaluate_answers"), bool, "Pass True or False.")
    runs_code = [task for task in tasks if task in EVALUATING]
    require(
        evaluates or not runs_code,
        f"the verifier of {', '.join(runs_code)} runs what the policy writes as Python code. Choose another task, or "
        "set evaluate_answers to true, on a machine that has nothing to lose.",
    )
    own = {task: _settings_of(task, told, tasks) for task in tasks}
    for task in tasks:
        _generator(task, own[task] | {"seed": seed, "size": 1})  # what it refuses, it refuses here
    splits = _made_apart({"own": own, "sizes": sizes, "seed": seed})
    require(
        len(splits["train"]) > 0,
        f"{', '.join(tasks)} with these settings has no question that isn't in the test split. Make harder ones, "
        "or fewer with test_size.",
    )
    _made_here.update(tasks)
    data = DatasetDict({split: Dataset.from_list(splits[split]) for split in ("train", "test")})
    knows_answers = all(row["completion"] is not None for rows in splits.values() for row in rows)
    return data if knows_answers else data.remove_columns("completion")


def _made_apart(asked: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """
    The rows of both splits, made in a process whose sets have a fixed order: some generators choose from sets of
    texts, which Python orders differently in every process.
    """
    code = "import sys; from trl_ext.rewards.reasoning_gym import _make; _make(sys.stdin, sys.stdout)"
    # It sees no devices, and finds trl_ext where this process has found it
    env = os.environ | {"PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(asked),
        env=env,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode != 0:
        raise RuntimeError(f"Reasoning Gym could not make {', '.join(asked['own'])}:\n{done.stderr[-2000:]}")
    made: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return made


def _make(source: TextIO, target: TextIO) -> None:
    """What the process of [`_made_apart`] does."""
    asked = json.load(source)
    printed, sys.stdout = sys.stdout, sys.stderr  # generators may print
    random.seed(asked["seed"])  # which one of them draws from
    seen: set[str] = set()
    splits: dict[str, list[dict[str, Any]]] = {}
    own: dict[str, dict[str, Any]] = asked["own"]
    for number, (split, size) in enumerate(asked["sizes"].items()):  # the test split first: a small task runs out
        counts = [size // len(own) + (place < size % len(own)) for place in range(len(own))]
        made = {
            task: _generator(task, settings | {"seed": asked["seed"] + number * APART, "size": count})
            for (task, settings), count in zip(own.items(), counts, strict=True)
            if count
        }
        splits[split] = []
        for place in range(max(counts)):
            for task, generator in made.items():
                if place < len(generator) and (entry := generator[place])["question"] not in seen:
                    seen.add(entry["question"])
                    splits[split].append(_row(task, own[task], entry))
    sys.stdout = printed
    json.dump(splits, target)


def reasoning_gym_reward(completions: list[Any], entry: list[str], **kwargs: Any) -> list[float]:
    """
    Reward function: what the task's own verifier gives the text between the last `<answer>` and `</answer>`: 1.0 for a
    right answer; many tasks give a part of it for a nearly right one, some a little for a wrong one. 0.0 without tags.

    Args:
        completions (`list`):
            Texts, or conversations whose last message is the completion.
        entry (`list[str]`):
            Column of [`build_dataset`].

    Raises:
        ValueError: for a row of a task whose verifier runs code, if the row was not made in this process.
    """
    texts = [said if isinstance(said, str) else str(said[-1]["content"]) for said in completions]
    return [_score(text, row) for text, row in zip(texts, entry, strict=True)]


def _score(text: str, row: str) -> float:
    answers = ANSWER.findall(text)
    if not answers:
        return 0.0
    task, settings, entry = json.loads(row, object_hook=_unpacked)
    require(
        task in _made_here or task not in (*EVALUATING, *EVALUATING_ROWS),
        f"the verifier of {task} runs Python code from rows or answers, and this data set was not made by this "
        f"process. Make it anew, as reasoning_gym:{task}.",
    )
    try:
        return float(_verifier(task, settings)(answers[-1], entry))
    except Exception as error:  # some verifiers fail on what they can't read
        logger.debug("%r was not understood: %r", answers[-1], error)
        return 0.0


def _row(task: str, settings: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    right = entry["answer"]
    return {
        "prompt": [{"role": "user", "content": f"{entry['question']}\n\n{INSTRUCTION}"}],
        "completion": None if right is None else [{"role": "assistant", "content": f"<answer>{right}</answer>"}],
        "task": task,
        # Some verifiers look into their settings, too
        "entry": json.dumps([task, json.dumps(settings), _packed(dict(entry))]),
    }


def _packed(value: Any) -> Any:
    """A value with its tuples marked: JSON has none, and some verifiers compare with them."""
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(part) for part in value]}
    if isinstance(value, list):
        return [_packed(part) for part in value]
    return {key: _packed(part) for key, part in value.items()} if isinstance(value, dict) else value


def _unpacked(value: dict[str, Any]) -> Any:
    return tuple(value[_TUPLE]) if _TUPLE in value else value


def _registry() -> Mapping[str, tuple[type, type]]:
    """Generators and their settings' classes by name."""
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise ImportError("Reasoning Gym is not installed. Run: pip install trl_ext[tasks]") from error
    # `composite` mixes others, which are named here directly
    return {name: classes for name, classes in reasoning_gym.factory.DATASETS.items() if name != "composite"}


def _settings_of(task: str, told: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """What is told to one task. Raises `ValueError` for what no task knows."""
    known = _registry()
    if task not in known:
        instead = meant(task, known) or f" There are {', '.join(sorted(known))}."
        raise ValueError(f"'{task}' is no task of Reasoning Gym.{instead}")
    fields = {
        name: [field.name for field in dataclasses.fields(known[name][1]) if field.name not in OWN]
        for name in tasks
        if name in known
    }
    for name in told:
        of, _, field = name.rpartition(".")
        takers = [other for other in fields if of in ("", other) and field in fields[other]]
        if not takers:
            names = sorted({*OWN, *(field for own in fields.values() for field in own)})
            raise ValueError(f"{', '.join(tasks)} can't be told {name!r}, only {', '.join(names)}.")
    general = {name: value for name, value in told.items() if name in fields[task]}
    special = {name.rpartition(".")[2]: value for name, value in told.items() if name.startswith(f"{task}.")}
    return general | special


def _generator(task: str, settings: Mapping[str, Any]) -> Any:
    dataset, config = _registry()[task]
    try:
        return dataset(config(**settings))
    except (AssertionError, TypeError, ValueError) as error:
        own = {name: value for name, value in settings.items() if name not in OWN}
        raise ValueError(f"{task} refuses {own}: {error or type(error).__name__}.") from error


@lru_cache
def _verifier(task: str, settings: str) -> Any:
    return _generator(task, json.loads(settings)).score_answer
