"""Advantages against values derived by hand, against slow twins in plain Python, and their properties."""

import itertools
import math
import statistics

import pytest
import torch

from trl_ext.objectives.advantages import (
    STD_EPSILON,
    aggregate_rewards,
    leave_one_out,
    maxrl,
    normalize_advantages,
    reinforce,
    scale_advantages,
    updated_baseline,
)


NAN = math.nan


def random_rewards(seed: int, groups: int = 6, size: int = 4, functions: int | None = None) -> torch.Tensor:
    """Rewards in steps of 1/8, so that ties occur, of which a fifth is not applicable."""
    generator = torch.Generator().manual_seed(seed)
    shape = (groups * size,) if functions is None else (groups * size, functions)
    rewards = torch.randint(-8, 9, shape, generator=generator) / 8
    return rewards.masked_fill(torch.rand(shape, generator=generator) < 0.2, NAN)


def groups_of(values: list[float], size: int) -> list[list[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def known(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def slow_leave_one_out(rewards: list[float], size: int) -> list[float]:
    advantages = []
    for group in groups_of(rewards, size):
        for i, reward in enumerate(group):
            others = known(group[:i] + group[i + 1 :])
            applies = not math.isnan(reward) and others
            advantages.append(reward - statistics.fmean(others) if applies else NAN)
    return advantages


def slow_deviation(values: list[float]) -> float:
    return statistics.stdev(known(values)) if len(known(values)) > 1 else 0.0


def slow_sum(rows: list[list[float]], weights: list[float]) -> list[float]:
    """A weighted sum of what applies."""
    totals = []
    for row in rows:
        terms = [w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r)]
        totals.append(sum(terms) if terms else NAN)
    return totals


class TestLeaveOneOut:
    def test_by_hand(self):
        # Group 1: rewards 1, 0, 0, 3. Means of the others: (0+0+3)/3 = 1, (1+0+3)/3 = 4/3 twice, (1+0+0)/3 = 1/3.
        # Advantages: 1 − 1 = 0, 0 − 4/3 twice, 3 − 1/3 = 8/3; they sum to 0.
        # Group 2: 2, n/a, 0, 4. The second gets none; the others' means are (0+4)/2 = 2, (2+4)/2 = 3, (2+0)/2 = 1.
        rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 2.0, NAN, 0.0, 4.0])
        expected = torch.tensor([0.0, -4 / 3, -4 / 3, 8 / 3, 0.0, NAN, -3.0, 3.0])
        torch.testing.assert_close(leave_one_out(rewards, 4), expected, equal_nan=True)

    @pytest.mark.parametrize("seed", range(5))
    def test_slow_twin(self, seed):
        rewards = random_rewards(seed)
        slow = torch.tensor(slow_leave_one_out(rewards.tolist(), 4))
        torch.testing.assert_close(leave_one_out(rewards, 4), slow, equal_nan=True)

    def test_is_the_centred_reward_times_g_over_g_minus_1(self):
        # R_i − (S − R_i)/(G − 1) = (G·R_i − S)/(G − 1) = G/(G − 1) · (R_i − S/G)
        rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
        centred = rewards.view(3, 4) - rewards.view(3, 4).mean(dim=1, keepdim=True)
        torch.testing.assert_close(leave_one_out(rewards, 4), (4 / 3 * centred).view(-1))

    def test_equal_rewards_give_zero(self):
        assert leave_one_out(torch.tensor([0.7] * 4 + [-2.0] * 4), 4).abs().max() < 1e-6

    def test_one_or_no_reward_in_a_group_gives_none(self):
        assert leave_one_out(torch.tensor([NAN, 5.0, NAN, NAN, NAN, NAN, NAN, NAN]), 4).isnan().all()

    def test_groups_do_not_see_each_other(self):
        rewards = random_rewards(3)
        changed = rewards.clone()
        changed[4:] = 17.0
        first, second = leave_one_out(rewards, 4)[:4], leave_one_out(changed, 4)[:4]
        assert first.isfinite().any()
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


