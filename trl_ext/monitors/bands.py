"""
Numbers that a configuration expects of a run: a band for a logged quantity at a step, from runs that went well. A run
says when it is outside of one, as soon as it has got there.

```yaml
expect:
  reward: {20: [0.2, 0.5], 100: [0.7, 0.95]} # at step 20 and at step 100
  objective/kl: {100: [0, 3]}
```
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import require, require_count, require_number, require_type, shown


logger = logging.getLogger(__name__)


@dataclass
class Band:
    """
    What one quantity should be at one step.

    Args:
        metric (`str`):
            Its name in the trainer's logs.
        step (`int`):
            Optimizer step. The first log from there on that has the quantity counts.
        low, high (`float`):
            The band's ends, which belong to it.
        value (`float`, *optional*):
            What the quantity was; `None` until it is logged.
        at (`int`, *optional*):
            The step of that log.
        reached (`bool`, *optional*, defaults to `True`):
            `False`: the run ended before `step`.
    """

    metric: str
    step: int
    low: float
    high: float
    value: float | None = None
    at: int | None = None
    reached: bool = True

    @property
    def holds(self) -> bool:
        """Whether the value is there, and in the band."""
        return self.value is not None and self.low <= self.value <= self.high

    def __str__(self) -> str:
        expected = f"expected from {self.low:g} to {self.high:g} at step {self.step}"
        if self.value is not None:
            return f"{self.metric} is {self.value:.4g} at step {self.at}, {expected}"
        return f"{self.metric} was not logged from then on, {expected}"


class Bands(TrainerCallback):
    """
    Compares a run with the numbers that are expected of it, and warns when it is outside of a band. What was logged
    before a resume counts.

    Args:
        expect (`Mapping[str, Mapping[int, Sequence[float]]]`):
            By the name of a quantity and the step: the ends of its band.

    Attributes:
        bands (`list[Band]`):
            All of them, in the order of steps.

    Raises:
        TypeError, ValueError: for what isn't such a mapping.
    """

    def __init__(self, expect: Mapping[str, Any]) -> None:
        self.bands: list[Band] = []
        for metric, by_step in expect.items():
            require_type(f"expect: {metric}", by_step, Mapping, "Write bands by step, such as {20: [0.2, 0.5]}.")
            for step, ends in by_step.items():
                named = f"expect: {metric}, step {step}"
                number = int(step) if isinstance(step, str) and step.isdecimal() else step  # JSON's keys are texts
                require_count(named, number, 0)
                require(
                    isinstance(ends, list | tuple) and len(ends) == 2,
                    f"{named} is {shown(ends)}. Write the two ends of a band, such as [0.2, 0.5].",
                )
                for end in ends:
                    require_number(named, end)
                    require(not math.isnan(end), f"{named} has an end that is no number: {list(ends)}.")
                low, high = ends
                require(low <= high, f"{named} is {list(ends)}. The lower end comes first.")
                self.bands.append(Band(metric, number, float(low), float(high)))
        self.bands.sort(key=lambda band: band.step)

    def judge(self, logs: Mapping[str, Any], step: int) -> list[Band]:
        """Takes a log into account, and returns the bands that it is the first to be judged by."""
        judged = []
        for band in self.bands:
            value = logs.get(band.metric)
            if band.value is not None or step < band.step or isinstance(value, bool):
                continue
            if isinstance(value, int | float):
                band.value, band.at = float(value), step
                judged.append(band)
        return judged

    def replay(self, log_history: Iterable[Mapping[str, Any]]) -> None:
        """[`judge`] for every entry of a trainer's `log_history`."""
        for entry in log_history:
            self.judge(entry, int(entry.get("step", 0)))

    def end(self, step: int) -> None:
        """Has the bands after the last step of a run count as not reached."""
        for band in self.bands:
            band.reached = band.step <= step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.replay(state.log_history)  # of a resumed run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for band in self.judge(logs or {}, state.global_step):
            if not band.holds and state.is_world_process_zero:
                logger.warning(f"{band}. That is outside of what `expect` says: compare what was changed.")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end(state.global_step)


def bands_of(trainer: Any) -> list[Band]:
    """The bands that a trainer is compared with."""
    return [band for found in trainer.callback_handler.callbacks if isinstance(found, Bands) for band in found.bands]


def of_stage(expect: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """What is expected of one stage of several: the quantities whose names begin with `stage/`, without that."""
    begin = f"{stage}/"
    return {name.removeprefix(begin): bands for name, bands in expect.items() if name.startswith(begin)}


def lines(bands: Sequence[Band]) -> list[str]:
    """How a run compares with its bands, for people: a count, and a line for each that doesn't hold."""
    reached = [band for band in bands if band.reached]
    if not reached:
        return []
    held = sum(band.holds for band in reached)
    first = f"expected numbers: {held} of {len(reached)} are in their bands"
    return [first, *(f"  {band}" for band in reached if not band.holds)]


def entries(bands: Sequence[Band]) -> list[dict[str, Any]]:
    """Bands as a summary has them. A value that is no number, which JSON doesn't have, is `None`."""
    found = []
    for band in bands:
        value = None if band.value is None or not math.isfinite(band.value) else band.value
        found.append({**asdict(band), "value": value, "holds": band.holds})
    return found
