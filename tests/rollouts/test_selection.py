"""Which groups are trained on: against values by hand, plain-Python twins, and many random cases."""

import math
import random

import pytest
import torch

from trl_ext.rollouts.selection import (
    AcceptanceRate,
    GroupRef,
    GroupSelection,
    census,
    has_variance,
    only_scored,
    outcome_rewards,
)


NAN = math.nan


def test_a_row_without_an_outcome_has_no_reward():
    rewards = torch.tensor([[1.0, NAN, 0.5], [NAN, NAN, 0.5], [NAN, 2.0, NAN]])
    kept = torch.tensor([[1.0, NAN, 0.5], [NAN, NAN, NAN], [NAN, 2.0, NAN]])
    found = only_scored(rewards, torch.tensor([True, True, False]))
    assert torch.equal(found.isnan(), kept.isnan()) and torch.equal(found.nan_to_num(), kept.nan_to_num())
    assert only_scored(rewards, torch.tensor([False] * 3)) is rewards


class TestHasVariance:
    def test_by_hand(self):
        outcome = torch.tensor(
            [
                [0.0, 0.0, 0.0],
                [1.0, 1.0, 1.0],
                [0.0, 1.0, 0.0],
                [NAN, 1.0, 1.0],  # what is not applicable doesn't count
                [NAN, 1.0, 0.0],
                [NAN, NAN, 1.0],
                [NAN, NAN, NAN],
                [-1.0, -2.0, -1.0],
            ]
        )
        assert has_variance(outcome).tolist() == [False, False, True, False, True, False, False, True]

    def test_rounding_is_no_variance(self):
        # 0.1 + 0.2 and 0.3 are neighbours in float64, and sums of equal rewards in two orders
        assert not has_variance(torch.tensor([[0.1 + 0.2, 0.3]], dtype=torch.float64)).item()
        assert not has_variance(torch.tensor([[0.7, 0.7 + 1e-7, 0.7 - 1e-7]])).item()
        assert not has_variance(torch.tensor([[1e4, 1e4 + 1e-3]])).item()
        # What a user would call a difference is one, at any magnitude
        assert has_variance(torch.tensor([[0.7, 0.7 + 1e-5], [0.0, 2e-6], [1e4, 1e4 + 0.1], [-1.0, -1.00001]])).all()
        # The mean of 16 times 0.1 is not 0.1 in float32: a deviation would call this one live
        constant = torch.full((1, 16), 0.1)
        assert not has_variance(constant).item()
        # Far from zero the same: large equal rewards are equal
        assert not has_variance(torch.full((1, 7), 1e6 + 0.1)).item()

    def test_does_not_depend_on_order_or_shift(self):
        outcome = torch.randint(0, 2, (50, 3), generator=torch.Generator().manual_seed(0)).float()
        live = has_variance(outcome)
        assert 0 < live.sum() < 50
        assert torch.equal(live, has_variance(outcome.flip(1)))
        assert torch.equal(live, has_variance(outcome - 4))
        assert live.tolist() == [len(set(group)) > 1 for group in outcome.tolist()]


class TestOutcomeRewards:
    rewards = torch.tensor([[1.0, 2.0, -0.5], [NAN, 2.0, -1.0], [NAN, NAN, -0.25], [0.0, NAN, NAN]])
    weights = torch.tensor([1.0, 0.5, 1.0])

    def test_by_hand(self):
        # The third function shapes: 1 + 0.5 · 2; 0.5 · 2; no outcome; 0
        outcome = outcome_rewards(self.rewards, self.weights, torch.tensor([True, True, False]))
        torch.testing.assert_close(outcome, torch.tensor([2.0, 1.0, NAN, 0.0]), equal_nan=True)

    def test_shaping_does_not_matter(self):
        is_outcome = torch.tensor([True, True, False])
        other = self.rewards.clone()
        other[:, 2] = torch.tensor([9.0, NAN, 0.0, -9.0])
        torch.testing.assert_close(
            outcome_rewards(other, self.weights, is_outcome),
            outcome_rewards(self.rewards, self.weights, is_outcome),
            equal_nan=True,
        )


class TestCensus:
    def test_by_hand(self):
        outcome = torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.0, 0.0], [0.0, 1.0], [NAN, NAN], [NAN, 0.2]])
        assert census(outcome, 0.5) == {"generated": 6, "dead": 5, "all_right": 2, "all_wrong": 2}

    def test_nothing_dead(self):
        assert census(torch.tensor([[0.0, 1.0]]), 0.5) == {"generated": 1, "dead": 0, "all_right": 0, "all_wrong": 0}

    def test_parts_add_up(self):
        outcome = torch.randint(0, 2, (200, 3), generator=torch.Generator().manual_seed(0)).float()
        counts = census(outcome, 1.0)
        assert counts["dead"] == counts["all_right"] + counts["all_wrong"]
        assert counts["generated"] - counts["dead"] == int(has_variance(outcome).sum())