class TestMaxRL:
    def test_by_hand(self):
        # Group 1: one of four solved, mean 1/4: (1 − 1/4)/(1/4) = 3, and −1 for the others; they sum to 0.
        # Group 2: graded, 0.5, n/a, 1, 0: mean 1/2 of what is known, so 0, n/a, 1, −1.
        # Group 3: nothing solved, mean 0: 0. Group 4: all solved: 0. Group 5: nothing known.
        rewards = [*(1.0, 0, 0, 0), *(0.5, NAN, 1.0, 0.0), *(0.0, 0.0, NAN, 0.0), *(1.0,) * 4, *(NAN,) * 4]
        expected = [*(3.0, -1, -1, -1), *(0.0, NAN, 1.0, -1.0), *(0.0, 0.0, NAN, 0.0), *(0.0,) * 4, *(NAN,) * 4]
        found = maxrl(torch.tensor(rewards, dtype=torch.float64), 4)
        exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **exactly)

    @pytest.mark.parametrize("size", [2, 3, 5])
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_is_the_gradient_of_the_likelihood_cut_off(self, size, p):
        # A policy solves a prompt with probability p = σ(θ). The score of a completion is R − p, dp/dθ = p(1 − p), and
        # −d/dθ Σ_{k=1}^{K} (1 − p)^k/k = Σ_{k=0}^{K−1} (1 − p)^k · p(1 − p), which is (1 − p)(1 − (1 − p)^K). Over all
        # 2^G outcomes of a group, the mean of 1/G Σ_i A_i (R_i − p) is that with K = G − 1: for G = 2, p(1 − p).
        expectation = 0.0
        for outcome in itertools.product((0.0, 1.0), repeat=size):
            probability = math.prod(p if reward else 1 - p for reward in outcome)
            rewards = torch.tensor(outcome, dtype=torch.float64)
            expectation += probability * (maxrl(rewards, size) * (rewards - p)).mean().item()
        assert expectation == pytest.approx((1 - p) * (1 - (1 - p) ** (size - 1)), rel=1e-12)

    def test_a_negative_mean_does_not_turn_the_sign(self):
        # (R − R̄)/R̄ would be negative for the better completion. The trainer refuses such rewards.
        assert maxrl(torch.tensor([-1.0, -3.0]), 2).tolist() == [0.0, 0.0]


class TestReinforce:
    def test_by_hand(self):
        rewards = torch.tensor([1.0, NAN, -2.0])
        assert reinforce(rewards).tolist() == pytest.approx([1.0, NAN, -2.0], nan_ok=True)
        assert reinforce(rewards, baseline=0.5).tolist() == pytest.approx([0.5, NAN, -2.5], nan_ok=True)

    def test_equal_rewards_at_the_baseline_give_zero(self):
        assert reinforce(torch.full((4,), 0.25), baseline=0.25).tolist() == [0.0] * 4

    def test_input_is_left_alone(self):
        rewards = torch.tensor([1.0, NAN])
        reinforce(rewards, 1.0)
        leave_one_out(rewards, 2)
        assert rewards[0] == 1.0
        assert rewards[1].isnan()


class TestUpdatedBaseline:
    def test_by_hand(self):
        # 0.9 · 2 + 0.1 · (1 + 3)/2 = 1.8 + 0.2
        assert updated_baseline(2.0, torch.tensor([1.0, NAN, 3.0]), 0.9) == pytest.approx(2.0)
        assert updated_baseline(0.0, torch.tensor([4.0]), 0.75) == pytest.approx(1.0)

    def test_begins_with_the_first_mean(self):
        assert updated_baseline(None, torch.tensor([1.0, 2.0]), 0.99) == pytest.approx(1.5)

    def test_nothing_to_see_changes_nothing(self):
        nothing = torch.tensor([NAN, NAN])
        assert updated_baseline(None, nothing, 0.9) is None
        assert updated_baseline(0.3, nothing, 0.9) == 0.3

    def test_a_zero_baseline_is_a_baseline(self):
        # 0.0 is falsy: taken for "none yet", the mean of the batch would replace it
        assert updated_baseline(0.0, torch.tensor([1.0]), 0.9) == pytest.approx(0.1)

    def test_momentum_zero_forgets(self):
        assert updated_baseline(5.0, torch.tensor([1.0]), 0.0) == 1.0


class TestScaleAdvantages:
    def test_by_hand(self):
        # Sample deviations: of (1, 3) sqrt(2), of (0, 4) sqrt(8), of all four, with mean 2, sqrt((1 + 1 + 4 + 4)/3)
        rewards, advantages = torch.tensor([1.0, 3.0, 0.0, 4.0]), torch.tensor([-1.0, 1.0, -2.0, 2.0])
        group = torch.tensor([math.sqrt(2)] * 2 + [math.sqrt(8)] * 2) + 1e-4
        torch.testing.assert_close(scale_advantages(advantages, rewards, "group", 2), advantages / group)
        batch = math.sqrt(10 / 3) + 1e-4
        torch.testing.assert_close(scale_advantages(advantages, rewards, "batch", 2), advantages / batch)
        assert torch.equal(scale_advantages(advantages, rewards, "none", 2), advantages)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("scale", ["group", "batch"])
    def test_slow_twin(self, scale, seed):
        rewards = random_rewards(seed)
        advantages = leave_one_out(rewards, 4)
        over = groups_of(rewards.tolist(), 4) if scale == "group" else [rewards.tolist()] * 6
        slow = [
            advantage / (slow_deviation(values) + 1e-4)
            for values, group in zip(over, groups_of(advantages.tolist(), 4), strict=True)
            for advantage in group
        ]
        scaled = scale_advantages(advantages, rewards, scale, 4)
        torch.testing.assert_close(scaled, torch.tensor(slow), equal_nan=True)

    def test_a_group_with_one_reward_is_not_scaled(self):
        rewards = torch.tensor([NAN, 2.0, NAN, NAN, NAN, NAN])
        scaled = scale_advantages(reinforce(rewards, 0.5), rewards, "group", 3)
        assert scaled.tolist() == pytest.approx([NAN, 1.5, NAN, NAN, NAN, NAN], nan_ok=True)

    def test_guard_is_trls(self):
        # TRL writes it as a literal: scaled advantages of ours and its own compare only if it is the same
        assert STD_EPSILON == 1e-4


