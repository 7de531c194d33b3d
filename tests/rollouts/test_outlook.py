"""Which prompts are predicted to have live groups: values by hand, slow twins, and a simulated run."""

import copy
import math
import pickle
import random
from itertools import product

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import betabinom

from trl_ext.rollouts.informed import MEMORIES, AdaptiveOutlook
from trl_ext.rollouts.outlook import (
    CONCENTRATION,
    PRIOR_PROMPTS,
    SHARPNESS,
    PromptOutlook,
    beta_from_moments,
    mixed_probability,
)
from trl_ext.rollouts.selection import has_variance
from trl_ext.rollouts.stream import PromptStream


NAN = math.nan


def outlook(num_generations: int = 2, columns: list[str] | None = None, **kwargs) -> PromptOutlook:
    kwargs = {"success_threshold": 1.0, "seed": 0, **kwargs}
    return PromptOutlook(columns or [], num_generations, **kwargs)


def see(predictor: PromptOutlook, *groups: tuple[str, list[float]], **columns) -> None:
    """Observe groups, given as (prompt, outcomes)."""
    outcomes = torch.tensor([outcome for _, outcome in groups])
    predictor.observe([{"prompt": name, **columns} for name, _ in groups], outcomes, has_variance(outcomes).tolist())


def probability(predictor: PromptOutlook, name: str, **columns) -> float:
    return predictor.live_probability({"prompt": name, **columns})


class TestMixedProbability:
    def test_by_hand(self):
        # E[p^G] under Beta(1, 1) is 1 / (G + 1), and E[(1 − p)^G] too
        assert mixed_probability(1, 1, 2) == pytest.approx(1 / 3)
        assert mixed_probability(1, 1, 8) == pytest.approx(7 / 9)
        # Beta(2, 1), density 2p: E[p³] = 2/5, E[(1 − p)³] = 2 ∫ p (1 − p)³ = 2 (1/4 − 1/5) = 1/10
        assert mixed_probability(2, 1, 3) == pytest.approx(1 / 2)

    def test_a_single_completion_is_never_mixed(self):
        assert mixed_probability(0.3, 0.7, 1) == pytest.approx(0, abs=1e-15)

    def test_is_the_beta_binomial(self, subtests):
        for (a, b), size in product([(0.02, 0.03), (0.5, 0.5), (3.0, 0.4), (25.0, 25.0), (8.75, 0.5)], [2, 8, 64]):
            with subtests.test(a=a, b=b, size=size):
                none, all_ = betabinom.pmf([0, size], size, a, b)
                assert mixed_probability(a, b, size) == pytest.approx(1 - none - all_, abs=1e-12)

    def test_is_an_average_over_pass_rates(self):
        generator = random.Random(0)
        rates = [generator.betavariate(0.6, 1.7) for _ in range(20_000)]
        drawn = torch.tensor([1 - p**4 - (1 - p) ** 4 for p in rates])
        assert mixed_probability(0.6, 1.7, 4) == pytest.approx(drawn.mean().item(), abs=4 * drawn.std().item() / 141)


class TestFitBeta:
    def test_by_hand(self):
        assert beta_from_moments(1 / 2, 1 / 3) == pytest.approx((1, 1))
        # Beta(2, 1) has E[p] = 2/3 and E[p²] = 1/2
        assert beta_from_moments(2 / 3, 1 / 2) == pytest.approx((2, 1))

    def test_bounds(self):
        low, high = CONCENTRATION
        assert beta_from_moments(0.25, 0.25) == pytest.approx((0.25 * low, 0.75 * low))  # p is 0 or 1: p² = p
        assert beta_from_moments(0.25, 0.25**2) == pytest.approx((0.25 * high, 0.75 * high))  # one p for all
        assert beta_from_moments(0.25, 0.05) == pytest.approx(
            (0.25 * high, 0.75 * high)
        )  # less spread than draws have


