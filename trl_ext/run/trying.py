"""Reward functions tried on a few rows, before there is a policy: what they return, and how long they take."""

import asyncio
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import TrainerState
from trl import is_conversational
from trl.trainer.utils import get_callable_name

from ..rewards.adapter import AdapterReward


SHORT = "1"  # what stands for a completion where the rows have none
OWN = ("completion", "chosen")  # columns with completions
NOT_PASSED = ("prompt", "completion", "completion_ids")  # columns that TRL keeps from reward functions
KEPT = ("image", "images")  # columns that it passes when others are removed


class Tried(NamedTuple):
    """
    What became of a reward function.

    Args:
        told (`str`):
            What it returned, or why it wasn't called.
        fault (`str`, *optional*):
            Why training would stop at it.
    """

    told: str
    fault: str | None = None


def completions_for(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """
    Two completions for each row, as a policy would give them: the row's own, or else a short text; and an empty one.

    Returns:
        `tuple`: prompts and completions, in the form that the rows have.
    """
    prompts, completions = [], []
    for row in rows:
        own = next((row[column] for column in OWN if column in row), SHORT)
        text = own if isinstance(own, str) else str(own[-1].get("content") or "")
        for said in (text, ""):
            prompts.append(row.get("prompt"))
            talks = is_conversational({"prompt": row.get("prompt")})
            completions.append([{"role": "assistant", "content": said}] if talks else said)
    return prompts, completions


def try_reward(func: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any, removes_columns: bool) -> Tried:
    """
    Calls a reward function as TRL does.

    Args:
        func (`Callable` or `str`):
            A function, or what stands for a model, which isn't loaded.
        rows (`Sequence[Mapping[str, Any]]`):
            Rows of the data set.
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's.
        removes_columns (`bool`):
            TRL's `remove_unused_columns`.
    """
    if isinstance(func, str | AdapterReward):
        name = func if isinstance(func, str) else func.folder
        return Tried(f"{name}: a model, which isn't loaded")
    name = get_callable_name(func)
    prompts, completions = completions_for(rows)
    texts = [said if isinstance(said, str) else said[0]["content"] for said in completions]
    columns = [key for key in rows[0] if key not in NOT_PASSED and (key in KEPT or not removes_columns)]
    given: dict[str, Any] = {column: [row[column] for row in rows for _ in range(2)] for column in columns}
    given |= {"prompts": prompts, "completions": completions, "trainer_state": TrainerState()}
    given["completion_ids"] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    given |= {"log_extra": _nothing, "log_metric": _nothing}
    began = time.perf_counter()
    try:
        rewards = _called(func, given)
    except Exception as error:  # the user's function
        return Tried(f"{name}: fails", f"`{name}` fails: {type(error).__name__}: {' '.join(str(error).split())}")
    seconds = time.perf_counter() - began
    return _judged(name, rewards, len(prompts), seconds)


def _nothing(*_: Any, **__: Any) -> None:
    """What is logged before there is a run."""


def _called(func: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    found = func(**given)
    return asyncio.run(found) if inspect.iscoroutine(found) else found


def _judged(name: str, rewards: Any, expected: int, seconds: float) -> Tried:
    try:
        found = [reward.tolist() if hasattr(reward, "tolist") else reward for reward in rewards]
    except TypeError:
        return Tried(f"{name}: {rewards!r}", f"`{name}` returns {type(rewards).__name__}, not a reward a completion")
    if len(found) != expected:
        return Tried(
            f"{name}: {len(found)} rewards", f"`{name}` returns {len(found)} rewards for {expected} completions"
        )
    numbers = [number for reward in found for number in (reward if isinstance(reward, list | tuple) else [reward])]
    strange = next((value for value in numbers if not _is_reward(value)), None)
    told = f"{name}: {', '.join(map(_shown, found))} in {seconds:.2f} s"
    if strange is not None:
        return Tried(told, f"`{name}` returns {strange!r}, which is no reward: return numbers, or None")
    missing = sum(value is None or math.isnan(value) for value in numbers)
    if missing == len(numbers):
        told += "; None or nan for all: none of these completions is judged"
    elif missing:
        told += f"; None or nan for {missing} of {len(numbers)}"
    return Tried(told)


def _is_reward(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and not math.isinf(value)


def _shown(reward: Any) -> str:
    if isinstance(reward, list | tuple):
        return f"[{len(reward)} steps]"
    return f"{reward:.3g}" if isinstance(reward, int | float) else repr(reward)
