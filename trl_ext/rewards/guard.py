"""
Reward functions are the user's code: when one fails, the message says which one, how, and on which sample.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from trl.trainer.utils import is_async_callable

from .steps import is_by_step, read_step_rewards


class RewardFunctionError(RuntimeError):
    """A reward function raised, or returned something that can't be a reward."""


# Infinity is no valid reward, so it can carry "this function failed here" through TRL's own gather: every rank learns
# of a failure on any of them, without a collective that a healthy step would pay for.
FAILED = math.inf
# Samples that are tried one by one when a function raised on a batch
MOST_PROBES = 64
# TRL keeps rewards in float32
LARGEST_REWARD = torch.finfo(torch.float32).max


def _by_completion(columns: dict[str, Any]) -> dict[str, list[Any]]:
    """The arguments with one value for each completion; the others are shared."""
    size = len(columns["prompts"])
    return {key: value for key, value in columns.items() if isinstance(value, list) and len(value) == size}


def cut_columns(columns: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The arguments of a reward function for some of the completions: lists by completion are cut, others stay."""
    return {**columns, **{key: value[start:stop] for key, value in _by_completion(columns).items()}}


def describe_fault(name: str, problem: str, columns: dict[str, Any], index: int) -> str:
    """What went wrong with a reward function, and the arguments of one completion that show it."""
    shown = "\n".join(f"  {key}: {value[index]!r}"[:500] for key, value in _by_completion(columns).items())
    return f"The reward function `{name}` {problem}\n{shown}"


class RewardGuard:
    """
    Calls a reward function and checks what comes back. A fault is kept in `fault` and reported as [`FAILED`] rewards;
    the trainer raises it on all ranks together, after it has saved what was trained.

    Args:
        func (`Callable`):
            A reward function as TRL takes them, sync or async.
        name (`str`):
            Its name in logs.

    Attributes:
        ready (`list`, *optional*):
            Rewards that have been computed and checked already. The next call returns them instead of calling the
            function.
        returned (`list`):
            Rewards of the last call, [`StepRewards`] among them.
    """

    def __init__(self, func: Callable[..., Any], name: str) -> None:
        self.func = func
        self.__name__ = name
        self.fault: str | None = None
        self.ready: list[float | None] | None = None
        self.returned: list[Any] = []

    def __getattr__(self, name: str) -> Any:  # only what the guard itself lacks
        if name == "func":
            raise AttributeError(name)  # while unpickling
        return getattr(self.func, name)

    def _failed(self, columns: dict[str, Any], problem: str, index: int) -> list[float]:
        self.fault = describe_fault(self.__name__, problem, columns, index)
        self.returned = [FAILED] * len(columns["prompts"])
        return self.returned

    def _raised(self, columns: dict[str, Any], error: Exception, where: str, index: int = 0) -> list[float]:
        return self._failed(columns, f"raised {type(error).__name__}: {error} ({where}):", index)

    def _taken(self, columns: dict[str, Any], ready: list[float | None]) -> list[float | None]:
        self.ready = None
        expected = len(columns["prompts"])
        if len(ready) != expected:
            raise ValueError(f"{len(ready)} rewards of `{self.__name__}` are ready, for {expected} completions")
        self.returned = ready
        return ready

    def _checked(self, columns: dict[str, Any], output: Any) -> Any:
        expected = len(columns["prompts"])
        if isinstance(output, Iterator):  # TRL takes a generator or a map
            output = list(output)
        try:
            returned = len(output)
        except TypeError:
            return self._failed(columns, f"must return a list of {expected} rewards, not {output!r}:", 0)
        if returned != expected:
            return self._failed(
                columns,
                f"returned {returned} rewards for {expected} completions. Return one per completion, `None` where it "
                "does not apply. The first completion:",
                0,
            )
        given = output
        for index, reward in enumerate(given):
            if reward is None:
                continue
            one = math.prod(getattr(reward, "shape", (0,))) == 1  # a tensor of one number is one, as in TRL
            if isinstance(reward, Iterable) and not isinstance(reward, str) and not one:
                try:
                    reward = read_step_rewards(reward, len(columns["completion_ids"][index]))
                except ValueError as error:
                    return self._failed(columns, f"returned step rewards {error}. The sample:", index)
                output = list(output) if output is given else output
                output[index] = reward
            try:
                parts = [part for _, part in reward.steps] if is_by_step(reward) else [reward]
                finite = all(math.isfinite(part) and abs(part) <= LARGEST_REWARD for part in (*parts, reward))
            except TypeError:
                finite = False
            if not finite:
                return self._failed(
                    columns,
                    f"returned {reward!r}. Return a finite number (in float32), or `None` where it does not "
                    "apply. The sample:",
                    index,
                )
        self.returned = output
        return output

    def _one_by_one(self, columns: dict[str, Any], error: Exception) -> Iterator[tuple[int, dict[str, Any]]]:
        """Arguments of single samples, to find one on which a function raises; a few, since a judge may be slow."""
        # Kept first: there may be no time to try them
        self._raised(columns, error, "on the whole batch; here is its first sample")
        for index in range(min(len(columns["prompts"]), MOST_PROBES)):
            yield index, cut_columns(columns, index, index + 1)

    def _on_none(self, columns: dict[str, Any], error: Exception) -> list[float]:
        tried = min(len(columns["prompts"]), MOST_PROBES)
        where = f"on the whole batch, but on none of its first {tried} samples alone; here is the first"
        return self._raised(columns, error, where)

    def __call__(self, **columns: Any) -> Any:
        if self.ready is not None:
            return self._taken(columns, self.ready)
        try:
            return self._checked(columns, self.func(**columns))
        except Exception as error:  # whatever the user's code raises
            for index, alone in self._one_by_one(columns, error):
                try:
                    self.func(**alone)
                except Exception:
                    return self._raised(columns, error, "for this sample", index)
            return self._on_none(columns, error)


class AsyncRewardGuard(RewardGuard):
    """[`RewardGuard`] for an async reward function."""

    async def __call__(self, **columns: Any) -> Any:
        if self.ready is not None:
            return self._taken(columns, self.ready)
        try:
            return self._checked(columns, await self.func(**columns))
        except Exception as error:
            for index, alone in self._one_by_one(columns, error):
                try:
                    await self.func(**alone)
                except Exception:
                    return self._raised(columns, error, "for this sample", index)
            return self._on_none(columns, error)


def guard(func: Callable[..., Any], name: str) -> RewardGuard:
    """Wrap a reward function; see [`RewardGuard`]."""
    if isinstance(func, RewardGuard):
        return func
    return AsyncRewardGuard(func, name) if is_async_callable(func) else RewardGuard(func, name)


def raise_reward_faults(rewards: torch.Tensor, funcs: list[Any], names: list[str]) -> None:
    """
    Raise if a reward function or model failed. All ranks see the same rewards, so that all of them raise or none does.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`):
            Rewards of all ranks.
        funcs (`list`):
            Guarded functions and reward models.
        names (`list[str]`):
            Their names.

    Raises:
        RewardFunctionError: naming the function or model and the completion.
    """
    from_model = torch.tensor([isinstance(func, nn.Module) for func in funcs], device=rewards.device)
    bad = (rewards == FAILED) | (~rewards.isfinite() & from_model)
    if not bad.any():
        return
    column = int(bad.any(dim=0).nonzero()[0])
    func, row = funcs[column], int(bad[:, column].nonzero()[0])
    faults = [func.fault] if isinstance(func, RewardGuard) and func.fault else []
    where = f"completion {row} of {len(rewards)} (counted over all processes)"
    raise RewardFunctionError(
        [*gather_object(faults), f"The reward model `{names[column]}` returned NaN or infinity for {where}."][0]
    )