# With two completions, E[1 − p² − (1 − p)²] = 2 (E[p] − E[p²]): the moments are all that counts for a new prompt
class TestByHand:
    def test_nothing_known(self):
        assert probability(outlook(), "new") == pytest.approx(1 / 3)
        assert probability(outlook(8), "new") == pytest.approx(7 / 9)

    def test_one_group(self):
        predictor = outlook()
        see(predictor, ("solved", [1.0, 1.0]))
        # m = (1 + 4 · 1/2) / 5 = 3/5, q = (1 + 4 · 1/3) / 5 = 7/15
        assert PRIOR_PROMPTS == 4
        assert probability(predictor, "new") == pytest.approx(2 * (3 / 5 - 7 / 15))
        # a + b = (9/15 − 7/15) / (7/15 − 9/25) = 5/4, so Beta(3/4, 1/2), and with two passes Beta(11/4, 1/2):
        # 2 · E[p (1 − p)] = 2 · (11/4 · 1/2) / (13/4 · 17/4)
        assert probability(predictor, "solved") == pytest.approx(2 * (11 / 8) / (221 / 16))

    def test_failing_mirrors_passing(self):
        passing, failing = outlook(), outlook()
        see(passing, ("seen", [1.0, 1.0]), ("other", [1.0, 0.0]), ("third", [1.0, 1.0]))
        see(failing, ("seen", [0.0, 0.0]), ("other", [1.0, 0.0]), ("third", [0.0, 0.0]))
        for name in ("seen", "other", "new"):
            assert probability(passing, name) == pytest.approx(probability(failing, name))
        # and a failure says less against a prompt where the others pass
        see(passing, ("failed", [0.0, 0.0]))
        assert probability(passing, "failed") > probability(passing, "seen")

    def test_one_tick(self):
        predictor = outlook(memory=0.5)
        see(predictor, ("solved", [1.0, 1.0]))
        predictor.tick()
        # m = (1/2 + 2) / (9/2) = 5/9, q = (1/2 + 4/3) / (9/2) = 11/27
        assert probability(predictor, "new") == pytest.approx(2 * (15 / 27 - 11 / 27))
        # a + b = (4/27) / (11/27 − 25/81) = 3/2: Beta(5/6, 2/3), and with two passes Beta(17/6, 2/3); as likely as not
        # they count no more
        assert probability(predictor, "solved") == pytest.approx(
            1 / 2 * 2 * (17 / 6 * 2 / 3) / (7 / 2 * 9 / 2) + 1 / 2 * 8 / 27
        )
        # Seen again: 2 + 1/2 · 2 passes, the bucket counts only the latest two; prior as at first Beta(3/4, 1/2)
        see(predictor, ("solved", [1.0, 1.0]))
        assert probability(predictor, "solved") == pytest.approx(2 * (15 / 4 * 1 / 2) / (17 / 4 * 21 / 4))

    def test_buckets(self):
        predictor = outlook(columns=["source"])
        see(predictor, ("solved", [1.0, 1.0]), source="a")
        # All prompts: m = 3/5, q = 7/15 as above
        # The bucket: m = (1 + 4 · 3/5) / 5 = 51/75, q = (1 + 4 · 7/15) / 5 = 43/75
        assert probability(predictor, "new", source="a") == pytest.approx(2 * 8 / 75)
        assert probability(predictor, "new", source="b") == pytest.approx(4 / 15)

    def test_graded_rewards(self):
        predictor = outlook()
        see(predictor, ("partial", [0.1, 0.3]))  # live below the threshold
        # m = 2/5, q = (4/3) / 5 = 4/15, mixed: 2 · 2/15; of constant groups, (1 + 0) / (1 + 4) are live
        assert probability(predictor, "new") == pytest.approx(4 / 15 + 11 / 15 / 5)
        # Beta(1/2, 3/4 + 2) as above, mirrored; of its own constant groups, (1 + 1/5) / (1 + 1)
        mixed = 2 * (11 / 8) / (221 / 16)
        assert probability(predictor, "partial") == pytest.approx(mixed + (1 - mixed) * 3 / 5)

    def test_the_latest_group_stands_for_its_prompt(self):
        once, again = outlook(), outlook()
        see(once, ("a", [1.0, 1.0]))
        see(again, ("a", [0.0, 1.0]))
        see(again, ("a", [0.0, 0.0]))
        see(again, ("a", [1.0, 1.0]))
        assert probability(again, "new") == pytest.approx(probability(once, "new"))
        assert probability(again, "a") > probability(once, "a")  # while it remembers what it showed itself


