"""Groups of different sizes: who gets the slots, and what a policy gradient over such groups is in expectation."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from trl_ext.objectives.advantages import group_relative, leave_one_out, maxrl
from trl_ext.rollouts.groups import Groups, prompts_of_slots, share_out
from trl_ext.rollouts.informed import AdaptiveOutlook
from trl_ext.rollouts.outlook import mixed_probability


NAN = math.nan


class TestSlots:
    def test_slots_with_the_same_row_are_of_one_prompt(self):
        row, equal, other = {"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}
        assert prompts_of_slots([row, row, equal, other, other, other]) == [0, 0, 1, 2, 2, 2]
        assert prompts_of_slots([]) == []

    def test_shared_out_by_hand(self):
        # 0.6, then 0.5 and 0.3 of the second prompt; of the two gains of 0.3, the first prompt's comes first
        gains = [[0.3, 0.2], [0.5, 0.3], [0.6, 0.0]]
        found = [share_out(gains, slots, bars=[1.0] * 3) for slots in (1, 2, 3, 4)]
        assert found == [[2], [1, 2], [0, 1, 2], [0, 1, 1, 2]]

    def test_prompts_that_clear_their_bar_come_before_better_ones(self):
        # Bars of 0.3, 0.6 and 0.9 of 0.6: the first prompt takes both slots, the second one, and the third its best
        gains = [[0.3, 0.2], [0.5, 0.3], [0.6, 0.0]]
        found = [share_out(gains, slots, bars=[0.3, 0.6, 0.9]) for slots in (1, 2, 3, 4, 5)]
        assert found == [[0], [0, 0], [0, 0, 1], [0, 0, 1, 2], [0, 0, 1, 1, 2]]

    def test_no_other_choice_is_worth_more(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            drawn = torch.rand(4, 3, generator=generator, dtype=torch.float64)
            gains = drawn.sort(dim=1, descending=True).values.tolist()

            def worth(counts: tuple[int, ...], gains: list[list[float]] = gains) -> float:
                return sum(sum(of_prompt[:n]) for of_prompt, n in zip(gains, counts, strict=True))

            shared = share_out(gains, 5, bars=[1.0] * 4)
            best = max(worth(counts) for counts in itertools.product(range(4), repeat=4) if sum(counts) == 5)
            assert worth(tuple(shared.count(i) for i in range(4))) == pytest.approx(best, abs=1e-12)

    def test_further_completions_add_less_and_less(self):
        for a, b in itertools.product((0.03, 0.3, 1.0, 7.0, 40.0), repeat=2):
            values = [mixed_probability(a, b, n) for n in range(2, 40)]
            gains = [more - less for less, more in itertools.pairwise(values)]
            assert all(-1e-12 <= later <= earlier + 1e-12 for earlier, later in itertools.pairwise(gains))

    def test_predictions_and_evidence_count_all_completions_of_a_group(self):
        # 4 completions are 2 slots of 2 to one outlook and a group to the other; NaN fills up to the largest group
        rows = [{"prompt": name} for name in "abcd"]
        outcomes = torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
        filled = torch.nn.functional.pad(outcomes, (0, 4), value=NAN)
        parted, whole = AdaptiveOutlook([], 2, 0.5, 0, 0.0, 4), AdaptiveOutlook([], 4, 0.5, 0, 0.0)
        for outlook, seen in ((parted, filled), (whole, outcomes)):
            for _ in range(3):
                outlook.tick()
                outlook.observe(rows, seen, [True, False, False, True])
        assert parted.state_dict()["log_likelihoods"] == whole.state_dict()["log_likelihoods"]
        assert [parted.best.live_probability(row, 2) for row in rows] == [
            whole.best.live_probability(row) for row in rows
        ]
        chosen = [parted.choose(rows, 4) for _ in range(10)]
        assert sum(places.count(0) + places.count(3) for places in chosen) > 30
        assert max(places.count(0) for places in chosen) > 1


class TestPadding:
    groups = Groups([5, 5, 2, 5], 2)  # 6 completions of prompt 5 and 2 of prompt 2, whose slot is in between

    def test_by_hand(self):
        values = torch.arange(8.0)
        padded = torch.tensor([0.0, 1, 2, 3, 6, 7, 4, 5, NAN, NAN, NAN, NAN])
        assert (self.groups.size, self.groups.equal) == (6, False)
        torch.testing.assert_close(self.groups.padded(values), padded, equal_nan=True)
        assert torch.equal(self.groups.unpadded(padded), values)
        # 8 completions of 2 prompts: 8 / (2 · 6) and 8 / (2 · 2)
        weights = torch.tensor([2 / 3] * 4 + [2.0] * 2 + [2 / 3] * 2)
        torch.testing.assert_close(self.groups.weighted(torch.ones(8)), weights)

    def test_several_rewards_of_a_completion(self):
        values = torch.arange(24.0).view(8, 3)
        assert self.groups.padded(values).shape == (12, 3)
        assert torch.equal(self.groups.unpadded(self.groups.padded(values)), values)

    def test_equal_groups_stay_as_they_are(self):
        groups, values = Groups([3, 0, 1], 2), torch.arange(6.0)
        assert (groups.size, groups.equal) == (2, True)
        assert groups.padded(values) is groups.unpadded(values) is groups.weighted(values) is values

    @pytest.mark.parametrize("estimator", [leave_one_out, group_relative, maxrl])
    def test_advantages_are_those_of_each_group_alone(self, estimator):
        rewards = torch.tensor([1.0, 0.0, NAN, 1.0, 0.0, 1.0, 1.0, 0.5])
        advantages = self.groups.unpadded(estimator(self.groups.padded(rewards), self.groups.size))
        for rows in ([0, 1, 2, 3, 6, 7], [4, 5]):
            torch.testing.assert_close(advantages[rows], estimator(rewards[rows], len(rows)), equal_nan=True)


def outcomes_of(prompts: list[int], rates: list[float]) -> Iterator[tuple[torch.Tensor, float]]:
    """All rewards that completions of these prompts can have, with their probability."""
    for bits in itertools.product((0.0, 1.0), repeat=len(prompts)):
        chances = [rates[k] if bit else 1 - rates[k] for k, bit in zip(prompts, bits, strict=True)]
        yield torch.tensor(bits, dtype=torch.float64), math.prod(chances)


def expected_gradient(prompts: list[int], rates: list[float], estimator=leave_one_out, weigh=True) -> list[float]:
    """
    The mean over completions of A_i ∂log π(o_i)/∂θ, in expectation over the completions. A prompt has a logit of its
    own, a completion is one draw that passes with probability p = σ(θ): ∂log π/∂θ is 1 − p if it passes, and else −p.
    """
    groups, total = Groups(prompts, 1), torch.zeros(len(rates), dtype=torch.float64)
    own = torch.nn.functional.one_hot(torch.tensor(prompts), len(rates)).double()
    rate = torch.tensor(rates, dtype=torch.float64)[prompts]
    for rewards, probability in outcomes_of(prompts, rates):
        advantages = groups.unpadded(estimator(groups.padded(rewards), groups.size))
        advantages = groups.weighted(advantages) if weigh else advantages
        total += probability * ((advantages * (rewards - rate)).unsqueeze(1) * own).mean(dim=0)
    return total.tolist()


class TestExpectedGradient:
    prompts, rates = [0, 0, 1, 1, 1, 2, 2, 2, 2], [0.9, 0.5, 0.1]  # 2, 3 and 4 completions

    def test_is_that_of_the_mean_over_prompts(self):
        # The expected reward of a prompt is p, and ∂p/∂θ = p (1 − p)
        true = [p * (1 - p) / 3 for p in self.rates]
        assert expected_gradient(self.prompts, self.rates) == pytest.approx(true, rel=1e-12)
        assert expected_gradient([0, 0, 1, 1, 2, 2], self.rates) == pytest.approx(true, rel=1e-12)

    def test_without_weights_prompts_with_many_completions_would_count_more(self):
        biased = [n / 9 * p * (1 - p) for n, p in zip((2, 3, 4), self.rates, strict=True)]
        assert expected_gradient(self.prompts, self.rates, weigh=False) == pytest.approx(biased, rel=1e-12)

    def test_grpos_baseline_contains_the_completion_itself(self):
        # which takes its share 1/n of the reward off: a factor of 1 − 1/n, however the groups are made
        smaller = [(1 - 1 / n) * p * (1 - p) / 3 for n, p in zip((2, 3, 4), self.rates, strict=True)]
        found = expected_gradient(self.prompts, self.rates, estimator=group_relative)
        assert found == pytest.approx(smaller, rel=1e-12)

    def test_sizes_that_depend_on_earlier_batches_alone_leave_it_unbiased(self):
        """The sizes of a second batch follow the outcomes of a first; its gradient is right after each of them."""
        rates = self.rates[1:]
        for first, _ in outcomes_of([0, 1], rates):
            sizes = [2 if passed else 3 for passed in first.tolist()]
            prompts = [prompt for prompt, size in enumerate(sizes) for _ in range(size)]
            assert expected_gradient(prompts, rates) == pytest.approx([p * (1 - p) / 2 for p in rates], rel=1e-12)