class TestAcceptanceRate:
    def test_by_hand(self):
        rate = AcceptanceRate()
        assert rate.rate == 0.5
        rate.observe(4, 4)  # (0.8 · 1 + 4) / (0.8 · 2 + 4)
        assert rate.rate == pytest.approx(4.8 / 5.6)
        assert rate.draws_for(3, at_most=16, multiple_of=1) == 4  # 3 / 0.857 = 3.5
        rate.observe(0, 8)  # 3.84 / 12.48
        assert rate.rate == pytest.approx(3.84 / 12.48)
        assert rate.draws_for(3, at_most=16, multiple_of=1) == 10  # 9.75
        assert rate.draws_for(3, at_most=16, multiple_of=4) == 12
        assert rate.draws_for(3, at_most=8, multiple_of=1) == 8

    def test_bounds_and_monotony(self):
        generator = random.Random(0)
        for _ in range(500):
            rate = AcceptanceRate()
            for _ in range(generator.randrange(5)):
                generated = generator.randint(1, 20)
                rate.observe(generator.randint(0, generated), generated)
            assert 0 < rate.rate <= 1
            multiple = generator.choice([1, 2, 3, 4])
            at_most = multiple * generator.randint(1, 8)
            draws = [rate.draws_for(missing, at_most, multiple) for missing in range(1, at_most + 1)]
            assert draws == sorted(draws)  # more missing never draws less
            for missing, drawn in enumerate(draws, start=1):
                assert drawn % multiple == 0
                assert multiple <= drawn <= at_most
                assert drawn >= min(missing, at_most)
                # Not more than needed: one multiple less would be expected to fall short
                assert (drawn - multiple) * rate.rate < missing

    def test_worse_acceptance_never_draws_less(self):
        draws = []
        for live in range(10, -1, -1):
            rate = AcceptanceRate()
            rate.observe(live, 10)
            draws.append(rate.draws_for(2, at_most=64, multiple_of=2))
        assert draws == sorted(draws)

    def test_stays_finite_when_nothing_is_ever_live(self):
        rate = AcceptanceRate()
        for _ in range(5000):
            rate.observe(0, 64)
        assert rate.draws_for(64, at_most=64, multiple_of=1) == 64

    def test_recent_observations_weigh_more(self):
        first, second = AcceptanceRate(), AcceptanceRate()
        for live in (0, 8):
            first.observe(live, 8)
            second.observe(8 - live, 8)
        assert first.rate > second.rate


def selection(live: list[bool], num_generations: int = 4, rows_per_rank: int | None = None) -> GroupSelection:
    return GroupSelection(live, num_generations, rows_per_rank or len(live) * num_generations)