class TestObserve:
    def test_what_is_not_applicable_does_not_count(self):
        padded, plain = outlook(4), outlook(4)
        see(padded, ("a", [1.0, 1.0, NAN, NAN]), ("b", [1.0, NAN, 0.0, NAN]))
        see(plain, ("a", [1.0, 1.0]), ("b", [1.0, 0.0]))
        for name in ("a", "b", "new"):
            assert probability(padded, name) == probability(plain, name)

    @pytest.mark.parametrize("outcome", [[NAN] * 4, [NAN, 1.0, NAN, NAN]])
    def test_a_group_that_cannot_be_live_counts_as_failed(self, outcome):
        unrewarded, failed = outlook(4), outlook(4)
        see(unrewarded, ("a", outcome))
        see(failed, ("a", [0.0] * 4))
        assert probability(unrewarded, "a") == probability(failed, "a") < probability(failed, "new")

    def test_threshold_is_compared_in_the_precision_of_the_rewards(self):
        # float32 0.7 is less than the double 0.7
        at, above = outlook(success_threshold=0.7), outlook(success_threshold=0.7)
        see(at, ("a", [0.7, 0.0]))
        see(above, ("a", [1.0, 0.0]))
        assert probability(at, "a") == probability(above, "a")

    def test_nothing_generated(self):
        predictor = outlook()
        predictor.observe([], torch.zeros(0, 2), [])
        assert probability(predictor, "new") == pytest.approx(1 / 3)


class TestPrediction:
    @pytest.mark.parametrize(
        "solved", [0.2, 0.5, 1.0]
    )  # share of the prompts that are always solved; the others never
    def test_falls_with_every_solved_group_and_comes_back(self, solved):
        predictor = outlook(8, memory=0.9)
        see(predictor, *((f"p{i}", [float(i < solved * 50)] * 8) for i in range(50)))
        path = [probability(predictor, "x")]
        for _ in range(3):
            see(predictor, ("x", [1.0] * 8))
            path.append(probability(predictor, "x"))
        assert path == sorted(path, reverse=True)
        share = path[-1] / probability(predictor, "new")
        assert share < 0.6
        # All the way it is rated below a new prompt, ever closer
        for _ in range(60):
            predictor.tick()
            closer = probability(predictor, "x") / probability(predictor, "new")
            assert share < closer < 1
            share = closer
        assert share > 0.99

    def test_without_memory_loss_nothing_fades(self):
        predictor = outlook(memory=1.0)
        see(predictor, ("a", [1.0, 1.0]))
        before = probability(predictor, "a"), probability(predictor, "new")
        for _ in range(250):
            predictor.tick()
        assert (probability(predictor, "a"), probability(predictor, "new")) == before

    def test_solved_or_hopeless_is_not_undecided(self):
        # Both buckets are solved half of the time
        predictor = outlook(8, columns=["source"])
        for i in range(20):
            see(predictor, (f"extreme{i}", [float(i % 2)] * 8), source="extreme")
            see(predictor, (f"even{i}", [0.0, 1.0] * 4), source="even")
        assert probability(predictor, "new", source="extreme") < 0.25
        assert probability(predictor, "new", source="even") > 0.9
        assert 0.25 < probability(predictor, "new", source="elsewhere") < 0.9

    def test_draws_are_not_taken_for_differences(self):
        # Every prompt has p = 1/2, groups vary only by chance: as far as the bounds allow, one p for all. Taking the
        # variance of k / n for that of p, 1/4 · 1/4, would give a + b = 3 and 0.8.
        generator = torch.Generator().manual_seed(0)
        outcomes = torch.randint(0, 2, (600, 4), generator=generator).float()
        predictor = outlook(4)
        see(predictor, *((f"p{i}", outcome) for i, outcome in enumerate(outcomes.tolist())))
        expected = 1 - 2 / 2**4
        assert expected - 0.03 < probability(predictor, "new") <= expected

    def test_finds_the_distribution_that_prompts_come_from(self):
        generator = random.Random(0)
        rates = [generator.betavariate(0.3, 0.5) for _ in range(1500)]
        predictor = outlook(6)
        see(predictor, *((f"p{i}", [float(generator.random() < p) for _ in range(6)]) for i, p in enumerate(rates)))
        # Standard error of the share of mixed groups: √(1/4 / 1500) = 0.013
        assert probability(predictor, "new") == pytest.approx(mixed_probability(0.3, 0.5, 6), abs=0.04)

    def test_against_a_slow_twin(self):
        """The twin keeps every group with its age and sums over all of them at every question."""
        generator = random.Random(1)
        size, memory = 4, 0.8
        predictor = outlook(size, columns=["source"], memory=memory, success_threshold=0.5)
        groups: list[tuple[int, str, str, list[float]]] = []  # tick, prompt, source, outcomes

        def moments(members: list[tuple[int, str, str, list[float]]], now: int, above: list[float]) -> list[float]:
            latest = {name: (memory ** (now - tick), outcome) for tick, name, _, outcome in members}
            total, constants = [4 * above[0], 4 * above[1], 4 * above[2]], 4.0
            for weight, outcome in latest.values():
                passed = [x >= 0.5 for x in outcome]
                pairs = [x and y for i, x in enumerate(passed) for y in passed[:i]]
                total[0] += weight * sum(passed) / len(passed)
                total[1] += weight * sum(pairs) / len(pairs)
                if len(set(passed)) == 1:
                    constants += weight
                    total[2] += weight * (len(set(outcome)) > 1)
            prompts = 4 + sum(weight for weight, _ in latest.values())
            return [total[0] / prompts, total[1] / prompts, total[2] / constants]

        def twin(name: str, source: str, now: int) -> float:
            every = moments(groups, now, [1 / 2, 1 / 3, 0.0])
            mean, second, rate = moments([g for g in groups if g[2] == source], now, every)
            total = min(max((mean - second) / (second - mean**2), 0.05), 50) if second > mean**2 else 50
            a, b, constants, lively = mean * total, (1 - mean) * total, 1.0, rate
            none, all_ = betabinom.pmf([0, size], size, a, b)
            unseen = 1 - (none + all_) * (1 - rate)
            last = max((tick for tick, other, _, _ in groups if other == name), default=now)
            for tick, other, _, outcome in groups:
                if other == name:
                    weight, passed = memory ** (last - tick), [x >= 0.5 for x in outcome]
                    a += weight * passed.count(True)
                    b += weight * passed.count(False)
                    if len(set(passed)) == 1:
                        constants += weight
                        lively += weight * (len(set(outcome)) > 1)
            none, all_ = betabinom.pmf([0, size], size, a, b)
            seen = 1 - (none + all_) * (1 - lively / constants)
            return unseen + memory ** (now - last) * (seen - unseen)

        for now in range(12):
            for _ in range(generator.randrange(6)):
                name = f"p{generator.randrange(10)}"
                source = "ab"[int(name[1:]) % 2]
                outcome = generator.choice([[0.0, 0.0, 0.2, 0.2], [1.0] * 4, [0.0] * 4, [0.0, 1.0, 0.5, 1.0]])
                groups.append((now, name, source, outcome))
                see(predictor, (name, outcome), source=source)
            for i in range(12):
                expected = twin(f"p{i}", "abc"[i % 3 if i >= 10 else i % 2], now)
                got = probability(predictor, f"p{i}", source="abc"[i % 3 if i >= 10 else i % 2])
                assert got == pytest.approx(expected, abs=1e-9)
            predictor.tick()


