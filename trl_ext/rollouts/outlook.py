"""
Predicts which prompts are worth generating for: the probability that the group of a prompt will be live, learned from
the groups that were generated so far.

A prompt has a pass rate p ~ Beta(a, b). The prior (a, b) is estimated from the pass rates of similar prompts, the
prompt's *bucket* (empirical Bayes), and the prompt's own passes and failures are added to it, as in MoPPS
(https://huggingface.co/papers/2507.04632). Like there, old evidence fades, because the policy changes. Prompts without
variance mostly stay without it from epoch to epoch, and can be skipped if some of them are tried again now and then:
that is GRESO's finding (https://huggingface.co/papers/2506.02177).

MoPPS fades the counts of a prompt towards the prior. While they fade, a prompt that was solved looks better than a new
one, because a fraction of a pass rules out p = 0 but is hardly evidence for p = 1. Here the prediction fades instead,
from the posterior's to the prior's.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from statistics import quantiles
from typing import Any, NamedTuple

import torch

from .groups import share_out
from .ledger import Ledger
from .pass_rates import Floats, PassRateModel
from .prompt_features import PLAIN
from .stream import prompt_key


# A numeric column with more distinct values than this is divided at its deciles
MAX_DISTINCT = 10
# The estimate of a bucket is shrunk to the level above it as if that had been observed with this many prompts
PRIOR_PROMPTS = 4.0
# Bounds of a + b, from "pass rates are almost only 0 and 1" to "all pass rates are equal". A few prompts can look like
# either.
CONCENTRATION = (0.05, 50.0)
# Evidence whose weight has faded below NEGLIGIBLE is dropped every SWEEP_EVERY ticks
NEGLIGIBLE = 0.01
SWEEP_EVERY = 100
# How much more often prompts are chosen that are worth more. 0: all alike; infinity: the best ones only
SHARPNESS = 2.0

Bucket = tuple[str | float | bool | None, ...]
# The bucket of all prompts
EVERYTHING: Bucket = ()


def beta_from_moments(mean: float, second_moment: float) -> tuple[float, float]:
    """
    Parameters of the Beta distribution with these moments: with m = E[p] and q = E[p²],
    a + b = (m − q) / (q − m²) and a = m (a + b).

    Args:
        mean (`float`):
            m, strictly between 0 and 1.
        second_moment (`float`):
            q. For groups of k passes in n completions this is the mean of k (k − 1) / (n (n − 1)), whose expectation
            is p², which makes the result the moment estimate of the beta-binomial. The mean of (k / n)² would count
            the noise of n draws as differences between prompts.

    Returns:
        `tuple[float, float]`: a and b, with a sum within `CONCENTRATION`.
    """
    low, high = CONCENTRATION
    variance = second_moment - mean**2
    concentration = (mean - second_moment) / variance if variance > 0 else high
    concentration = min(max(concentration, low), high)
    return mean * concentration, (1 - mean) * concentration


def mixed_probability(a: float, b: float, num_generations: int) -> float:
    """
    Probability that G completions of a prompt with pass rate p ~ Beta(a, b) neither all pass nor all fail:
    1 − E[p^G] − E[(1 − p)^G], where E[p^G] = Π_{i<G} (a + i) / (a + b + i) (beta-binomial).

    Args:
        a, b (`float`):
            Parameters of the Beta distribution.
        num_generations (`int`):
            G, the size of a group.
    """
    all_pass = math.prod((a + i) / (a + b + i) for i in range(num_generations))
    all_fail = math.prod((b + i) / (a + b + i) for i in range(num_generations))
    return max(0.0, 1 - all_pass - all_fail)


def live_probability(a: float, b: float, constant_live: float, num_generations: int) -> float:
    """
    Probability that a group is live: P(mixed) + (1 − P(mixed)) · P(live | constant), see [`mixed_probability`].

    Args:
        a, b (`float`):
            Parameters of the Beta distribution of the pass rate.
        constant_live (`float`):
            The rate at which groups whose completions all pass or all fail are live; 0 for binary rewards.
        num_generations (`int`):
            G, the size of a group.
    """
    mixed = mixed_probability(a, b, num_generations)
    return mixed + (1 - mixed) * constant_live


def signal(a: float, b: float, constant_live: float, num_generations: int) -> float:
    """E[p (1 − p)] = a b / ((a + b) (a + b + 1)), the expected variance of a binary reward within a group."""
    return a * b / ((a + b) * (a + b + 1))


def pass_rate(a: float, b: float, constant_live: float, num_generations: int) -> float:
    """E[p] = a / (a + b), the probability that a completion passes."""
    return a / (a + b)


# What can be said of the group of a prompt from p ~ Beta(a, b), P(live | constant) and G
Value = Callable[[float, float, float, int], float]

# By `refill_value`: what the group of a prompt is worth. A new way to value groups is a function and an entry here.
VALUES: dict[str, Value] = {"live": live_probability, "signal": signal}


class GroupStats(NamedTuple):
    """
    What one group shows about similar prompts, or the faded sum of that over the prompts of a bucket.

    Args:
        prompts (`float`):
            Number of prompts: 1 for a group.
        pass_rate (`float`):
            k / n for k passes in n completions.
        pair_rate (`float`):
            k (k − 1) / (n (n − 1)).
        constant (`float`):
            1 if all completions pass or all fail.
        constant_live (`float`):
            1 if that is so and the group is live nevertheless, which it can be if rewards are graded.
    """

    prompts: float = 0.0
    pass_rate: float = 0.0
    pair_rate: float = 0.0
    constant: float = 0.0
    constant_live: float = 0.0

    @classmethod
    def of_group(cls, solved: float, tried: float, live: float) -> "GroupStats":
        """Of a group with `solved` passes in `tried` completions, a single one of which is no pair."""
        constant = float(solved in (0, tried))
        return cls(
            prompts=1.0,
            pass_rate=solved / tried,
            pair_rate=solved * (solved - 1) / max(tried * (tried - 1), 1),
            constant=constant,
            constant_live=constant * live,
        )

    def plus(self, weight: float, other: "GroupStats") -> "GroupStats":
        return GroupStats(*(mine + weight * its for mine, its in zip(self, other, strict=True)))


class PromptHistory(NamedTuple):
    """
    The evidence of one prompt.

    Args:
        tick (`float`):
            When the prompt was last observed. The counts are faded as of then.
        bucket (`float`):
            Number of the bucket to which its last group was added.
        solved, tried (`float`):
            Completions that passed, and all completions.
        constant, constant_live (`float`):
            Groups whose completions all passed or all failed, and how many of these were live.
        last_solved, last_tried, last_live (`float`):
            The prompt's last group, which stands for the prompt in its bucket: passes, completions, whether it was
            live.
    """

    tick: float
    bucket: float
    solved: float
    tried: float
    constant: float
    constant_live: float
    last_solved: float
    last_tried: float
    last_live: float

    @property
    def latest(self) -> GroupStats:
        """What the prompt's last group shows."""
        return GroupStats.of_group(self.last_solved, self.last_tried, self.last_live)


