"""Metrics of several rounds against a direct recount, and those of fitted micro-batches by hand."""

import math
import random
import statistics
from itertools import chain

import pytest
import torch

from trl_ext.rollouts.exactness import ExactSavings
from trl_ext.rollouts.micro_batches import Fit
from trl_ext.rollouts.statistics import pool_rounds, restate_loss_metrics, reward_statistics


def trl_metrics(lengths: list[int], terminated: list[bool], calls: int, failures: int) -> dict[str, float]:
    """What TRL appends for one round."""
    ended = [length for length, t in zip(lengths, terminated, strict=True) if t] or [0]
    return {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - statistics.fmean(terminated),
        "completions/mean_terminated_length": statistics.fmean(ended),
        "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended),
        "tools/call_frequency": calls / len(lengths),
        "tools/failure_frequency": failures / calls if calls else 0.0,
    }


def random_round(generator: random.Random) -> tuple[list[int], list[bool], int, int]:
    size = generator.randint(1, 6) * 2
    lengths = [generator.randint(1, 30) for _ in range(size)]
    ends = generator.choice([0.0, 0.4, 1.0])  # rounds in which nothing, or all, terminated
    calls = generator.choice([0, 3, 7])
    return lengths, [generator.random() < ends for _ in range(size)], calls, generator.randint(0, calls)


def test_equals_a_recount(subtests):
    for seed in range(30):
        with subtests.test(seed=seed):
            generator = random.Random(seed)
            rounds = [random_round(generator) for _ in range(generator.randint(2, 4))]
            metrics: dict[str, list[float]] = {"reward": [0.5], "num_tokens": [7.0]}
            earlier = trl_metrics([5, 6], [True, False], 1, 1)  # an earlier generation batch, not yet logged
            for values in [earlier, *(trl_metrics(*made) for made in rounds)]:
                for key, value in values.items():
                    metrics.setdefault(key, []).append(value)

            pool_rounds(metrics, [len(lengths) for lengths, _, _, _ in rounds])

            lengths, terminated, calls, failures = zip(*rounds, strict=True)
            recount = trl_metrics([*chain(*lengths)], [*chain(*terminated)], sum(calls), sum(failures))
            assert metrics.pop("reward") == [0.5]
            assert metrics.pop("num_tokens") == [7.0]
            assert metrics.keys() == recount.keys()
            for key, values in metrics.items():
                assert values == pytest.approx([earlier[key], recount[key]]), key


def test_works_without_tools():
    metrics = {key: [v] for key, v in trl_metrics([4], [True], 0, 0).items() if not key.startswith("tools/")}
    pool_rounds(metrics, [1])
    assert metrics["completions/mean_length"] == [4]


class TestRewardStatistics:
    # Three groups of two; the second function doesn't apply everywhere, and to the last completion none does
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, math.nan], [1.0, math.nan], [0.0, 4.0], [math.nan] * 2])
    weights = torch.tensor([1.0, 0.5])

    def test_recount(self):
        found = reward_statistics(self.rewards, self.weights, ["right", "style"], num_generations=2)
        right, style = [1, 0, 1, 1, 0], [0, 2, 4]
        total = [1, 1, 1, 1, 2]  # 1 + 0, 0 + 1, 1, 1, 0 + 2
        assert found == pytest.approx(
            {
                "rewards/right/mean": statistics.fmean(right),
                "rewards/right/std": statistics.stdev(right),
                "rewards/style/mean": statistics.fmean(style),
                "rewards/style/std": statistics.stdev(style),
                "reward": statistics.fmean(total),
                "reward_std": statistics.stdev(total),
                # Two groups are constant; one value alone has no deviation, and TRL doesn't count it as zero
                "frac_reward_zero_std": 2 / 3,
            }
        )


def fits(tokens: list[int], rows: list[int], fillers: list[int], all_tokens: int, all_rows: int) -> list[Fit]:
    """What the micro-batches of one step stand for."""
    return [
        Fit(
            scale=1.0,
            tokens=t,
            rows=r,
            fillers=f,
            computed_tokens=sum(tokens),
            computed_rows=sum(rows),
            all_tokens=all_tokens,
            all_rows=all_rows,
            micro_batches=len(tokens),
            first=i == 0,
        )
        for i, (t, r, f) in enumerate(zip(tokens, rows, fillers, strict=True))
    ]