class TestBuckets:
    @staticmethod
    def alike(predictor: PromptOutlook, seen: object, other: object) -> bool:
        """Whether what was seen of value `seen` counts as much for value `other`."""
        see(predictor, ("a", [1.0, 1.0]), level=seen)
        return probability(predictor, "new", level=seen) == probability(predictor, "new", level=other)

    @pytest.mark.parametrize(
        "seen, other, alike",
        [
            ("a", "a", True),
            ("a", "b", False),
            (True, False, False),
            (3, 4, False),
            (3, 3.0, True),
            (34, 27, True),  # one significant digit: both 30
            (34, 36, False),
            (0.27, 0.31, True),
            (0.27, 0.0031, False),
            (-30, 30, False),
            (None, NAN, True),
            (None, 0, False),
            (None, "", False),
            (["algebra"], ["algebra"], True),
            (["algebra"], ["geometry"], False),
            (math.inf, 1e300, False),
        ],
    )
    def test_values_as_they_come(self, seen, other, alike):
        assert self.alike(outlook(columns=["level"]), seen, other) == alike

    @pytest.mark.parametrize(
        "seen, other, alike",
        [(3, 8, True), (3, 35, False), (93, 5000, True), (None, NAN, True), (None, 3, False), (math.inf, 99, True)],
    )
    def test_many_numbers_are_cut_at_deciles(self, seen, other, alike):
        predictor = outlook(columns=["level"])
        predictor.set_bins({"level": [*range(100), None, NAN, math.inf], "unused": ["a"]})
        assert self.alike(predictor, seen, other) == alike

    def test_few_numbers_stand_for_themselves(self):
        for seen, other in ((34, 27), (30, 34)):
            predictor = outlook(columns=["level"])
            predictor.set_bins({"level": [27, 34, 30, None] * 20})
            assert not self.alike(predictor, seen, other)

    def test_skewed_numbers(self):
        predictor = outlook(columns=["level"])
        predictor.set_bins({"level": [0.0] * 95 + [float(i) for i in range(1, 21)]})
        assert not self.alike(predictor, 0.0, 20.0)

    def test_all_columns_count(self):
        predictor = outlook(columns=["source", "level"])
        see(predictor, ("a", [1.0, 1.0]), source="x", level=1)
        same = probability(predictor, "new", source="x", level=1)
        for row in ({"source": "x", "level": 2}, {"source": "y", "level": 1}, {"source": "x"}):
            assert probability(predictor, "new", **row) > same

    def test_a_prompt_may_change_its_bucket(self):
        predictor = outlook(columns=["source"])
        see(predictor, ("a", [1.0, 1.0]), source="x")
        see(predictor, ("a", [1.0, 1.0]), source="y")
        # It is one prompt, now of bucket y: nothing is left in x but what all prompts say
        assert probability(predictor, "new", source="x") == pytest.approx(4 / 15)
        assert probability(predictor, "new", source="y") == pytest.approx(16 / 75)