class Prior(NamedTuple):
    """What is known of a prompt without its own groups: p ~ Beta(a, b), and P(live | constant)."""

    a: float
    b: float
    constant_live: float


class BucketSums(NamedTuple):
    """The [`GroupStats`] of a bucket, faded as of `tick`."""

    tick: float
    prompts: float = 0.0
    pass_rate: float = 0.0
    pair_rate: float = 0.0
    constant: float = 0.0
    constant_live: float = 0.0


class PromptOutlook:
    """
    Predicts which prompts will have live groups, and chooses among candidates by that prediction.

    Every rank has its own and calls it with the same arguments, so that all ranks predict and choose alike.

    Prompts with equal values in `columns` share a bucket. A number stands for a range of numbers: the decile in which
    it lies if [`set_bins`] has seen the column. Otherwise it is rounded to one significant digit (34 and 0.27 count as
    30 and 0.3); this doesn't need all values in advance, so that it works for iterable data sets. `None` and NaN count
    as a value.

    A bucket counts each of its prompts once, by its latest group, so that a prompt that is chosen often doesn't count
    as many prompts.

    Args:
        columns (`list[str]`):
            Columns of the data set that tell which prompts are similar (source, level, difficulty). If there are none,
            all prompts are similar.
        num_generations (`int`):
            G, the size of a group.
        success_threshold (`float`):
            A completion passes if its outcome reward is at least this.
        seed (`int`):
            Seed of the exploration.
        memory (`float`, *optional*, defaults to `0.99`):
            Factor on the weight of all evidence at every [`tick`]. The default halves it in 69 generation batches.
        exploration (`float`, *optional*, defaults to `0.25`):
            Share of the prompts that is chosen at random.
        most_slots (`int`, *optional*, defaults to `1`):
            How many times `num_generations` completions a prompt may get.
    """

    def __init__(
        self,
        columns: list[str],
        num_generations: int,
        success_threshold: float,
        seed: int,
        memory: float = 0.99,
        exploration: float = 0.25,
        most_slots: int = 1,
    ) -> None:
        self.columns = columns
        self.num_generations = num_generations
        self.success_threshold = success_threshold
        self.memory = memory
        self.exploration = exploration
        self.most_slots = most_slots
        self.plain = PLAIN  # how many features stand for themselves
        self._generator = torch.Generator().manual_seed(seed)
        self._now = 0
        # Inner edges of a column's bins; `None` if each value is a bin of its own
        self._edges: dict[str, list[float] | None] = {}
        self._prompts: Ledger[str, PromptHistory] = Ledger(PromptHistory._make)
        self._numbers: Ledger[Bucket, tuple[float, ...]] = Ledger(tuple)  # of buckets
        self._buckets: Ledger[float, BucketSums] = Ledger(BucketSums._make)  # by number
        self._rates: PassRateModel | None = None  # of features

    # Similarity

    def set_bins(self, values_by_column: Mapping[str, Sequence[Any]]) -> None:
        """
        Divide numeric columns with more than `MAX_DISTINCT` distinct values at their deciles. In other columns each
        value is a bin of its own. Must be called before anything is observed.

        Args:
            values_by_column (`Mapping[str, Sequence]`):
                All values, by column. Numbers of columns that are left out are rounded to one significant digit.
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
        """Called once for each generation batch: what was observed earlier fades."""
        self._now += 1
        if self._rates is not None:
            self._rates.tick()
        if self._now % SWEEP_EVERY == 0:
            self._prompts.keep(lambda known: self._fade(known.tick) >= NEGLIGIBLE)
            self._buckets.keep(lambda sums: self._fade(sums.tick) * sums.prompts >= NEGLIGIBLE)

    def _fade(self, tick: float) -> float:
        """Weight of evidence as of `tick`. It is applied when evidence is read, so that a tick costs nothing."""
        return self.memory ** (self._now - tick)

    def observe(
        self,
        rows: Sequence[dict[str, Any]],
        outcomes: torch.Tensor,
        live: list[bool],
        features: Floats | None = None,
    ) -> None:
        """
        Learn from a round of generation.

        Args:
            rows (`list[dict]`):
                Data set rows, one for each group.
            outcomes (`torch.Tensor` of shape `(P, G)`):
                Outcome rewards by group, NaN = not applicable. A group with fewer than two outcome rewards can't be
                live, so that it counts as a group whose completions all fail, unless all groups are of one.
            live (`list[bool]`):
                For each group, whether it is live.
            features (`np.ndarray` of shape `(P, F)`, *optional*):
                Features of the prompts, see [`~trl_ext.rollouts.prompt_features.PromptFeatures`].
        """
        # Compared as tensors, as in `census`: 0.7 in float32 is smaller than the double 0.7
        passes = (outcomes >= self.success_threshold).sum(dim=1)
        rewarded = (~outcomes.isnan()).sum(dim=1)
        known = rewarded >= min(2, self.num_generations)
        solved = torch.where(known, passes, 0)
        tried = torch.where(known, rewarded, max(2, min(outcomes.shape[1], self.num_generations)))
        for row, k, n, is_live in zip(rows, solved.tolist(), tried.tolist(), live, strict=True):
            self._observe_group(row, k, n, is_live)
        if features is not None:
            self._rate_model(features.shape[1]).observe(features, solved.double().numpy(), tried.double().numpy())

    def _rate_model(self, size: int) -> PassRateModel:
        if self._rates is None:
            self._rates = PassRateModel(size, self.plain, self.memory)
        return self._rates

    def _observe_group(self, row: dict[str, Any], solved: int, tried: int, live: bool) -> None:
        latest = GroupStats.of_group(solved, tried, live)
        key, bucket = prompt_key(row), self._bucket_number(self._bucket(row))
        known: PromptHistory | None = self._prompts.get(key)
        if known:
            self._add(known.bucket, -self._fade(known.tick), known.latest)
        self._add(bucket, 1.0, latest)
        fade = self._fade(known.tick) if known else 0.0
        solved_before, tried_before, constant_before, live_before = known[2:6] if known else (0.0,) * 4
        self._prompts[key] = PromptHistory(
            tick=self._now,
            bucket=bucket,
            solved=fade * solved_before + solved,
            tried=fade * tried_before + tried,
            constant=fade * constant_before + latest.constant,
            constant_live=fade * live_before + latest.constant_live,
            last_solved=solved,
            last_tried=tried,
            last_live=live,
        )

    def _bucket_number(self, bucket: Bucket) -> float:
        """The number of a bucket, a new one if there is none yet. That of all prompts is 0."""
        for level in (EVERYTHING, bucket):
            if level not in self._numbers:
                self._numbers[level] = (float(len(self._numbers)),)
        return self._numbers[bucket][0]

    def _sums(self, number: float | None) -> GroupStats:
        """The sums of a bucket, faded as of now. `None`: of one that is not known."""
        sums: BucketSums | None = None if number is None else self._buckets.get(number)
        return GroupStats() if sums is None else GroupStats().plus(self._fade(sums.tick), GroupStats(*sums[1:]))

    def _add(self, number: float, weight: float, stats: GroupStats) -> None:
        for level in (0.0, number) if number else (0.0,):
            sums = self._sums(level).plus(weight, stats)
            # Subtracting what was added leaves rounding errors of either sign
            self._buckets[level] = BucketSums(self._now, *(max(0.0, value) for value in sums))

    # Prediction

    def priors(self, rows: Sequence[dict[str, Any]], features: Floats | None = None) -> list[Prior]:
        """
        What is known of prompts without their own groups.

        The prior of a bucket comes from the moments of all prompts and of the bucket's. The estimate of each level is
        shrunk to the one of the level above, as if that had been observed with `PRIOR_PROMPTS` prompts. Above all
        prompts is the uniform distribution, with no live constant group. Where groups are of one completion, nothing
        shows how much prompts differ: a + b is then that of the uniform distribution.

        Args:
            rows (`list[dict]`):
                Data set rows.
            features (`np.ndarray` of shape `(N, F)`, *optional*):
                Their features. Then the pass rates come from these, and not from the bucket.
        """
        buckets = [self._bucket(row) for row in rows]
        by_bucket = {bucket: self._prior(bucket) for bucket in set(buckets)}
        priors = [by_bucket[bucket] for bucket in buckets]
        if features is None or not rows:
            return priors
        model = self._rate_model(features.shape[1])
        c, rates = model.concentration, model.rates(features).tolist()
        return [Prior(m * c, (1 - m) * c, prior.constant_live) for m, prior in zip(rates, priors, strict=True)]

    def _prior(self, bucket: Bucket) -> Prior:
        mean, second_moment, constant_live = 1 / 2, 1 / 3, 0.0
        for level in (EVERYTHING, bucket) if bucket else (EVERYTHING,):
            seen = self._sums(*self._numbers.get(level, (None,)))
            weight = seen.prompts + PRIOR_PROMPTS
            mean = (seen.pass_rate + PRIOR_PROMPTS * mean) / weight
            second_moment = (seen.pair_rate + PRIOR_PROMPTS * second_moment) / weight
            constant_live = (seen.constant_live + PRIOR_PROMPTS * constant_live) / (seen.constant + PRIOR_PROMPTS)
        if self.num_generations == 1:
            return Prior(2 * mean, 2 * (1 - mean), constant_live)
        return Prior(*beta_from_moments(mean, second_moment), constant_live)

    def values(
        self,
        rows: Sequence[dict[str, Any]],
        features: Floats | None = None,
        of: Value = live_probability,
        slots: Sequence[int] | None = None,
    ) -> list[float]:
        """
        What can be said of the groups of prompts if they were generated now.

        For a new prompt this is the value of its prior Beta(a, b). For a prompt that was observed, (a, b) becomes (a +
        solved, b + failed), and its own constant groups are added to one group with the rate of its bucket. This holds
        with probability `memory` to the power of the ticks since the observation; otherwise the prompt counts as new.

        Args:
            rows (`list[dict]`):
                Data set rows.
            features (`np.ndarray` of shape `(N, F)`, *optional*):
                Their features, see [`priors`].
            of (`Value`, *optional*, defaults to [`live_probability`]):
                What is said of them.
            slots (`list[int]`, *optional*):
                For each prompt, how many times `num_generations` completions its group has. `None`: once.
        """
        values = []
        for row, prior, count in zip(rows, self.priors(rows, features), slots or [1] * len(rows), strict=True):
            (a, b, constant_live), size = prior, count * self.num_generations
            worth = of(a, b, constant_live, size)
            own: PromptHistory | None = self._prompts.get(prompt_key(row))
            if own is not None:
                constant_live = (own.constant_live + constant_live) / (own.constant + 1)
                if_unchanged = of(a + own.solved, b + own.tried - own.solved, constant_live, size)
                unchanged = self._fade(own.tick)
                worth = unchanged * if_unchanged + (1 - unchanged) * worth
            values.append(worth)
        return values

    def live_probability(self, row: dict[str, Any], slots: int = 1) -> float:
        """Probability that the group of a prompt would be live if it were generated now, see [`values`]."""
        return self.values([row], slots=[slots])[0]

    def choose(
        self,
        rows: Sequence[dict[str, Any]],
        count: int,
        dealt: int = 0,
        features: Floats | None = None,
        value: str = "live",
    ) -> list[int]:
        """
        See [`~trl_ext.rollouts.choosers.PromptChooser.choose`]. A share `exploration` of the prompts is chosen at
        random, from the dealt candidates if there are any, so that no prompt is given up for good and buckets are
        judged by more than their best prompts. The others are taken in the order of the candidates, each with a
        probability in proportion to what its group is worth, to the power of `SHARPNESS` (rejection sampling). If that
        takes too few, those that were passed over follow, the best first. With `most_slots` above 1, `count` is a
        number of slots, and a prompt takes a further slot with a probability that follows in the same way from what it
        adds.

        Taking the best ones only would train on ever the same kind of prompt, and what the policy knows of the others
        would be lost.
        """
        if count >= len(rows) and self.most_slots == 1:
            return list(range(len(rows)))
        # Rounded up or down at random, so that the share holds on average even if a single prompt is chosen
        chance = torch.rand((), dtype=torch.float64, generator=self._generator).item()
        explored = min(math.floor(self.exploration * count + chance), count)
        pool = min(dealt or len(rows), len(rows))
        at_random = torch.randperm(pool, generator=self._generator)[:explored].tolist()
        rest = sorted(set(range(len(rows))) - set(at_random))
        chances = torch.rand(len(rows), dtype=torch.float64, generator=self._generator).tolist()
        bars = [chances[i] ** (1 / SHARPNESS) for i in rest]
        gains = self._gains(rows, features, value)
        shared = share_out([gains[i] for i in rest], count - len(at_random), bars)
        return sorted(at_random + [rest[i] for i in shared])

    def _gains(self, rows: Sequence[dict[str, Any]], features: Floats | None, value: str) -> list[list[float]]:
        """For each prompt, what each further slot adds to what its group is worth."""
        by_slots = [
            self.values(rows, features, VALUES[value], [slots] * len(rows)) for slots in range(1, self.most_slots + 1)
        ]
        return [[more - less for less, more in pairwise([0.0, *worth])] for worth in zip(*by_slots, strict=True)]

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned. It doesn't change when the outlook is called again."""
        return {
            "now": self._now,
            "generator": self._generator.get_state(),
            "edges": dict(self._edges),
            "plain": self.plain,
            "prompts": self._prompts.state(),
            "numbers": self._numbers.state(),
            "buckets": self._buckets.state(),
            "rates": None if self._rates is None else self._rates.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        self._now = state["now"]
        self._generator.set_state(state["generator"].cpu())
        self._edges, self.plain = dict(state["edges"]), state["plain"]
        self._prompts.load(state["prompts"])
        self._numbers.load(state["numbers"])
        self._buckets.load(state["buckets"])
        self._rates = None
        if state["rates"] is not None:
            self._rate_model(len(state["rates"]["weights"]["mean"]) - 1).load_state_dict(state["rates"])


def _number(value: Any) -> float:
    """A number as a float; NaN for anything else."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
