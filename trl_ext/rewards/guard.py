"""
Reward functions are the user's code. When one fails, the error says which function it was, what happened, and for
which sample.
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


class RewardServiceError(RuntimeError):
    """A reward service was asked again and again, in vain: there is no use in asking for single samples."""


class RewardTimeoutError(RuntimeError):
    """
    The reward function of another process didn't return while this one waited for it. Nothing is saved, because the
    other process can't take part.
    """


# Stands for the reward of a function that failed. Infinity is no valid reward, and TRL gathers rewards anyway, so that
# every rank learns of a failure on any rank without a further collective.
FAILED = math.inf
# What TRL passes to every reward function
TRLS_ARGUMENTS = {"prompts", "completions", "completion_ids"}
GIVEN_UP = "on the whole batch; here is its first sample"
# How many samples are tried one by one after a function raised on a batch
MOST_PROBES = 64
# TRL stores rewards in float32
LARGEST_REWARD = torch.finfo(torch.float32).max


def _by_completion(columns: dict[str, Any]) -> dict[str, list[Any]]:
    """The arguments that have one value for each completion; all others are shared."""
    size = len(columns["prompts"])
    return {key: value for key, value in columns.items() if isinstance(value, list) and len(value) == size}


def cut_columns(columns: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """
    The arguments of a reward function for the completions from `start` to `stop`: lists with one value for each
    completion are cut, all other arguments are passed on.
    """
    return {**columns, **{key: value[start:stop] for key, value in _by_completion(columns).items()}}


def describe_fault(name: str, problem: str, columns: dict[str, Any], index: int) -> str:
    """An error message: what went wrong with a reward function, and its arguments for the completion at `index`."""
    shown = "\n".join(f"  {key}: {value[index]!r}"[:500] for key, value in _by_completion(columns).items())
    return f"The reward function `{name}` {problem}\n{shown}"


class RewardGuard:
    """
    Calls a reward function and checks what it returns. After a failure, the message is in `fault` and all rewards are
    [`FAILED`]; the trainer then saves what was trained and raises the error on all ranks together.

    That is for calls as TRL makes them, by keyword, with `prompts`, `completions` and `completion_ids`. Any other call
    goes to the function as it is, and what it returns or raises comes back: a trainer's `reward_funcs` can be called
    by hand.

    Args:
        func (`Callable`):
            A reward function as TRL takes them, sync or async.
        name (`str`):
            Its name in logs.

    Attributes:
        fault (`str`, *optional*):
            What went wrong in the latest failure.
        ready (`list`, *optional*):
            Rewards that were computed and checked beforehand. The next call returns them without calling the function.
        returned (`list`):
            Rewards of the latest call. Some may be [`~trl_ext.rewards.steps.StepRewards`].
        running (`bool`):
            Whether a call is under way.
    """

    def __init__(self, func: Callable[..., Any], name: str) -> None:
        self.func = func
        self.__name__ = name
        self.fault: str | None = None
        self.ready: list[float | None] | None = None
        self.returned: list[Any] = []
        self.running = False

    def __getattr__(self, name: str) -> Any:  # called for attributes that the guard itself lacks
        if name == "func":
            raise AttributeError(name)  # it is missing while the guard is unpickled
        return getattr(self.func, name)

    def _failed(self, columns: dict[str, Any], problem: str, index: int) -> list[float]:
        self.fault = describe_fault(self.__name__, problem, columns, index)
        self.returned = [FAILED] * len(columns["prompts"])
        return self.returned

    def _raised(self, columns: dict[str, Any], error: Exception, where: str, index: int = 0) -> list[float]:
        return self._failed(columns, f"raised {type(error).__name__}: {error} ({where}):", index)

    def _take_ready(self, columns: dict[str, Any], ready: list[float | None]) -> list[float | None]:
        self.ready = None
        expected = len(columns["prompts"])
        if len(ready) != expected:
            raise ValueError(f"{len(ready)} rewards of `{self.__name__}` are ready, for {expected} completions")
        self.returned = ready
        return ready

    def _checked(self, columns: dict[str, Any], output: Any) -> Any:
        expected = len(columns["prompts"])
        if isinstance(output, Iterator):  # TRL accepts generators and maps
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
            is_number = math.prod(getattr(reward, "shape", (0,))) == 1  # a tensor with one element, as in TRL
            if isinstance(reward, Iterable) and not isinstance(reward, str) and not is_number:
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
        """
        Arguments of single samples, to find one for which the function raises. Their number is limited, because a
        judge may be slow.
        """
        # Recorded first, because a timeout may come before the samples have been tried
        self._raised(columns, error, GIVEN_UP)
        for index in range(min(len(columns["prompts"]), MOST_PROBES)):
            yield index, cut_columns(columns, index, index + 1)

    def _raised_on_batch_only(self, columns: dict[str, Any], error: Exception) -> list[float]:
        tried = min(len(columns["prompts"]), MOST_PROBES)
        where = f"on the whole batch, but on none of its first {tried} samples alone; here is the first"
        return self._raised(columns, error, where)

    def __call__(self, *args: Any, **columns: Any) -> Any:
        if args or not columns.keys() >= TRLS_ARGUMENTS:
            return self.func(*args, **columns)
        if self.ready is not None:
            return self._take_ready(columns, self.ready)
        self.running = True
        try:
            return self._checked(columns, self.func(**columns))
        except RewardServiceError as error:
            return self._raised(columns, error, GIVEN_UP)
        except Exception as error:  # anything that the user's code raises
            for index, alone in self._one_by_one(columns, error):
                try:
                    self.func(**alone)
                except Exception:
                    return self._raised(columns, error, "for this sample", index)
            return self._raised_on_batch_only(columns, error)
        finally:
            self.running = False


class AsyncRewardGuard(RewardGuard):
    """[`RewardGuard`] for an async reward function."""

    async def __call__(self, *args: Any, **columns: Any) -> Any:
        if args or not columns.keys() >= TRLS_ARGUMENTS:
            return await self.func(*args, **columns)
        if self.ready is not None:
            return self._take_ready(columns, self.ready)
        self.running = True
        try:
            return self._checked(columns, await self.func(**columns))
        except RewardServiceError as error:
            return self._raised(columns, error, GIVEN_UP)
        except Exception as error:
            for index, alone in self._one_by_one(columns, error):
                try:
                    await self.func(**alone)
                except Exception:
                    return self._raised(columns, error, "for this sample", index)
            return self._raised_on_batch_only(columns, error)
        finally:
            self.running = False


def guard(func: Callable[..., Any], name: str) -> RewardGuard:
    """Wraps a reward function in a [`RewardGuard`]; returns a guard as it is."""
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
