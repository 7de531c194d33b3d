"""
Numbers that a configuration expects of a run: a band for a logged quantity at a step, from runs that went well. A run
says when it leaves one, as soon as it has got there.

```yaml
expect:
  reward: {20: [0.2, 0.5], 100: [0.7, 0.95]} # at step 20 and at step 100
  objective/kl: {100: [0, 3]}
```
"""

import logging
import math
from collections.abc import Mapping
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
    """

    metric: str
    step: int
    low: float
    high: float
    value: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value is there, and in the band."""
        return self.value is not None and self.low <= self.value <= self.high


class Bands(TrainerCallback):
    """
    Compares a run with the numbers that are expected of it, and warns when it leaves a band. What was logged before a
    resume counts.

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
                low, high = ends
                require(low <= high, f"{named} is {list(ends)}. The lower end comes first.")
                self.bands.append(Band(metric, number, float(low), float(high)))
        self.bands.sort(key=lambda band: band.step)

    def judge(self, metric: str, step: int, value: Any) -> list[Band]:
        """Takes a quantity at a step into account, and returns the bands that it is the first to be judged by."""
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            return []
        found = [b for b in self.bands if b.metric == metric and b.step <= step and b.value is None]
        for band in found:
            band.value = float(value)
        return found

    @property
    def lines(self) -> list[str]:
        """How the run compares with all bands, for people."""
        if not self.bands:
            return []
        held = sum(band.holds for band in self.bands)
        lines = [f"expected numbers: {held} of {len(self.bands)} are in their bands"]
        for band in self.bands:
            if band.value is None:
                lines.append(f"  {band.metric} was not logged from step {band.step} on")
            elif not band.holds:
                lines.append(f"  {_told(band)}")
        return lines

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All bands, as a summary has them."""
        return [{**asdict(band), "holds": band.holds} for band in self.bands]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for entry in state.log_history:  # of a resumed run
            for metric, value in entry.items():
                self.judge(metric, int(entry.get("step", 0)), value)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        judged = [
            band for metric, value in (logs or {}).items() for band in self.judge(metric, state.global_step, value)
        ]
        for band in judged:
            if not band.holds and state.is_world_process_zero:
                logger.warning(
                    f"{_told(band)}. The configuration was measured with other numbers: compare what was changed, or "
                    "leave `expect` out."
                )


def bands_of(trainer: Any) -> Bands | None:
    """The bands that a trainer is compared with, if there are any."""
    return next((found for found in trainer.callback_handler.callbacks if isinstance(found, Bands)), None)


def _told(band: Band) -> str:
    return f"{band.metric} is {band.value:.4g} at step {band.step}, expected from {band.low:g} to {band.high:g}"