def candidates(count: int) -> list[dict]:
    return [{"prompt": f"p{i}"} for i in range(count)]


def knows(live: int, dead: int, **kwargs) -> PromptOutlook:
    """The first `live` of `candidates` were live whenever seen, the next `dead` never."""
    predictor = outlook(4, **kwargs)
    for _ in range(3):
        see(predictor, *((f"p{i}", [1.0, 0.0, 0.0, 1.0] if i < live else [1.0] * 4) for i in range(live + dead)))
    return predictor


class TestChoose:
    def test_in_proportion_to_what_they_are_worth(self):
        predictor = outlook(exploration=0.0)
        predictor.values = lambda rows, *_: [row["worth"] for row in rows]
        rows = [{"worth": 1.0 if i % 2 else 0.5} for i in range(80)]
        chosen = [i for _ in range(200) for i in predictor.choose(rows, 8)]
        # Worth a half, and taken a quarter as often: 320 of 1600, with a deviation of 16
        assert SHARPNESS == 2
        assert abs(sum(i % 2 == 0 for i in chosen) - 320) < 5 * 16
        # In the order of the candidates: none of the later half was needed
        assert max(chosen) < 40

    def test_equally_good_ones_stay_and_the_best_of_those_passed_over_follow(self):
        assert outlook(exploration=0.0).choose(candidates(10), 4) == [0, 1, 2, 3]
        predictor = outlook(exploration=0.0)
        predictor.values = lambda rows, *_: [1e-9, 3e-9, 1.0, 2e-9, 0.0]
        assert predictor.choose(candidates(5), 1) == [2]
        assert predictor.choose(candidates(5), 3) == [1, 2, 3]

    def test_rarely_what_was_dead(self):
        predictor = knows(24, 24, exploration=0.0)
        rows = [row for pair in zip(candidates(48)[24:], candidates(48)[:24], strict=True) for row in pair]
        chosen = [i for _ in range(50) for i in predictor.choose(rows, 8)]
        assert sum(i % 2 == 0 for i in chosen) < 0.3 * len(chosen)

    def test_too_few_to_choose_from(self):
        predictor = outlook()
        assert predictor.choose(candidates(3), 3) == [0, 1, 2]
        assert predictor.choose(candidates(3), 5) == [0, 1, 2]
        assert predictor.choose([], 2) == []
        assert predictor.choose(candidates(3), 0) == []

    def test_share_of_blind_choices(self):
        predictor = knows(8, 24)
        counts = [0] * 32
        for _ in range(200):
            chosen = predictor.choose(candidates(32), 8)
            assert len(set(chosen)) == 8
            assert chosen == sorted(chosen)
            assert sum(i >= 8 for i in chosen) <= 2  # a quarter of 8
            for i in chosen:
                counts[i] += 1
        # Blind draws are uniform over all 32: 200 · 2/32 = 12.5 for each dead prompt, deviation 3.4
        assert all(0 < count < 12.5 + 5 * 3.5 for count in counts[8:])
        assert abs(sum(counts[8:]) - 24 * 12.5) < 5 * math.sqrt(24 * 12.5)

    def test_share_holds_on_average_for_a_single_prompt(self):
        predictor = knows(1, 3)
        dead = sum(predictor.choose(candidates(4), 1) != [0] for _ in range(600))
        # Blind with probability 1/4, then dead with 3/4: mean 112.5, deviation 9.6
        assert abs(dead - 112.5) < 5 * 9.6

    def test_extreme_shares(self):
        blind = knows(4, 4, exploration=1.0)
        assert {tuple(blind.choose(candidates(8), 1)) for _ in range(100)} == {(i,) for i in range(8)}
        assert all(len(blind.choose(candidates(8), 4)) == 4 for _ in range(20))
        greedy = knows(4, 4, exploration=0.0)
        assert all(greedy.choose(candidates(8), 4) == [0, 1, 2, 3] for _ in range(20))

    def test_blind_choices_from_the_reserved(self):
        predictor = knows(4, 8, exploration=0.5)
        predictor.values = lambda rows, *_: [0.0] * 8 + [1.0] * 4
        rows = list(reversed(candidates(12)))  # 8 dead, then 4 live
        seen = set()
        for _ in range(60):
            chosen = predictor.choose(rows, 4, dealt=3)
            assert len(chosen) == 4
            assert len([i for i in chosen if i >= 8]) == 2
            seen.update(i for i in chosen if i < 8)
        assert seen == {0, 1, 2}
        # More than there are are not reserved
        assert len(predictor.choose(rows, 4, dealt=1)) == 4
        assert len(predictor.choose(rows, 4, dealt=99)) == 4

    def test_seed_decides(self):
        def chosen(seed: int) -> list[list[int]]:
            predictor = knows(4, 12, seed=seed)
            return [predictor.choose(candidates(16), 6) for _ in range(5)]

        assert chosen(1) == chosen(1)
        assert chosen(1) != chosen(2)