class TestFill:
    def test_by_hand(self):
        chosen = selection([True, False, False, True])
        chosen.fill(1, [False, True], rows_per_rank=8)
        assert chosen.slots == [GroupRef(0, 0), GroupRef(1, 1), GroupRef(0, 2), GroupRef(0, 3)]
        assert chosen.live == [True, True, False, True]
        assert chosen.dead_slots == [2]
        chosen.fill(2, [True, True, True], rows_per_rank=12)
        assert chosen.slots[2] == GroupRef(2, 0)
        assert chosen.dead_slots == []
        assert chosen.surplus == 2
        assert chosen.sources == [0, 1, 2, 3]

    def test_callers_list_is_left_alone(self):
        live = [True, False]
        selection(live).fill(1, [True], rows_per_rank=4)
        assert live == [True, False]

    def test_prefers_home_over_order(self):
        # 2 ranks × 2 slots, both of rank 1 are free; of the new round, group 0 stands on rank 0 and group 2 on rank 1
        chosen = selection([True, True, False, False], rows_per_rank=8)
        chosen.fill(1, [True, False, True, False], rows_per_rank=8)
        assert chosen.slots[2:] == [GroupRef(1, 2), GroupRef(1, 0)]

    def test_groups_cross_ranks_where_they_must(self):
        chosen = selection([True, False, False, True], rows_per_rank=8)
        chosen.fill(1, [False, False, True, True], rows_per_rank=8)  # both on rank 1
        assert {ref.group for ref in chosen.slots[1:3]} == {2, 3}

    def test_what_is_kept_does_not_depend_on_the_number_of_ranks(self):
        generator = random.Random(2)
        for _ in range(200):
            live = [generator.random() < 0.6 for _ in range(4)]
            new = [generator.random() < 0.6 for _ in range(4)]
            kept = []
            for ranks in (1, 2, 4):
                chosen = selection(list(live), rows_per_rank=16 // ranks)
                chosen.fill(1, new, rows_per_rank=16 // ranks)
                kept.append(sorted((ref.round, ref.group) for ref in chosen.slots))
            assert kept[0] == kept[1] == kept[2]

    def test_random_cases(self):
        generator = random.Random(1)
        for _ in range(300):
            size, ranks = generator.choice([2, 4]), generator.choice([1, 2])
            slots = ranks * generator.randint(1, 4)
            live = [generator.random() < 0.5 for _ in range(slots)]
            chosen = selection(list(live), size, rows_per_rank=slots * size // ranks)
            arrived = 0
            for index in range(1, 4):
                groups = ranks * generator.randint(1, 3)
                new = [generator.random() < 0.4 for _ in range(groups)]
                arrived += sum(new)
                chosen.fill(index, new, rows_per_rank=groups * size // ranks)
                # Live groups of the first round never move, and nothing is used twice
                assert all(chosen.slots[i] == GroupRef(0, i) for i in range(slots) if live[i])
                assert len(set(chosen.slots)) == slots
            assert sum(chosen.live) == min(slots, sum(live) + arrived)
            assert chosen.surplus == max(0, sum(live) + arrived - slots)


class TestDuplicate:
    def test_without_replacement_while_groups_are_left(self):
        for seed in range(30):
            chosen = selection([True, False, True, False, True, False])
            assert chosen.duplicate(torch.Generator().manual_seed(seed)) == 3
            assert sorted(chosen.sources[1::2]) == [0, 2, 4]
            assert chosen.sources[::2] == [0, 2, 4]
            # A copy is no new group: the slot stays what it was, and what is logged
            assert chosen.slots == [GroupRef(0, i) for i in range(6)]

    def test_with_replacement_after_that(self):
        spread = set()
        for seed in range(60):
            chosen = selection([True, True] + [False] * 5)
            assert chosen.duplicate(torch.Generator().manual_seed(seed)) == 5
            copies = chosen.sources[2:]
            assert set(copies) == {0, 1}  # each once, before any twice
            spread.add(copies.count(0))
        assert spread == {1, 2, 3, 4}  # the other three are free draws

    def test_every_source_is_as_likely(self):
        counts = [0] * 4
        for seed in range(800):
            chosen = selection([True] * 4 + [False])
            chosen.duplicate(torch.Generator().manual_seed(seed))
            counts[chosen.sources[4]] += 1
        # 800 draws of probability 1/4: mean 200, deviation 12
        assert all(abs(count - 200) < 5 * 12.3 for count in counts)

    @pytest.mark.parametrize("live", [[False] * 4, [True] * 4], ids=["nothing to copy", "nothing to fill"])
    def test_nothing_to_do(self, live):
        chosen = selection(live)
        generator = torch.Generator().manual_seed(0)
        state = generator.get_state()
        assert chosen.duplicate(generator) == 0
        assert chosen.sources == [0, 1, 2, 3]
        assert torch.equal(generator.get_state(), state)

    def test_seed_decides(self):
        def drawn(seed: int) -> list[int]:
            chosen = selection([True] * 8 + [False] * 8)
            chosen.duplicate(torch.Generator().manual_seed(seed))
            return chosen.sources

        assert drawn(3) == drawn(3)
        assert any(drawn(3) != drawn(seed) for seed in range(4, 8))

    def test_copies_come_from_their_own_rank_if_drawn_there(self):
        # 2 ranks × 4 slots, one live and... both sources are needed: 0 lives on rank 0, 4 on rank 1
        for seed in range(20):
            chosen = selection([True, True, True, False, True, True, True, False], 4, rows_per_rank=16)
            chosen.duplicate(torch.Generator().manual_seed(seed))
            drawn = {chosen.sources[3], chosen.sources[7]}
            assert len(drawn) == 2
            homes = {source: chosen.rank_of(source) for source in drawn}
            if set(homes.values()) == {0, 1}:
                assert homes[chosen.sources[3]] == 0
                assert homes[chosen.sources[7]] == 1

    def test_copies_of_refilled_groups(self):
        chosen = selection([True, False, False])
        chosen.fill(1, [True], rows_per_rank=4)
        chosen.duplicate(torch.Generator().manual_seed(0))
        assert chosen.sources[:2] == [0, 1]
        assert chosen.sources[2] in {0, 1}


def test_rows_are_whole_groups_in_order():
    assert selection([True] * 3, num_generations=2).rows([2, 0, 0]) == [4, 5, 0, 1, 0, 1]


def test_rank_of_a_slot_is_that_of_its_first_row():
    # Groups of 4 over ranks of 6 rows: rows 0–5 and 6–11; the second group spans both
    assert [selection([True] * 3, 4, rows_per_rank=6).rank_of(slot) for slot in range(3)] == [0, 0, 1]