class TestNormalizeAdvantages:
    def test_by_hand(self):
        # Of 1, 2 and 6 the mean is 3 and the sample deviation sqrt((4 + 1 + 9)/2) = sqrt(7); n/a counts in neither
        unit = 1 / (math.sqrt(7) + 1e-4)
        found = normalize_advantages(torch.tensor([1.0, 2.0, NAN, 6.0]))
        torch.testing.assert_close(found, torch.tensor([-2 * unit, -unit, NAN, 3 * unit]), equal_nan=True)

    def test_mean_and_deviation(self):
        found = normalize_advantages(leave_one_out(random_rewards(2), 4))
        assert statistics.fmean(known(found.tolist())) == pytest.approx(0, abs=1e-6)
        assert slow_deviation(found.tolist()) == pytest.approx(1, rel=1e-3)

    def test_equal_advantages_are_zero(self):
        assert normalize_advantages(torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.0] * 3


class TestAggregateRewards:
    def test_sum_by_hand(self):
        rewards = torch.tensor([[1.0, 2.0], [NAN, 4.0], [3.0, NAN], [NAN, NAN]])
        total = aggregate_rewards(rewards, torch.tensor([2.0, -0.5]), "sum_then_normalize", 2)
        torch.testing.assert_close(total, torch.tensor([1.0, -2.0, 6.0, NAN]), equal_nan=True)

    def test_normalised_by_hand(self):
        # Function 1 in group (0, 2): mean 1, deviation sqrt(2): ∓1/(sqrt(2) + 1e-4). Function 2 is constant: 0.
        # Function 1 in group (4, 4): 0. Function 2 there: (1, n/a): mean 1, no deviation of one value.
        rewards = torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 1.0], [4.0, 3.0]])
        unit = 1 / (math.sqrt(2) + 1e-4)
        total = aggregate_rewards(rewards, torch.tensor([3.0, 2.0]), "normalize_then_sum", 2)
        torch.testing.assert_close(total, torch.tensor([-3 * unit, 3 * unit, -2 * unit, 2 * unit]))

    @pytest.mark.parametrize("seed", range(4))
    def test_slow_twins(self, seed):
        rewards, weights = random_rewards(seed, functions=3), [1.0, 0.5, -2.0]
        total = aggregate_rewards(rewards, torch.tensor(weights), "sum_then_normalize", 4)
        slow = torch.tensor(slow_sum(rewards.tolist(), weights))
        torch.testing.assert_close(total, slow, equal_nan=True)

        columns = []
        for column in rewards.T.tolist():
            normalised = []
            for group in groups_of(column, 4):
                mean = statistics.fmean(known(group)) if known(group) else NAN
                # As in TRL, one value alone has no deviation, and so no normalised reward
                deviation = slow_deviation(group) if len(known(group)) > 1 else NAN
                normalised += [(value - mean) / (deviation + 1e-4) for value in group]
            columns.append(normalised)
        rows = [list(row) for row in zip(*columns, strict=True)]
        expected = [
            NAN if all(map(math.isnan, given)) else 0.0 if math.isnan(value) else value
            for given, value in zip(rewards.tolist(), slow_sum(rows, weights), strict=True)
        ]
        total = aggregate_rewards(rewards, torch.tensor(weights), "normalize_then_sum", 4)
        torch.testing.assert_close(total, torch.tensor(expected), equal_nan=True)

    @pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
    def test_a_function_that_never_applies_changes_nothing(self, aggregation):
        rewards = random_rewards(1, functions=2)
        more = torch.cat([rewards, torch.full((len(rewards), 1), NAN)], dim=1)
        without = aggregate_rewards(rewards, torch.ones(2), aggregation, 4)
        torch.testing.assert_close(aggregate_rewards(more, torch.ones(3), aggregation, 4), without, equal_nan=True)