def run(predictor: PromptOutlook, seed: int, batches: int) -> list:
    """What is chosen and predicted over some batches, with everything that can happen in one."""
    generator = random.Random(seed)
    happened = []
    for _ in range(batches):
        rows = [{"prompt": f"p{generator.randrange(40)}", "level": generator.randrange(30)} for _ in range(12)]
        chosen = predictor.choose(rows, 5)
        happened.append([chosen, [predictor.live_probability(row) for row in rows]])
        outcomes = torch.tensor([[generator.choice([0.0, 0.5, 1.0, NAN]) for _ in range(4)] for _ in chosen])
        predictor.observe([rows[i] for i in chosen], outcomes, has_variance(outcomes).tolist())
        predictor.tick()
    return happened


class TestState:
    @staticmethod
    def fresh() -> PromptOutlook:
        predictor = outlook(4, columns=["level"], memory=0.9, seed=3)
        predictor.set_bins({"level": list(range(30))})
        return predictor

    def test_resumes_exactly(self, subtests):
        def pickled(state):
            return pickle.loads(pickle.dumps(state))

        before_and_after_a_sweep = [0, 1, 99, 100, 130]
        for copied, batches in product([pickled, copy.deepcopy], before_and_after_a_sweep):
            with subtests.test(copied=copied, batches=batches):
                predictor = self.fresh()
                run(predictor, 0, batches)
                resumed = outlook(4, columns=["level"], memory=0.9, seed=77)
                resumed.load_state_dict(copied(predictor.state_dict()))
                assert run(resumed, 1, 12) == run(predictor, 1, 12)

    def test_a_state_is_not_changed_afterwards(self):
        predictor = self.fresh()
        run(predictor, 0, 5)
        state = predictor.state_dict()
        first = run(predictor, 1, 5)
        predictor.load_state_dict(state)
        assert run(predictor, 1, 5) == first
        predictor.load_state_dict(state)
        assert run(predictor, 1, 5) == first

    def test_what_has_faded_is_dropped(self):
        predictor = outlook(columns=["level"], memory=0.9)
        see(predictor, ("old", [1.0, 1.0]), level=1)
        for _ in range(70):
            predictor.tick()
        see(predictor, ("recent", [1.0, 1.0]), level=2)
        for _ in range(30):
            predictor.tick()
        # 0.9^100 is negligible, 0.9^30 is not
        assert len(predictor.state_dict()["prompts"]) == 1
        assert probability(predictor, "old", level=1) == probability(predictor, "new", level=1)
        assert probability(predictor, "recent", level=2) < probability(predictor, "new", level=2)
        for _ in range(100):
            predictor.tick()
        assert predictor.state_dict()["prompts"] == predictor.state_dict()["buckets"] == {}
        assert probability(predictor, "recent", level=2) == pytest.approx(1 / 3)


