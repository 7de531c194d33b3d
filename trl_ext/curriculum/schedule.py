"""
Which prompts a run sees when: a curriculum over their difficulty.

Easy first and hard later is Bengio et al.'s curriculum (https://dl.acm.org/doi/10.1145/1553374.1553380). Prompts that
the policy solves about half of the time are those whose outcomes have the most variance, p (1 − p), and so the most to
teach (https://huggingface.co/papers/2504.03380).
"""

import copy
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from numbers import Real
from typing import Any, Self

import torch
from datasets import Dataset

from ..errors import require, require_one_of
from ..rollouts.choosers import PromptChooser
from ..rollouts.generation_batch import GenerationBatch
from ..rollouts.stream import prompt_key
from .difficulty import PASS_RATE


SCHEDULES = ("easy_to_hard", "frontier", "mixed")
# Completions that the prior is worth: what a column says, or ½ where nothing is known
PRIOR_COMPLETIONS = 2.0


class DifficultyCurriculum(PromptChooser):
    """
    Says what is trained on next, by difficulty. Every trainer takes one as `curriculum`. Those that roll out let it
    choose, for every generation batch, among the prompts that are dealt and the next ones of the data set.

    Difficulty is the probability of failure, 1 − pass rate. It starts from a column, or at ½, and follows the rollouts
    of the run: (c·d₀ + failures) / (c + completions), where d₀ is the start, c = `PRIOR_COMPLETIONS`, and what was
    seen earlier fades by `memory` whenever the prompt is seen again.

    - `"easy_to_hard"`: of the candidates, sorted by difficulty, a window that moves from the easiest to the hardest,
      and is there once `until` of the run is over.
    - `"frontier"`: the candidates with a pass rate nearest ½.
    - `"mixed"`: `share` of them by `"frontier"`, the others as they are dealt.

    [`~trl_ext.DPOTrainer`] has no rollouts: difficulty is what the column says, and it trains on every row once an
    epoch, in the order of [`epoch_order`]. `lookahead`, `until` and `memory` mean nothing there.

    A choice depends on what it is given alone: it is equal on all ranks, and after a resume.

    Args:
        schedule (`str`, *optional*, defaults to `"frontier"`):
            `"easy_to_hard"`, `"frontier"` or `"mixed"`.
        column (`str`, *optional*):
            Column of the data set that says how hard a row is: any number, more is harder; with a minus before its
            name, such as `"-margin"`, more is easier. Numbers count by their rank. `"pass_rate"` is its own measure
            (in [0, 1], more is easier; [`~trl_ext.curriculum.difficulty.pass_rates`] writes it). `None`: only
            rollouts say it.
        lookahead (`int`, *optional*, defaults to `4`):
            Candidates for every prompt that is chosen, those that are dealt among them.
        until (`float`, *optional*, defaults to `0.8`):
            Share of the run, in (0, 1], over which `"easy_to_hard"` moves and completions grow.
        share (`float`, *optional*, defaults to `0.5`):
            Of `"mixed"`, in (0, 1).
        memory (`float`, *optional*, defaults to `0.5`):
            What is left, in [0, 1], of a prompt's earlier evidence when it is seen again.
        start_completion_length (`int`, *optional*):
            Longest completion, in tokens, at the start; it grows linearly to the trainer's `max_completion_length`.
            `None`: that from the start.

    Raises:
        ValueError: for a schedule that isn't known, or a number out of its range.
    """

    key = "curriculum"

    def __init__(
        self,
        schedule: str = "frontier",
        column: str | None = None,
        lookahead: int = 4,
        until: float = 0.8,
        share: float = 0.5,
        memory: float = 0.5,
        start_completion_length: int | None = None,
    ) -> None:
        require_one_of("schedule", schedule, SCHEDULES)
        require(lookahead >= 2, f"lookahead={lookahead} leaves nothing to choose from. Set 2 or more.")
        for name, value, allowed in (
            ("until", until, 0 < until <= 1),
            ("share", share, 0 < share < 1),
            ("memory", memory, 0 <= memory <= 1),
            (
                "start_completion_length",
                start_completion_length,
                start_completion_length is None or start_completion_length > 0,
            ),
        ):
            require(allowed, f"{name}={value} is out of range; see DifficultyCurriculum's documentation.")
        require(
            column != f"-{PASS_RATE}",
            f"column={column!r}: a larger pass rate means easier already. Set {PASS_RATE!r}, without the minus.",
        )
        self.column = None if column is None else column.removeprefix("-")
        self.more_is_easier = column == PASS_RATE or column != self.column
        self.schedule, self.lookahead, self.until = schedule, lookahead, until
        self.share, self.memory, self.start_completion_length = share, memory, start_completion_length
        self.success_threshold = 0.5  # of the trainer, see `prepared`
        self._column = column
        self._sorted: list[float] = []  # the column's numbers
        self._seen: dict[str, tuple[float, float]] = {}  # by prompt: faded failures, faded completions

    def __repr__(self) -> str:
        names = ("schedule", "lookahead", "until", "share", "memory", "start_completion_length")
        settings = {"column": self._column, **{name: getattr(self, name) for name in names}}
        return f"DifficultyCurriculum({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def prepared(self, dataset: Any, config: Any) -> Self:
        """
        The curriculum of one run.

        Raises:
            ValueError: if the column is missing, is dropped before training, holds something that is not a number, or
                holds the same number everywhere.
        """
        own = copy.copy(self)
        own._seen, own.success_threshold = dict(self._seen), config.success_threshold
        if self.column is not None:
            assert isinstance(dataset, Dataset)
            require(
                self.column in dataset.column_names,
                f"The curriculum's column {self.column!r} is missing: train_dataset has only {dataset.column_names}.",
            )
            require(
                not config.remove_unused_columns,
                f"The curriculum's column {self.column!r} is dropped by remove_unused_columns=True. Set it to False.",
            )
            own.read_column(dataset[self.column])
        return own

    # Difficulty

    def read_column(self, values: Sequence[float | None]) -> None:
        """
        Take in all numbers of the column, once, before training: they count by their rank.

        Raises:
            ValueError: if one of them is not a number, or all are equal.
        """
        self._sorted = self._in_order(values)

    def _in_order(self, values: Sequence[float | None]) -> list[float]:
        known = [value for value in values if value is not None]
        if any(isinstance(v, bool) or not isinstance(v, Real) or not math.isfinite(v) for v in known):
            raise ValueError(f"The column {self.column!r} holds something else than finite numbers. Choose another.")
        if self.column == PASS_RATE and not all(0 <= value <= 1 for value in known):
            raise ValueError(f"The column {PASS_RATE!r} holds numbers outside [0, 1]. Name it otherwise.")
        if len(set(known)) < 2:
            raise ValueError(f"The column {self.column!r} has the same number everywhere: nothing is harder.")
        return sorted(map(float, known))

    def _of_value(self, value: float | None, in_order: list[float]) -> float:
        """What a number of the column says, in [0, 1]; `in_order` are all of them."""
        if value is None:
            return 0.5
        if self.column == PASS_RATE:
            share = float(value)
        else:
            below, up_to = bisect_left(in_order, value), bisect_right(in_order, value)
            share = 0.5 * (below + up_to) / max(len(in_order), 1)
        return 1 - share if self.more_is_easier else share

    def prior(self, row: dict[str, Any]) -> float:
        """What is known of a row before any rollout, in [0, 1]; ½ where that is nothing."""
        return 0.5 if self.column is None else self._of_value(row.get(self.column), self._sorted)

    def priors(self, values: Sequence[float | None]) -> list[float]:
        """
        The [`prior`] of rows that the column gives these values, of which they are all that count.

        Raises:
            ValueError: as [`read_column`].
        """
        in_order = self._in_order(values)
        return [self._of_value(value, in_order) for value in values]

    def difficulty(self, row: dict[str, Any]) -> float:
        """Probability, in [0, 1], that a completion for this row fails."""
        failures, completions = self._seen.get(prompt_key(row), (0.0, 0.0))
        return (PRIOR_COMPLETIONS * self.prior(row) + failures) / (PRIOR_COMPLETIONS + completions)

    def observe(self, rows: Sequence[dict[str, Any]], outcomes: torch.Tensor, live: Sequence[bool] = ()) -> None:
        """
        Learn from a round of generation. A completion solves its prompt from an outcome reward of
        `success_threshold` on.

        Args:
            rows (`list[dict]`):
                One for each group.
            outcomes (`torch.Tensor` of shape `(P, G)`):
                Outcome rewards by group, NaN = not applicable.
            live (`list[bool]`, *optional*):
                Has no effect.
        """
        known = ~outcomes.isnan()
        tried = known.sum(dim=1).tolist()
        failed = ((outcomes < self.success_threshold) & known).float().sum(dim=1).tolist()
        for row, failures, completions in zip(rows, failed, tried, strict=True):
            if completions:
                key = prompt_key(row)
                before = self._seen.get(key, (0.0, 0.0))
                self._seen[key] = (self.memory * before[0] + failures, self.memory * before[1] + completions)

    def end(self, trainer: Any, batch: GenerationBatch) -> None:
        """Logs how hard the chosen prompts are, how many dealt ones were replaced, and how long completions may be."""
        metrics, difficulties = trainer.train_metrics, [self.difficulty(row) for row in batch.group_rows]
        metrics["curriculum/difficulty"].append(sum(difficulties) / len(difficulties))
        metrics["curriculum/prompts_replaced"].append(batch.replaced)
        if self.start_completion_length is not None:
            metrics["curriculum/completion_length"].append(trainer.completion_length())

    # Choice

    def choose(self, rows: Sequence[dict[str, Any]], count: int, progress: float = 0.0, dealt: int = 0) -> list[int]:
        """See [`PromptChooser.choose`]. The result depends on the arguments and on what was observed alone."""
        if len(rows) <= count:
            return list(range(len(rows)))
        hard = [self.difficulty(row) for row in rows]
        if self.schedule == "easy_to_hard":
            order = sorted(range(len(rows)), key=lambda i: hard[i])
            start = round(self._ramp(progress) * (len(rows) - count))
            return sorted(order[start : start + count])
        by_frontier = sorted(range(len(rows)), key=lambda i: abs(hard[i] - 0.5))
        if self.schedule == "frontier":
            return sorted(by_frontier[:count])
        best = by_frontier[: round(self.share * count)]
        rest = [i for i in range(len(rows)) if i not in set(best)]
        return sorted(best + rest[: count - len(best)])

    def epoch_order(self, difficulties: Sequence[float], seed: int, epoch: int) -> list[int]:
        """
        The order in which to train on all rows of a data set, each once.

        - `"easy_to_hard"`: by difficulty.
        - `"frontier"`: those nearest ½ first.
        - `"mixed"`: `share` of the places go by `"frontier"`, evenly spread; at the others stand rows by chance.

        Args:
            difficulties (`list[float]`):
                Of each row, in [0, 1]: what [`priors`] says.
            seed (`int`):
                Shuffles rows of equal difficulty, together with `epoch`.
            epoch (`int`):
                Epoch, from 0.

        Returns:
            `list[int]`: row numbers.
        """
        shuffled = torch.randperm(len(difficulties), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        if self.schedule == "easy_to_hard":
            return sorted(shuffled, key=lambda i: difficulties[i])  # stable
        by_frontier = sorted(shuffled, key=lambda i: abs(difficulties[i] - 0.5))
        if self.schedule == "frontier":
            return by_frontier
        order: dict[int, None] = {}
        queues = iter(by_frontier), iter(shuffled)
        for place in range(len(shuffled)):
            by_chance = math.floor((place + 1) * self.share) == math.floor(place * self.share)
            order[next(i for i in queues[by_chance] if i not in order)] = None
        return list(order)

    def completion_length(self, longest: int, progress: float) -> int:
        """Tokens that a completion may have now, where `longest` is the trainer's setting."""
        if self.start_completion_length is None or self.start_completion_length >= longest:
            return longest
        return round(self.start_completion_length + self._ramp(progress) * (longest - self.start_completion_length))

    def _ramp(self, progress: float) -> float:
        return min(progress / self.until, 1.0)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: evidence by prompt."""
        return {"seen": dict(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        self._seen = dict(state["seen"])
