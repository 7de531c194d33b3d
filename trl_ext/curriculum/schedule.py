"""
A curriculum: chooses by difficulty which prompts a run is trained on, and when.

Bengio et al.'s curriculum starts with easy examples and ends with hard ones
(https://dl.acm.org/doi/10.1145/1553374.1553380). Prompts that the policy solves about half of the time teach most,
because the variance of their outcomes, p (1 − p), is largest (https://huggingface.co/papers/2504.03380).
"""

import copy
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from numbers import Real
from typing import Any, Self

import torch
from datasets import Dataset

from ..errors import require, require_count, require_number, require_one_of, require_type
from ..metric_keys import COMPLETION_LIMIT
from ..rollouts.choosers import PromptChooser
from ..rollouts.generation_batch import GenerationBatch
from ..rollouts.informed import PROMPT_FEATURES, AdaptiveOutlook
from ..rollouts.ledger import Ledger
from ..rollouts.prompt_features import Reader
from ..rollouts.stream import prompt_key
from .difficulty import PASS_RATE


SCHEDULES = ("easy_to_hard", "frontier", "mixed")
# Weight of the initial difficulty, in completions
PRIOR_COMPLETIONS = 2.0
# Of `memory`
MEMORY = 0.5


class DifficultyCurriculum(PromptChooser):
    """
    Chooses by difficulty what is trained on next. Every trainer takes one as `curriculum`. Trainers with rollouts let
    it choose, for every generation batch, among the prompts that the loader deals and the next ones of the data set.

    Difficulty is the probability that a completion fails, 1 − pass rate. Where a column says how hard a row is, it
    starts at the column's value d₀, and is updated by the rollouts of the run to (c·d₀ + failures) / (c +
    completions), where c is `PRIOR_COMPLETIONS`. The counts of failures and completions are multiplied by `memory`
    whenever the prompt is observed again. A row without a value starts at ½.

    Without a column it is predicted as `refill_draws="informed"` predicts, by an
    [`~trl_ext.rollouts.informed.AdaptiveOutlook`]: from the policy's hidden states on the prompt, from the groups of
    all prompts, and from the prompt's own groups. It starts at ½ for all prompts.

    - `"easy_to_hard"`: sorts the candidates by difficulty and takes neighbours. At the start of the run these are the
      easiest candidates; from the moment that `until` of the run is over, they are the hardest.
    - `"frontier"`: takes the candidates with a pass rate nearest ½.
    - `"mixed"`: takes `share` of the prompts by `"frontier"`, and the others in the order in which they are dealt.

    [`~trl_ext.DPOTrainer`] has no rollouts. There the difficulty is the value of the column, and every epoch trains on
    each row once, in the order of [`epoch_order`]. `lookahead`, `until` and `memory` have no effect.

    A choice depends on the arguments and on what was observed, so that it is the same on all ranks and after a resume.

    Args:
        schedule (`str`, *optional*, defaults to `"frontier"`):
            `"easy_to_hard"`, `"frontier"` or `"mixed"`.
        column (`str`, *optional*):
            Column of the data set with the initial difficulty: numbers that are larger for harder rows. With a minus
            before its name, such as `"-margin"`, numbers are larger for easier rows. Only the rank of a number counts.
            The column `"pass_rate"` is an exception: it holds pass rates in [0, 1], which are larger for easier rows,
            and their value counts ([`~trl_ext.curriculum.difficulty.pass_rates`] writes it). `None`: the difficulty
            is predicted.
        lookahead (`int`, *optional*, defaults to `4`):
            Number of candidates for each prompt that is chosen, including those that the loader deals.
        until (`float`, *optional*, defaults to `0.8`):
            Share of the run, in (0, 1], after which `"easy_to_hard"` is at the hardest candidates and completions have
            their full length.
        share (`float`, *optional*, defaults to `0.5`):
            Share of the prompts, in (0, 1), that `"mixed"` takes by `"frontier"`.
        memory (`float`, *optional*, defaults to `0.5`):
            Factor, in [0, 1], on a prompt's earlier counts when the prompt is observed again. Without a column, it has
            no effect, and can't be changed.
        start_completion_length (`int`, *optional*):
            Longest completion at the start of the run, in tokens. It grows linearly to the trainer's
            `max_completion_length`. `None`: it is `max_completion_length` from the start.
        prompt_features (`str`, *optional*, defaults to `"hidden_states"`):
            What a prediction reads from a prompt itself, as in [`~trl_ext.GRPOConfig`]: the policy's
            `"hidden_states"`, which takes a forward pass over each candidate, or `"none"`. With a column, nothing is
            read.

    Raises:
        ValueError: if the schedule is unknown, or a number is out of its range, or if `memory` is set without a
            column.
    """

    key = "curriculum"

    def __init__(
        self,
        schedule: str = "frontier",
        column: str | None = None,
        lookahead: int = 4,
        until: float = 0.8,
        share: float = 0.5,
        memory: float = MEMORY,
        start_completion_length: int | None = None,
        prompt_features: str = PROMPT_FEATURES[0],
    ) -> None:
        require_one_of("schedule", schedule, SCHEDULES)
        require_one_of("prompt_features", prompt_features, PROMPT_FEATURES)
        require_type("column", column, str | None, "Pass the name of a column, or None.")
        require_count("lookahead", lookahead, least=1)
        require(lookahead >= 2, f"lookahead={lookahead} leaves nothing to choose from. Set 2 or more.")
        for name, number in (("until", until), ("share", share), ("memory", memory)):
            require_number(name, number)
        if start_completion_length is not None:
            require_number("start_completion_length", start_completion_length)
        for name, value, allowed, where in (
            ("until", until, 0 < until <= 1, "in (0, 1]"),
            ("share", share, 0 < share < 1, "in (0, 1)"),
            ("memory", memory, 0 <= memory <= 1, "in [0, 1]"),
            (
                "start_completion_length",
                start_completion_length,
                start_completion_length is None or start_completion_length > 0,
                "above 0, or None",
            ),
        ):
            require(allowed, f"{name}={value} is out of range: choose it {where}.")
        require(
            column != f"-{PASS_RATE}",
            f"column={column!r}: a larger pass rate already means an easier row. Leave out the minus.",
        )
        require(
            column is not None or memory == MEMORY,
            f"memory={memory} has no effect without a column: how fast rollouts are forgotten then follows from how "
            "well they predict. Name a column, or leave memory out.",
        )
        self.column = None if column is None else column.removeprefix("-")
        self.more_is_easier = column == PASS_RATE or column != self.column
        self.schedule, self.lookahead, self.until = schedule, lookahead, until
        self.share, self.memory, self.start_completion_length = share, memory, start_completion_length
        self.prompt_features = prompt_features
        self.success_threshold = 0.5  # `prepared` sets the trainer's
        self._column = column
        self._sorted: list[float] = []  # all numbers of the column
        self._seen: Ledger[str, tuple[float, ...]] = Ledger(tuple)  # by prompt: faded failures, faded completions
        self._outlook = self._predictor(1, 0)

    def __repr__(self) -> str:
        names = ("schedule", "lookahead", "until", "share", "memory", "start_completion_length", "prompt_features")
        settings = {"column": self._column, **{name: getattr(self, name) for name in names}}
        return f"DifficultyCurriculum({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def prepared(self, dataset: Any, config: Any) -> Self:
        """
        The curriculum of one run.

        Raises:
            ValueError: if the column is missing, is dropped before training, holds something that is not a finite
                number, or holds the same number everywhere.
        """
        own = copy.copy(self)
        own._seen, own.success_threshold = Ledger(tuple), config.success_threshold
        own._seen.load(self._seen.state())
        own._outlook = own._predictor(config.num_generations, config.seed)
        if own._outlook is not None and self._outlook is not None:
            own._outlook.load_state_dict(self._outlook.state_dict())
        if self.column is not None:
            assert isinstance(dataset, Dataset)
            require(
                self.column in dataset.column_names,
                f"The curriculum's column {self.column!r} is missing: train_dataset has only {dataset.column_names}. "
                "Name one of these.",
            )
            require(
                not config.remove_unused_columns,
                f"The curriculum's column {self.column!r} is dropped by remove_unused_columns=True. Set "
                "remove_unused_columns=False.",
            )
            own.read_column(dataset[self.column][:])  # in one read, not row by row
        return own

    def _predictor(self, num_generations: int, seed: int) -> AdaptiveOutlook | None:
        """What predicts pass rates. `None`: a column says how hard rows are."""
        if self.column is not None:
            return None
        return AdaptiveOutlook([], num_generations, self.success_threshold, seed, predicted="pass_rate")

    def read_prompts(self, read: Reader) -> None:
        """See [`PromptChooser.read_prompts`]."""
        if self._outlook is not None and self.prompt_features == "hidden_states":
            self._outlook.read_prompts(read)

    # Difficulty

    def read_column(self, values: Sequence[float | None]) -> None:
        """
        Read all numbers of the column, from which ranks are computed. Must be called once, before training.

        Raises:
            ValueError: if one of them is not a finite number, or all are equal.
        """
        self._sorted = self._checked(values)

    def _checked(self, values: Sequence[float | None]) -> list[float]:
        """The numbers among the values, sorted."""
        known = [value for value in values if value is not None]
        if any(isinstance(v, bool) or not isinstance(v, Real) or not math.isfinite(v) for v in known):
            raise ValueError(
                f"The column {self.column!r} holds something that is not a finite number. Choose a different column."
            )
        if self.column == PASS_RATE and not all(0 <= value <= 1 for value in known):
            raise ValueError(
                f"The column {PASS_RATE!r} holds numbers outside [0, 1], which are not pass rates. Rename the column."
            )
        if len(set(known)) < 2:
            raise ValueError(
                f"The column {self.column!r} holds the same number in all rows, so that no row is harder than others. "
                "Choose a different column."
            )
        return sorted(map(float, known))

    def _difficulty_of(self, value: float | None, all_values: list[float]) -> float:
        """The initial difficulty, in [0, 1], of a row with this value in the column; `all_values` are sorted."""
        if value is None:
            return 0.5
        if self.column == PASS_RATE:
            share = float(value)
        else:
            below, up_to = bisect_left(all_values, value), bisect_right(all_values, value)
            share = 0.5 * (below + up_to) / max(len(all_values), 1)
        return 1 - share if self.more_is_easier else share

    def prior(self, row: dict[str, Any]) -> float:
        """The initial difficulty of a row, in [0, 1]; ½ if the column doesn't give it."""
        return 0.5 if self.column is None else self._difficulty_of(row.get(self.column), self._sorted)

    def priors(self, values: Sequence[float | None]) -> list[float]:
        """
        The initial difficulties, in [0, 1], of rows with these values in the column. Ranks are taken among them.

        Raises:
            ValueError: see [`read_column`].
        """
        all_values = self._checked(values)
        return [self._difficulty_of(value, all_values) for value in values]

    def difficulty(self, row: dict[str, Any]) -> float:
        """Probability, in [0, 1], that a completion for this row fails."""
        return self.difficulties([row])[0]

    def difficulties(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """[`difficulty`] of rows. In a run, it must be called on every rank with the same ones."""
        if self._outlook is not None:
            return [1 - rate for rate in self._outlook.pass_rates(rows)]
        counts = [self._seen.get(prompt_key(row), (0.0, 0.0)) for row in rows]
        return [
            (PRIOR_COMPLETIONS * self.prior(row) + failures) / (PRIOR_COMPLETIONS + completions)
            for row, (failures, completions) in zip(rows, counts, strict=True)
        ]

    def begin(self, trainer: Any) -> None:
        """Evidence of a prediction fades with each generation batch."""
        if self._outlook is not None:
            self._outlook.tick()

    def observe(self, rows: Sequence[dict[str, Any]], outcomes: torch.Tensor, live: Sequence[bool] = ()) -> None:
        """
        Learn from a round of generation. A completion fails if its outcome reward is below `success_threshold`.

        Args:
            rows (`list[dict]`):
                Data set rows, one for each group.
            outcomes (`torch.Tensor` of shape `(P, G)`):
                Outcome rewards by group, NaN = not applicable.
            live (`list[bool]`, *optional*):
                Not used.
        """
        known = ~outcomes.isnan()
        if self._outlook is not None:
            scored = known.sum(dim=1) >= min(2, outcomes.size(1))  # an outlook takes other groups for failed ones
            of_scored = [row for row, is_scored in zip(rows, scored.tolist(), strict=True) if is_scored]
            # Pass rates don't depend on what is live
            self._outlook.observe(of_scored, outcomes[scored], [False] * len(of_scored))
            return
        tried = known.sum(dim=1).tolist()
        failed = ((outcomes < self.success_threshold) & known).float().sum(dim=1).tolist()
        for row, failures, completions in zip(rows, failed, tried, strict=True):
            if completions:
                key = prompt_key(row)
                before = self._seen.get(key, (0.0, 0.0))
                self._seen[key] = (self.memory * before[0] + failures, self.memory * before[1] + completions)

    def end(self, trainer: Any, batch: GenerationBatch) -> None:
        """Logs the mean difficulty of the chosen prompts, how many were replaced, and the longest completion."""
        metrics, difficulties = trainer.train_metrics, self.difficulties(batch.group_rows)
        metrics["curriculum/difficulty"].append(sum(difficulties) / len(difficulties))
        metrics["curriculum/prompts_replaced"].append(batch.replaced)
        if self._outlook is not None:
            self._outlook.log(metrics)
        if self.start_completion_length is not None:
            metrics[COMPLETION_LIMIT].append(trainer.completion_length())

    def closing_metrics(self) -> dict[str, float]:
        """How reliable predicted pass rates were lately."""
        return {} if self._outlook is None else self._outlook.closing_metrics()

    # Choice

    def choose(self, rows: Sequence[dict[str, Any]], count: int, progress: float = 0.0, dealt: int = 0) -> list[int]:
        """See [`PromptChooser.choose`]. The result depends on the arguments and on what was observed alone."""
        if len(rows) <= count:
            return list(range(len(rows)))
        difficulties = self.difficulties(rows)
        if self.schedule == "easy_to_hard":
            order = sorted(range(len(rows)), key=lambda i: difficulties[i])
            start = round(self._ramp(progress) * (len(rows) - count))
            return sorted(order[start : start + count])
        by_frontier = sorted(range(len(rows)), key=lambda i: abs(difficulties[i] - 0.5))
        if self.schedule == "frontier":
            return sorted(by_frontier[:count])
        nearest = by_frontier[: round(self.share * count)]
        rest = [i for i in range(len(rows)) if i not in set(nearest)]
        return sorted(nearest + rest[: count - len(nearest)])

    def epoch_order(self, difficulties: Sequence[float], seed: int, epoch: int) -> list[int]:
        """
        The order in which an epoch trains on all rows of a data set, each once.

        - `"easy_to_hard"`: the rows are sorted by difficulty.
        - `"frontier"`: rows with a difficulty nearest ½ come first.
        - `"mixed"`: `share` of the places, evenly spread, are filled by `"frontier"`, and the others at random.

        Args:
            difficulties (`list[float]`):
                Difficulty of each row, in [0, 1], from [`priors`].
            seed (`int`):
                Seed, together with `epoch`, by which rows of equal difficulty are shuffled.
            epoch (`int`):
                Number of the epoch, from 0.

        Returns:
            `list[int]`: row numbers.
        """
        shuffled = torch.randperm(len(difficulties), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        if self.schedule == "easy_to_hard":
            return sorted(shuffled, key=lambda i: difficulties[i])  # rows of equal difficulty stay shuffled
        by_frontier = sorted(shuffled, key=lambda i: abs(difficulties[i] - 0.5))
        if self.schedule == "frontier":
            return by_frontier
        order: dict[int, None] = {}
        queues = iter(by_frontier), iter(shuffled)
        for place in range(len(shuffled)):
            at_random = math.floor((place + 1) * self.share) == math.floor(place * self.share)
            order[next(i for i in queues[at_random] if i not in order)] = None
        return list(order)

    def completion_length(self, longest: int, progress: float) -> int:
        """See [`PromptChooser.completion_length`]."""
        if self.start_completion_length is None or self.start_completion_length >= longest:
            return longest
        return round(self.start_completion_length + self._ramp(progress) * (longest - self.start_completion_length))

    def _ramp(self, progress: float) -> float:
        return min(progress / self.until, 1.0)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The counts of each prompt, and what predictions were learned from."""
        return {"seen": self._seen.state(), "outlook": None if self._outlook is None else self._outlook.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        self._seen.load(state["seen"])
        if self._outlook is not None:
            self._outlook.load_state_dict(state["outlook"])
