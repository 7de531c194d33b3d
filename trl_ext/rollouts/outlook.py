"""
Which prompts are worth generating for: the probability that a prompt's group will be live, learned from the groups
generated so far.

Every prompt has a pass rate p ~ Beta(a, b). What it has shown itself is added to (a, b), as in MoPPS
(https://huggingface.co/papers/2507.04632), where old evidence fades too because the policy moves. What it has not
shown is read off similar prompts, its *bucket*: (a, b) is fitted to the pass rates of the bucket (empirical Bayes).
That prompts without variance mostly stay without it from epoch to epoch, and can be skipped if some are looked at
again, is GRESO's finding (https://huggingface.co/papers/2506.02177).

MoPPS fades counts towards the prior. On the way a solved prompt then looks better than a new one: a fraction of a pass
rules out p = 0 and hardly speaks for p = 1. Here the prediction fades, from the posterior's to the prior's.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from statistics import quantiles
from typing import Any, NamedTuple, Self

import torch
from datasets import Dataset

from .choosers import PromptChooser
from .generation_batch import GenerationBatch
from .stream import prompt_key


# A numeric column with more distinct values than this is cut at its deciles
MAX_DISTINCT = 10
# A bucket weighs as much as the prior it is shrunk to once this many of its prompts have been seen
PRIOR_PROMPTS = 4.0
# a + b: from "almost only 0 and 1" to "all prompts alike". Bounds, because few prompts can look like either.
CONCENTRATION = (0.05, 50.0)
# Evidence that has faded below this share of itself is dropped, at every so many ticks
NEGLIGIBLE = 0.01
SWEEP_EVERY = 100

Bucket = tuple[str | float | bool | None, ...]
EVERYTHING: Bucket = ()


def beta_from_moments(mean: float, second_moment: float) -> tuple[float, float]:
    """
    Parameters of the Beta distribution with these moments: with m = E[p] and q = E[p²],
    a + b = (m − q) / (q − m²) and a = m (a + b).

    Args:
        mean (`float`):
            m, strictly between 0 and 1.
        second_moment (`float`):
            q. From groups of k passes in n, take the mean of k (k − 1) / (n (n − 1)), whose expectation is p²: then
            this is the moment fit of the beta-binomial. The mean of (k / n)² would count the noise of n draws as
            differences between prompts.

    Returns:
        `tuple[float, float]`: a, b. Their sum is held within `CONCENTRATION`.
    """
    low, high = CONCENTRATION
    variance = second_moment - mean**2
    concentration = (mean - second_moment) / variance if variance > 0 else high
    concentration = min(max(concentration, low), high)
    return mean * concentration, (1 - mean) * concentration


def mixed_probability(a: float, b: float, num_generations: int) -> float:
    """
    Probability that G completions neither all pass nor all fail, p ~ Beta(a, b): 1 − E[p^G] − E[(1 − p)^G], where
    E[p^G] = Π_{i<G} (a + i) / (a + b + i) (beta-binomial).

    Args:
        a, b (`float`):
            Parameters of the Beta distribution.
        num_generations (`int`):
            G.
    """
    all_pass = math.prod((a + i) / (a + b + i) for i in range(num_generations))
    all_fail = math.prod((b + i) / (a + b + i) for i in range(num_generations))
    return max(0.0, 1 - all_pass - all_fail)


class GroupStats(NamedTuple):
    """
    What one group says about prompts like its own, or the faded sum of that over the prompts of a bucket.

    `pass_rate` is k / n and `pair_rate` k (k − 1) / (n (n − 1)) for k passes in n completions; `constant` counts the
    groups whose completions all pass or all fail, `constant_live` those of them that are live all the same, as graded
    rewards allow.
    """

    prompts: float = 0.0
    pass_rate: float = 0.0
    pair_rate: float = 0.0
    constant: float = 0.0
    constant_live: float = 0.0

    def plus(self, weight: float, other: "GroupStats") -> "GroupStats":
        return GroupStats(*(mine + weight * its for mine, its in zip(self, other, strict=True)))


class PromptHistory(NamedTuple):
    """Faded counts of a prompt as of `tick`, when it was last observed, and its group of then, for its bucket."""

    tick: int
    bucket: Bucket
    solved: float
    tried: float
    constant: float
    constant_live: float
    latest: GroupStats

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptHistory":
        return self  # immutable: states hold one for every prompt, and copies of states are made at every batch


class PromptOutlook:
    """
    Predicts which prompts will have live groups, and chooses among candidates by it.

    Every rank holds one and calls it with the same arguments: then all predict and choose alike.

    Prompts with equal values in `columns` share a bucket. A number stands for a range of its like: the decile it lies
    in where [`set_bins`] has seen the column, and else what is left of it at one significant digit (34 and 0.27 count
    as 30 and 0.3), which needs no look ahead and so works for iterable data sets. `None` and NaN are a value too.

    A bucket counts each of its prompts once, by its latest group, so that a prompt chosen often doesn't pass for many.

    Args:
        columns (`list[str]`):
            Columns of the data set that tell which prompts are similar (source, level, difficulty). May be empty:
            then all prompts are.
        num_generations (`int`):
            G, completions in a group.
        success_threshold (`float`):
            A completion passes from this outcome reward on.
        seed (`int`):
            Seed of the exploration.
        memory (`float`, *optional*, defaults to `0.99`):
            Weight that evidence keeps at every [`tick`]. At the default it halves in 69 generation batches.
        exploration (`float`, *optional*, defaults to `0.25`):
            Share of the choices that is drawn blindly.
    """

    def __init__(
        self,
        columns: list[str],
        num_generations: int,
        success_threshold: float,
        seed: int,
        memory: float = 0.99,
        exploration: float = 0.25,
    ) -> None:
        self.columns = columns
        self.num_generations = num_generations
        self.success_threshold = success_threshold
        self.memory = memory
        self.exploration = exploration
        self._generator = torch.Generator().manual_seed(seed)
        self._now = 0
        # Inner edges of a column's bins; `None` where its values stand for themselves
        self._edges: dict[str, list[float] | None] = {}
        self._prompts: dict[str, PromptHistory] = {}
        # With the tick that the sums are faded to
        self._buckets: dict[Bucket, tuple[int, GroupStats]] = {}

    # Similarity

    def set_bins(self, values_by_column: Mapping[str, Sequence[Any]]) -> None:
        """
        Cut numeric columns with more than `MAX_DISTINCT` distinct values at their deciles; values of the others stand
        for themselves. Call it before anything is observed.

        Args:
            values_by_column (`Mapping[str, Sequence]`):
                All values of a column. Columns left out keep the rule of one significant digit.
        """
        for column in self.columns:
            if column in values_by_column:
                finite = [number for v in values_by_column[column] if math.isfinite(number := _number(v))]
                few = len(set(finite)) <= MAX_DISTINCT
                self._edges[column] = None if few else sorted(set(quantiles(finite, n=10)))

    def _bucket(self, row: dict[str, Any]) -> Bucket:
        return tuple(self._bin(column, row.get(column)) for column in self.columns)

    def _bin(self, column: str, value: Any) -> str | float | bool | None:
        if value is None or isinstance(value, (str, bool)):
            return value
        number = _number(value)
        if math.isnan(number):
            return None if isinstance(value, Real) else str(value)
        if column not in self._edges:
            return float(f"{number:.0e}")
        edges = self._edges[column]
        return number if edges is None else bisect_right(edges, number)

    # Evidence

    def tick(self) -> None:
        """A generation batch has passed: what was observed before it fades."""
        self._now += 1
        if self._now % SWEEP_EVERY == 0:
            self._prompts = {k: v for k, v in self._prompts.items() if self._fade(v.tick) >= NEGLIGIBLE}
            self._buckets = {
                k: (tick, sums)
                for k, (tick, sums) in self._buckets.items()
                if self._fade(tick) * sums.prompts >= NEGLIGIBLE
            }

    def _fade(self, tick: int) -> float:
        """What is left of evidence as of `tick`: looked up when it is read, so that a tick costs nothing."""
        return self.memory ** (self._now - tick)

    def observe(self, rows: Sequence[dict[str, Any]], outcomes: torch.Tensor, live: list[bool]) -> None:
        """
        Learn from a round of generation.

        Args:
            rows (`list[dict]`):
                Data set rows, one a group.
            outcomes (`torch.Tensor` of shape `(P, G)`):
                Outcome rewards, NaN = not applicable. A group with fewer than two of them can't be live, so it counts
                as one whose completions all fail.
            live (`list[bool]`):
                Which groups are live.
        """
        # Compared as tensors, as `census` does: 0.7 in float32 is below the double 0.7
        passes = (outcomes >= self.success_threshold).sum(dim=1).tolist()
        rewarded = (~outcomes.isnan()).sum(dim=1).tolist()
        for row, k, n, is_live in zip(rows, passes, rewarded, live, strict=True):
            solved, tried = (k, n) if n >= 2 else (0, max(2, outcomes.shape[1]))
            constant = float(solved in (0, tried))
            latest = GroupStats(
                prompts=1.0,
                pass_rate=solved / tried,
                pair_rate=solved * (solved - 1) / (tried * (tried - 1)),
                constant=constant,
                constant_live=constant * is_live,
            )
            key, bucket = prompt_key(row), self._bucket(row)
            known = self._prompts.get(key)
            if known:
                self._add(known.bucket, -self._fade(known.tick), known.latest)
            self._add(bucket, 1.0, latest)
            before = known or PromptHistory(self._now, bucket, 0.0, 0.0, 0.0, 0.0, GroupStats())
            fade = self._fade(before.tick)
            self._prompts[key] = PromptHistory(
                tick=self._now,
                bucket=bucket,
                solved=fade * before.solved + solved,
                tried=fade * before.tried + tried,
                constant=fade * before.constant + latest.constant,
                constant_live=fade * before.constant_live + latest.constant_live,
                latest=latest,
            )

    def _levels(self, bucket: Bucket) -> list[Bucket]:
        return [EVERYTHING, bucket] if bucket else [EVERYTHING]

    def _sums(self, bucket: Bucket) -> GroupStats:
        tick, sums = self._buckets.get(bucket, (self._now, GroupStats()))
        return GroupStats().plus(self._fade(tick), sums)

    def _add(self, bucket: Bucket, weight: float, stats: GroupStats) -> None:
        for level in self._levels(bucket):
            sums = self._sums(level).plus(weight, stats)
            # Taking out what was put in leaves rounding errors of either sign
            self._buckets[level] = (self._now, GroupStats(*(max(0.0, value) for value in sums)))

    # Prediction

    def live_probability(self, row: dict[str, Any]) -> float:
        """
        Probability that the group of a prompt will be live, were it generated now.

        For a prompt never seen it is P(mixed) + (1 − P(mixed)) · P(live | constant). The first is
        [`mixed_probability`] for the prior Beta(a, b); the second, 0 for binary rewards, is the rate at which groups
        that all pass or all fail were live. For one seen before, (a, b) becomes (a + solved, b + failed), and its own
        constant groups are added to one with the rate of its bucket. That holds with probability `memory` to the power
        of the ticks since; otherwise the prompt is like one never seen.

        The prior of a bucket comes from the moments of all prompts and of its own, each level shrunk to the one above
        as if `PRIOR_PROMPTS` of that had been seen in it; above all prompts stand the uniform distribution and no
        constant group that is live.

        Args:
            row (`dict`):
                Data set row.
        """
        mean, second_moment, constant_live = 1 / 2, 1 / 3, 0.0
        for level in self._levels(self._bucket(row)):
            seen = self._sums(level)
            weight = seen.prompts + PRIOR_PROMPTS
            mean = (seen.pass_rate + PRIOR_PROMPTS * mean) / weight
            second_moment = (seen.pair_rate + PRIOR_PROMPTS * second_moment) / weight
            constant_live = (seen.constant_live + PRIOR_PROMPTS * constant_live) / (seen.constant + PRIOR_PROMPTS)
        a, b = beta_from_moments(mean, second_moment)
        like_new = self._live_probability(a, b, constant_live)
        own = self._prompts.get(prompt_key(row))
        if own is None:
            return like_new
        constant_live = (own.constant_live + constant_live) / (own.constant + 1)
        as_seen = self._live_probability(a + own.solved, b + own.tried - own.solved, constant_live)
        still = self._fade(own.tick)
        return still * as_seen + (1 - still) * like_new

    def _live_probability(self, a: float, b: float, constant_live: float) -> float:
        mixed = mixed_probability(a, b, self.num_generations)
        return mixed + (1 - mixed) * constant_live

    def choose(self, rows: Sequence[dict[str, Any]], count: int, progress: float = 0.0, dealt: int = 0) -> list[int]:
        """
        See [`PromptChooser.choose`]: a share `exploration` is chosen blindly (from the dealt candidates, where there
        are any), so that no prompt is given up for good and buckets are judged by more than their best; the others by
        their probability of being live. Of equally probable ones the first are chosen.
        """
        if count >= len(rows):
            return list(range(len(rows)))
        # Rounded up or down at random: the share holds on average even where a single prompt is chosen
        chance = torch.rand((), dtype=torch.float64, generator=self._generator).item()
        share = min(math.floor(self.exploration * count + chance), count)
        pool = min(dealt or len(rows), len(rows))
        blind = torch.randperm(pool, generator=self._generator)[:share].tolist()
        rest = sorted(set(range(len(rows))) - set(blind))
        rest.sort(key=lambda i: -self.live_probability(rows[i]))
        return sorted(blind + rest[: count - len(blind)])

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that was learned. Later calls leave it alone."""
        return {
            "now": self._now,
            "generator": self._generator.get_state(),
            "edges": dict(self._edges),
            "prompts": dict(self._prompts),
            "buckets": dict(self._buckets),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._now = state["now"]
        self._generator.set_state(state["generator"].cpu())
        self._edges = dict(state["edges"])
        self._prompts = dict(state["prompts"])
        self._buckets = dict(state["buckets"])


# Half-lives of 3, 14 and 69 generation batches. How fast a policy moves depends on learning rate, updates and task.
MEMORIES = (0.8, 0.95, 0.99)
# Weight of what was predicted before, at each tick: the last ten batches or so decide
TRUST_MEMORY = 0.9


class AdaptiveOutlook(PromptChooser):
    """
    Several [`PromptOutlook`]s that forget at different speeds: the one that foretold best which groups were live in
    the recent past predicts and chooses. A fast policy makes old evidence wrong, a slow one makes forgetting a waste;
    which it is, the groups tell (prequential choice by the log-likelihood of their outcomes).

    Args:
        columns, num_generations, success_threshold, seed, exploration:
            See [`PromptOutlook`].
    """

    key = "outlook"
    lookahead = 8

    def __init__(
        self,
        columns: list[str],
        num_generations: int,
        success_threshold: float,
        seed: int,
        exploration: float = 0.25,
    ) -> None:
        self.outlooks = [
            PromptOutlook(columns, num_generations, success_threshold, seed, memory, exploration)
            for memory in MEMORIES
        ]
        self._log_likelihoods = [0.0] * len(MEMORIES)

    @classmethod
    def for_run(cls, dataset: Any, config: Any) -> Self:
        """The outlook of a run, from a trainer's data set and [`~trl_ext.GRPOConfig`]."""
        columns = config.similar_prompts_columns or []
        exploration = config.refill_exploration
        own = cls(columns, config.num_generations, config.success_threshold, config.seed, exploration=exploration)
        if isinstance(dataset, Dataset):
            own.set_bins({column: dataset[column] for column in columns})
        return own

    @property
    def best(self) -> PromptOutlook:
        """The one to listen to; of equals, the one that remembers longest."""
        return max(reversed(self.outlooks), key=lambda outlook: self._log_likelihoods[self.outlooks.index(outlook)])

    def set_bins(self, values_by_column: Mapping[str, Sequence[Any]]) -> None:
        """See [`PromptOutlook.set_bins`]."""
        for outlook in self.outlooks:
            outlook.set_bins(values_by_column)

    def begin(self, trainer: Any) -> None:
        self.tick()

    def end(self, trainer: Any, batch: GenerationBatch) -> None:
        """Logs how many of the prompts that the loader dealt were replaced."""
        trainer.train_metrics["selection/prompts_replaced"].append(batch.replaced)

    def tick(self) -> None:
        """See [`PromptOutlook.tick`]."""
        self._log_likelihoods = [TRUST_MEMORY * value for value in self._log_likelihoods]
        for outlook in self.outlooks:
            outlook.tick()

    def observe(self, rows: Sequence[dict[str, Any]], outcomes: torch.Tensor, live: list[bool]) -> None:
        """See [`PromptOutlook.observe`]. What each had predicted is counted before it learns."""
        for i, outlook in enumerate(self.outlooks):
            for row, is_live in zip(rows, live, strict=True):
                predicted = outlook.live_probability(row)
                likelihood = predicted if is_live else 1 - predicted
                self._log_likelihoods[i] += math.log(max(likelihood, 0.01))  # no single surprise decides
            outlook.observe(rows, outcomes, live)

    def live_probability(self, row: dict[str, Any]) -> float:
        """See [`PromptOutlook.live_probability`]."""
        return self.best.live_probability(row)

    def choose(self, rows: Sequence[dict[str, Any]], count: int, progress: float = 0.0, dealt: int = 0) -> list[int]:
        """See [`PromptOutlook.choose`]."""
        return self.best.choose(rows, count, progress, dealt)

    def state_dict(self) -> dict[str, Any]:
        """All that was learned. Later calls leave it alone."""
        outlooks = [outlook.state_dict() for outlook in self.outlooks]
        return {"outlooks": outlooks, "log_likelihoods": list(self._log_likelihoods)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for outlook, saved in zip(self.outlooks, state["outlooks"], strict=True):
            outlook.load_state_dict(saved)
        self._log_likelihoods = list(state["log_likelihoods"])


def _number(value: Any) -> float:
    """A numeric value as a float, NaN for what is no number."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


# Which prompts refilling generates for: from the data set and the configuration of a trainer to a chooser. A new way
# is a chooser and an entry here.
REFILL_DRAWS: dict[str, Callable[[Any, Any], PromptChooser]] = {
    "blind": lambda dataset, config: PromptChooser(),
    "informed": AdaptiveOutlook.for_run,
}