class TestSimulation:
    """200 prompts, three in five of them always or never solved; 8 prompts a batch, 8 completions each."""

    @staticmethod
    def acceptance(informed: bool, columns: list[str] | None = None) -> tuple[float, float]:
        """The share of live groups in the first and the second half of 60 batches (2.4 blind passes)."""
        generator = random.Random(0)
        rates = [
            generator.random() if generator.random() < 0.4 else float(generator.random() < 0.5) for _ in range(200)
        ]
        data = {"prompt": [f"p{i}" for i in range(200)], "index": list(range(200))}
        data["source"] = ["even" if 0 < p < 1 else "extreme" for p in rates]
        stream = PromptStream(Dataset.from_dict(data), seed=0)
        predictor = outlook(8, columns=columns)
        live: list[bool] = []
        for _ in range(60):
            choose = (lambda rows: predictor.choose(rows, 8)) if informed else None
            rows = stream.draw(8, set(), choose=choose)
            passes = [[float(generator.random() < rates[row["index"]]) for _ in range(8)] for row in rows]
            outcomes = torch.tensor(passes)
            live += has_variance(outcomes).tolist()
            predictor.observe(rows, outcomes, live[-8:])
            predictor.tick()
        return sum(live[:240]) / 240, sum(live[240:]) / 240

    def test_informed_draws_waste_less(self):
        blind, informed = self.acceptance(False), self.acceptance(True)
        assert informed[0] > blind[0] + 0.05  # while it learns
        assert informed[1] > 1.6 * blind[1]

    def test_a_column_that_tells_speeds_it_up(self):
        assert self.acceptance(True, ["source"])[0] > self.acceptance(True)[0] + 0.05


# Forgetting at the right speed


def adaptive(**settings) -> AdaptiveOutlook:
    given = {"columns": [], "num_generations": 4, "success_threshold": 0.5, "seed": 0, **settings}
    return AdaptiveOutlook(**given)


def observed(outlook, passes: dict[str, int], kinds: bool = False) -> None:
    """A generation batch in which each prompt's group of four had so many passes, which a column may tell."""
    outlook.tick()
    outcomes = torch.tensor([[1.0] * k + [0.0] * (4 - k) for k in passes.values()])
    rows = [{"prompt": name, **({"kind": k} if kinds else {})} for name, k in passes.items()]
    outlook.observe(rows, outcomes, [0 < k < 4 for k in passes.values()])


def test_without_evidence_the_longest_memory_is_trusted():
    assert adaptive().best.memory == max(MEMORIES)


