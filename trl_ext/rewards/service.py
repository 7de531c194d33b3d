"""
Rewards of a service that may fail: a judge behind HTTP, a sandbox, another machine. A call that fails is made again,
with longer and longer waits. If that doesn't help, its completions have no reward, up to a limit; then the run stops
with a checkpoint.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from trl.trainer.utils import get_callable_name, is_async_callable

from ..errors import require, require_count, require_number, require_type
from .guard import RewardGuard, RewardServiceError


logger = logging.getLogger(__name__)

# Seconds between two attempts, at most
LONGEST_WAIT = 60.0
# What TRL passes for logging: of a call that failed, nothing is logged
LOGGERS = ("log_extra", "log_metric")


class _TooLongError(Exception):
    """A call took longer than it may."""


class _Attempt:
    """The arguments of one call, which keep what it logs."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self._logged: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        kept = {name: partial(self._keep, columns[name]) for name in LOGGERS if name in columns}
        self.columns = {**columns, **kept}

    def _keep(self, log: Callable[..., Any], *args: Any) -> None:
        self._logged.append((log, args))

    def log(self) -> None:
        """Log what was kept."""
        for log, args in self._logged:
            log(*args)


class ServiceReward:
    """
    A reward function that asks a service. An answer that doesn't come, or that holds no rewards, costs a wait, then
    the rewards of some completions, and only then the run.

    - A call fails if the function raises, if it takes longer than `timeout`, or if what it returns can't be rewards:
      another number of them, NaN, infinity, text.
    - It is made again up to `retries` times: after `first_wait` seconds, twice that, four times that, and so on.
    - If it fails again, its completions have no reward from this function (`None`: not applicable), as TRL has it.
    - If more than `most_missing` completions of this process in a row have none, the function is asked once at each
      call, and the error stops the run on all processes. The trainer saves a checkpoint first.

    `reward_timeout` limits a call from outside, waits included: leave it out, or make it longer than all attempts
    together.

    Args:
        func (`Callable`):
            A reward function as TRL takes them, sync or async. Called from a thread if there is a `timeout`.
        retries (`int`, *optional*, defaults to `4`):
            How many times a call that failed is made again.
        first_wait (`float`, *optional*, defaults to `1.0`):
            Seconds before the first of these.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds that one call may take. A sync call can't be cancelled: its thread keeps running. `None`: no limit.
        most_missing (`int`, *optional*, defaults to `256`):
            How many completions in a row may go without a reward.

    Attributes:
        missing (`int`):
            How many completions, in a row until now, have got none.

    Raises:
        TypeError: if `func` can't be called, or a number is none.
        ValueError: if a number is out of its range.

    Examples:

    ```python
    def judge(prompts, completions, **kwargs):
        answer = requests.post(URL, json={"prompts": prompts, "completions": completions}, timeout=30)
        answer.raise_for_status()
        return answer.json()["scores"]


    trainer = trl_ext.DAPOTrainer(model, trl_ext.ServiceReward(judge), args, train_dataset=prompts)
    ```
    """

    def __new__(cls, func: Any = None, *args: Any, **kwargs: Any) -> "ServiceReward":
        is_async = callable(func) and is_async_callable(func)
        return super().__new__(_AsyncServiceReward if is_async and cls is ServiceReward else cls)

    def __init__(
        self,
        func: Callable[..., Any],
        retries: int = 4,
        first_wait: float = 1.0,
        timeout: float | None = 60.0,
        most_missing: int = 256,
    ) -> None:
        require_type("func", func, Callable, "Pass a reward function.")
        require_count("retries", retries, least=0)
        require_count("most_missing", most_missing, least=0)
        require_number("first_wait", first_wait)
        require(first_wait >= 0, f"first_wait={first_wait} must be at least 0 seconds.")
        if timeout is not None:
            require_number("timeout", timeout)
            require(timeout > 0, f"timeout={timeout} must be above 0 seconds, or None for no limit.")
        self.func, self.retries, self.first_wait = func, retries, first_wait
        self.timeout, self.most_missing = timeout, most_missing
        self.__name__ = get_callable_name(func)
        self.missing = 0
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    @property
    def _waits(self) -> list[float]:
        """Before each attempt. A service that is given up is asked once."""
        if self.missing > self.most_missing:
            return [0.0]
        return [0.0, *(min(self.first_wait * 2**i, LONGEST_WAIT) for i in range(self.retries))]

    def _problem(self, columns: dict[str, Any], output: Any) -> str | None:
        """What is wrong with an answer."""
        judged = RewardGuard(lambda **_: output, self.__name__)
        judged(**columns)
        return judged.fault and judged.fault.splitlines()[0]

    def _warn(self, problem: str, wait: float) -> None:
        logger.warning(f"{problem} It is called again in {wait:g} seconds.")

    def _finish(self, columns: dict[str, Any], output: Any, problems: list[str]) -> Any:
        """What TRL gets after the last attempt: `output`, unless there was a problem with every attempt."""
        size = len(columns["prompts"])
        failed = problems and output is None
        with self._lock:
            self.missing = self.missing + size if failed else 0
            missing = self.missing
        if "log_metric" in columns:  # always, because TRL averages over processes what all of them log
            columns["log_metric"](f"rewards/{self.__name__}/retries", float(len(problems) - bool(failed)))
            columns["log_metric"](f"rewards/{self.__name__}/missing", size * float(bool(failed)))
        if not failed:
            return output
        if missing > self.most_missing:
            raise RewardServiceError(
                f"{problems[-1]} It has given no reward for {missing} completions in a row, and most_missing="
                f"{self.most_missing}"
            )
        logger.warning(
            f"{problems[-1]} Its {size} completions have no reward ({missing} of {self.most_missing} in a row)."
        )
        return [None] * size

    def _raised(self, error: Exception) -> str:
        return f"The reward function `{self.__name__}` raised {type(error).__name__}: {error}."

    @property
    def _too_long(self) -> str:
        return f"The reward function `{self.__name__}` took longer than {self.timeout or 0:g} seconds."

    def __call__(self, **columns: Any) -> Any:
        problems: list[str] = []
        for wait in self._waits:
            if problems:
                self._warn(problems[-1], wait)
                time.sleep(wait)
            attempt = _Attempt(columns)
            try:
                output = self._asked(attempt.columns)
                problem = self._problem(columns, output)
            except _TooLongError:
                problem = self._too_long
            except Exception as error:  # anything that the user's code raises
                problem = self._raised(error)
            if problem is None:
                attempt.log()
                return self._finish(columns, output, problems)
            problems.append(problem)
        return self._finish(columns, None, problems)

    def _asked(self, columns: dict[str, Any]) -> Any:
        """
        What the function returns.

        Raises:
            _TooLongError: if it takes too long.
        """
        if self.timeout is None:
            return self.func(**columns)
        answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put((self.func(**columns), None))
            except Exception as error:
                answers.put((None, error))

        # Not of a pool, for which the interpreter would wait at its exit even if a call hangs
        Thread(target=ask, name=self.__name__, daemon=True).start()
        try:
            output, error = answers.get(timeout=self.timeout)
        except Empty:
            raise _TooLongError from None
        if error is not None:
            raise error
        return output


class _AsyncServiceReward(ServiceReward):
    """[`ServiceReward`] of an async function."""

    async def __call__(self, **columns: Any) -> Any:
        problems: list[str] = []
        for wait in self._waits:
            if problems:
                self._warn(problems[-1], wait)
                await asyncio.sleep(wait)
            attempt = _Attempt(columns)
            try:
                output = await asyncio.wait_for(self.func(**attempt.columns), self.timeout)
                problem = self._problem(columns, output)
            except Exception as error:
                too_long = isinstance(error, TimeoutError) and not str(error)
                problem = self._too_long if too_long else self._raised(error)
            if problem is None:
                attempt.log()
                return self._finish(columns, output, problems)
            problems.append(problem)
        return self._finish(columns, None, problems)