class TestRestateLossMetrics:
    """
    Two micro-batches: five tokens in two rows, one token in one row and a row without weight. Of TRL's micro-batches
    they hold what has an advantage; ten tokens in four rows more have none.
    """

    tokens, rows = [5, 1], [2, 1]
    dealt = fits(tokens, rows, fillers=[0, 1], all_tokens=16, all_rows=7)
    whole = fits(tokens, rows, fillers=[0, 0], all_tokens=6, all_rows=3)
    skipping = ExactSavings(True, True, skip_dead=True, weigh_copies=False)
    merging = ExactSavings(True, True, skip_dead=True, weigh_copies=True)
    keeping = ExactSavings(True, True, skip_dead=False, weigh_copies=False)

    def restated(
        self, key: str, values: list[float], savings: ExactSavings, by_row: bool = False, fits: list[Fit] | None = None
    ) -> dict[str, float]:
        """What TRL logs after a step: means over what stands in each list."""
        metrics: dict[str, list[float]] = {"reward": [0.5]}
        for value, fit in zip(values, self.dealt if fits is None else fits, strict=True):
            metrics.setdefault(key, []).append(value)
            restate_loss_metrics(metrics, fit, by_row, savings)
            assert all(metrics.values())  # TRL logs None for an empty list
        assert metrics.pop("reward") == [0.5]
        return {name: statistics.fmean(found) for name, found in metrics.items()}

    @pytest.mark.parametrize("key", ["kl", "entropy", "clip_ratio/region_mean", "cispo_clip_ratio"])
    def test_a_mean_over_tokens_stays_one(self, key):
        # Five tokens have 0.2, one has 0.8
        found = self.restated(key, [0.2, 0.8], self.keeping, fits=self.whole)
        assert found == pytest.approx({key: (5 * 0.2 + 0.8) / 6})

    @pytest.mark.parametrize("key", ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"])
    def test_tokens_without_an_advantage_are_never_clipped(self, key):
        assert self.restated(key, [0.2, 1.0], self.skipping) == pytest.approx({key: (1 + 1) / 16})
        assert self.restated("cispo_clip_ratio", [0.2, 1.0], self.skipping) == pytest.approx(
            {"cispo_clip_ratio": 2 / 16}
        )

    def test_the_entropy_of_what_is_not_computed_is_not_known(self):
        found = self.restated("entropy", [0.2, 0.8], self.skipping)
        assert found == pytest.approx({"computed/entropy": (5 * 0.2 + 0.8) / 6})

    @pytest.mark.parametrize("key", ["entropy", "clip_ratio/low_mean", "cispo_clip_ratio"])
    def test_copies_that_are_weights_are_not_known_one_by_one(self, key):
        found = self.restated(key, [0.2, 0.8], self.merging)
        assert found == pytest.approx({f"computed/{key}": (5 * 0.2 + 0.8) / 6})

    @pytest.mark.parametrize("savings", [skipping, keeping])
    def test_ratios_of_sequences_count_rows(self, savings):
        # Both rows of the first are clipped, and the one of the second, whose mean has the row without weight in it
        found = self.restated("clip_ratio/region_mean", [1.0, 0.5], savings, by_row=True)
        assert found == pytest.approx({"clip_ratio/region_mean": 3 / 7})
        found = self.restated("clip_ratio/region_mean", [1.0, 0.5], self.merging, by_row=True)
        assert found == pytest.approx({"computed/clip_ratio/region_mean": 1.0})
        # The entropy is a token's all the same
        found = self.restated("entropy", [0.2, 0.8], self.merging, by_row=True)
        assert found == pytest.approx({"computed/entropy": (5 * 0.2 + 0.8) / 6})

    @pytest.mark.parametrize("by_row", [True, False])
    def test_vespo_weighs_rows(self, by_row):
        # Two rows with 0.5 each; one with 0.2, and TRL's 1 for the row without weight
        found = self.restated("vespo/phi_seq_mean", [0.5, (0.2 + 1) / 2], self.skipping, by_row)
        assert found == pytest.approx({"computed/vespo/phi_seq_mean": (2 * 0.5 + 0.2) / 3})

    def test_vespo_counts_rows_without_a_token(self):
        # With a KL term all rows are computed but those without a token in the loss, where TRL's weight is 1
        found = self.restated("vespo/phi_seq_mean", [0.5, (0.2 + 1) / 2], self.keeping)
        assert found == pytest.approx({"vespo/phi_seq_mean": (2 * 0.5 + 0.2 + 4 * 1) / 7})

    def test_a_micro_batch_without_a_row(self):
        empty = fits([6, 0], [3, 0], fillers=[0, 1], all_tokens=6, all_rows=3)
        assert self.restated("kl", [0.4, 0.0], self.keeping, fits=empty) == pytest.approx({"kl": 0.4})
        nothing = fits([0, 0], [0, 0], fillers=[1, 1], all_tokens=9, all_rows=3)
        assert self.restated("entropy", [0.0, 0.0], self.skipping, fits=nothing) == {"computed/entropy": 0.0}

    def test_extremes_are_those_of_the_step(self):
        low, high = "clip_ratio/low_min", "clip_ratio/high_max"
        # A row that was left out has a clip ratio of zero: that may be the smallest, but not the largest
        for savings in (self.skipping, self.merging):
            assert self.restated(low, [0.2, 0.4], savings) == {f"computed/step/{low}": 0.2}
            assert self.restated(high, [0.2, 0.4], savings) == {f"step/{high}": 0.4}
        assert self.restated(low, [0.2, 0.4], self.keeping) == {f"step/{low}": 0.2}
        assert self.restated(low, [math.nan, 0.4], self.keeping) == {f"step/{low}": 0.4}
        # Where nothing is computed, nothing is clipped
        dead = fits([0], [0], [1], all_tokens=6, all_rows=3)
        assert self.restated(high, [math.nan], self.skipping, fits=dead) == {high: 0.0}
        # With one micro-batch, they are TRL's
        alone = fits([6], [3], [0], all_tokens=6, all_rows=3)
        assert self.restated(high, [0.4], self.skipping, fits=alone) == {high: 0.4}

    def test_each_step_has_its_own_extremes(self):
        metrics: dict[str, list[float]] = {}
        for value, fit in zip([0.2, 0.4, 0.3, 0.1], [*self.dealt, *self.dealt], strict=True):
            metrics.setdefault("clip_ratio/high_max", []).append(value)
            restate_loss_metrics(metrics, fit, False, self.skipping)
        assert metrics == {"step/clip_ratio/high_max": [0.4, 0.3]}

    @pytest.mark.parametrize(("clipped", "smallest"), [(1, 1.0), (0, 0.0)])
    def test_the_smallest_is_not_that_of_a_row_without_weight(self, clipped, smallest):
        # By token TRL leaves such a row out itself; by row it has a zero: of two rows, one is real
        metrics: dict[str, list[float]] = {"clip_ratio/low_min": [], "clip_ratio/low_mean": []}
        for low, mean, fit in zip([1.0, 0.0], [1.0, clipped / 2], self.dealt, strict=True):
            metrics.setdefault("clip_ratio/low_min", []).append(low)
            metrics.setdefault("clip_ratio/low_mean", []).append(mean)
            restate_loss_metrics(metrics, fit, True, self.skipping)
        assert metrics["computed/step/clip_ratio/low_min"] == [smallest]

    def test_earlier_steps_stay(self):
        metrics = {"kl": [7.0], "clip_ratio/low_mean": [0.5], "entropy": [3.0]}
        for key in metrics:
            metrics[key].append(0.2)
        restate_loss_metrics(metrics, self.whole[0], False, self.keeping)
        new = pytest.approx(5 * 0.2 * 2 / 6)
        assert metrics == {"kl": [7.0, new], "clip_ratio/low_mean": [0.5, new], "entropy": [3.0, new]}

    def test_a_kl_that_is_not_the_losss_stays(self):
        metrics = {"kl": [0.25], "entropy": [0.2]}
        restate_loss_metrics(metrics, self.whole[0], False, self.keeping, loss_has_kl=False)
        assert metrics == {"kl": [0.25], "entropy": [pytest.approx(5 * 0.2 * 2 / 6)]}

    def test_equals_a_recount(self, subtests):
        """Random tokens dealt at random: whatever the deal, the mean is that over all."""
        for seed in range(10):
            with subtests.test(seed=seed):
                generator = random.Random(seed)
                tokens = [generator.randint(1, 9) for _ in range(4)]
                values = [[generator.random() for _ in range(n)] for n in tokens]
                found = self.restated(
                    "kl",
                    [*map(statistics.fmean, values)],
                    self.keeping,
                    fits=fits(tokens, [1] * 4, [0] * 4, sum(tokens), 4),
                )
                assert found["kl"] == pytest.approx(statistics.fmean(chain(*values)))