def test_a_policy_that_moves_makes_it_forget():
    """Half of the prompts are live in turn: what was seen a few batches ago is wrong by now."""
    outlook = adaptive()
    for batch in range(40):
        early = (batch // 4) % 2
        observed(outlook, {f"p{i}": 2 if i % 2 == early else 4 for i in range(8)})
    assert outlook.best.memory == min(MEMORIES)


def test_a_policy_that_stands_makes_it_remember():
    outlook = adaptive()
    for batch in range(60):
        observed(outlook, {f"p{batch % 20}": 2 if batch % 2 else 4})
    assert outlook.best.memory == max(MEMORIES)


def test_the_best_one_predicts_and_chooses():
    outlook = adaptive(exploration=0.0)
    for batch in range(40):
        early = (batch // 4) % 2
        observed(outlook, {f"p{i}": 2 if i % 2 == early else 4 for i in range(8)})
    candidates = [{"prompt": f"p{i}"} for i in range(8)]
    raw = [outlook.best.live_probability(row) for row in candidates]
    assert [outlook.live_probability(row) for row in candidates] == [outlook.calibration(p) for p in raw]
    best = copy.deepcopy(outlook.best)
    assert best.memory == min(MEMORIES)
    assert [outlook.choose(candidates, 2) for _ in range(5)] == [best.choose(candidates, 2) for _ in range(5)]


class Difficulty:
    """Reads one number that says how hard a prompt is, and one that says nothing."""

    def __call__(self, rows, projection):
        return np.array([[row["hard"], int(row["prompt"][1:]) % 7 - 3] for row in rows], dtype=np.float16), len(rows)


def frontier(features: bool, batches: int = 60) -> tuple[list[float], AdaptiveOutlook, list[set[str]]]:
    """
    A policy that improves: of 400 prompts, those around a difficulty that rises are live. The share of live groups in
    each batch of 8 of 64 candidates, the outlook, and the prompts that were all wrong and later live.
    """
    generator, outlook = random.Random(0), adaptive(num_generations=8, exploration=0.1)
    if features:
        outlook.read_prompts(Difficulty())
    prompts = [{"prompt": f"p{i}", "hard": generator.uniform(-2, 2)} for i in range(400)]
    shares, hopeless, back = [], set(), set()
    for batch in range(batches):
        outlook.tick()
        rows = generator.sample(prompts, 64)
        rows = [rows[i] for i in outlook.choose(rows, 8, dealt=8)]
        level = -2 + 4 * batch / batches
        rates = [1 / (1 + math.exp(6 * (row["hard"] - level))) for row in rows]
        outcomes = torch.tensor([[float(generator.random() < p) for _ in range(8)] for p in rates])
        live = has_variance(outcomes).tolist()
        outlook.observe(rows, outcomes, live)
        shares.append(sum(live) / 8)
        for row, is_live, passed in zip(rows, live, outcomes.sum(dim=1).tolist(), strict=True):
            if is_live and row["prompt"] in hopeless:
                back.add(row["prompt"])
            if passed == 0:
                hopeless.add(row["prompt"])
    return shares, outlook, [hopeless, back]


def test_features_find_the_live_prompts_as_the_policy_improves(subtests):
    shares, outlook, (hopeless, back) = frontier(features=True)
    blind, without, _ = frontier(features=False)
    with subtests.test("more groups are live"):
        assert sum(shares[15:]) > 1.3 * sum(blind[15:])
        assert outlook.trusts_features and not without.trusts_features
    with subtests.test("prompts that were all wrong come back when their time has come"):
        assert len(back) > 0.15 * len(hopeless)
    with subtests.test("predictions mean what they say"):
        assert outlook.calibration.error < 0.1


def test_a_value_counts_as_much_as_a_length_does():
    """Among 64 states that say nothing, a feature that stands for itself is found in a few batches."""
    generator, read = np.random.default_rng(0), {}
    reader_of = {}
    for plain in (1, 2):

        def reader(rows, projection, plain=plain):
            projection.plain = plain
            return np.stack([read[row["prompt"]] for row in rows]), len(rows)

        reader_of[plain] = reader
    outlooks = {plain: adaptive(predicted="pass_rate") for plain in reader_of}
    for plain, outlook in outlooks.items():
        outlook.read_prompts(reader_of[plain])
    for batch in range(4):
        values = {f"p{batch}_{i}": float(v) for i, v in enumerate(generator.normal(size=8))}
        for name, value in values.items():
            read[name] = np.array([0.0, value, *generator.normal(size=64)], dtype=np.float16)
        for outlook in outlooks.values():
            observed(outlook, {name: 4 if value > 0 else 0 for name, value in values.items()})
    for value in (-2.0, 2.0):
        read[f"new{value}"] = np.array([0.0, value, *[0.0] * 64], dtype=np.float16)
    low, high = (
        [outlook.pass_rates([{"prompt": f"new{v}"}])[0] for outlook in outlooks.values()] for v in (-2.0, 2.0)
    )
    assert high[1] - low[1] > high[0] - low[0] + 0.1 and high[1] - low[1] > 0.6


def test_features_that_say_nothing_are_not_trusted_for_long():
    outlook = adaptive(columns=["kind"], exploration=0.2)
    generator = np.random.default_rng(0)
    outlook.read_prompts(lambda rows, _: (generator.normal(size=(len(rows), 20)).astype(np.float16), 0))
    trusted = []
    for batch in range(60):
        observed(outlook, {f"p{batch}_{i}": 2 if i % 2 else 4 for i in range(8)}, kinds=True)
        trusted.append(outlook.trusts_features)
    assert not any(trusted[20:])


def test_an_adaptive_outlook_goes_on_where_it_was():
    whole, saved = adaptive(), adaptive()
    for batch in range(12):
        observed(whole, {f"p{i}": (i + batch) % 5 for i in range(6)})
        if batch == 5:
            state = pickle.loads(pickle.dumps(whole.state_dict()))
    saved.load_state_dict(state)
    for batch in range(6, 12):
        observed(saved, {f"p{i}": (i + batch) % 5 for i in range(6)})
    candidates = [{"prompt": f"p{i}"} for i in range(9)]
    assert saved.best.memory == whole.best.memory
    assert saved.choose(candidates, 4) == whole.choose(candidates, 4)
    assert [saved.live_probability(row) for row in candidates] == [whole.live_probability(row) for row in candidates]
