"""Rows with the same prompt meet in a micro-batch."""

import random
from dataclasses import replace

from trl_ext.rollouts.packing import FILLER, RowSizes, Width, deal
from trl_ext.rollouts.prefix_trees import Cost
from trl_ext.rollouts.tree_packing import TreeSizes, deal_trees, fewest_bins


def sizes_of(prompts: list[int], completions: list[int], group: int, pair: float = 0.0) -> TreeSizes:
    """Rows in groups of `group`, with the same prompt in each."""
    widest = Width(max(prompts), max(completions))
    rows = RowSizes([prompts[i // group] for i in range(len(completions))], completions, 1, widest)
    return TreeSizes(rows, [i // group for i in range(len(completions))], Cost(pair), fewest=2)


def test_tokens_by_hand():
    sizes = sizes_of([10, 20], [1, 2, 3, 4], 2)
    assert sizes.tokens([0, 1]) == 10 + (1 + 1) + (2 + 1)
    assert sizes.shared([0, 1, 2, 3]) == (15.0 + 29.0, 15 + 29)
    assert sizes.unshared([0, 1, 2, 3]) == 4 * (20 + 4)
    assert sizes.tokens([1]) == 10 + 2  # alone, it repeats nothing


def test_a_prompt_too_short_to_share_is_computed_each_time():
    sizes = replace(sizes_of([7, 8], [1, 2, 3, 4], 2), fewest=8)
    assert sizes.tokens([0, 1]) == 2 * 7 + 1 + 2
    assert sizes.tokens([2, 3]) == 8 + (3 + 1) + (4 + 1)


def test_groups_stay_whole_where_they_fit():
    sizes = sizes_of([100] * 4, [10] * 16, 4)
    bins = fewest_bins(sizes, list(range(16)), cap=150, at_most=16)
    assert sorted(map(sorted, bins)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_group_that_is_too_large_is_split_evenly():
    sizes = sizes_of([100], [10] * 8, 8)
    bins = fewest_bins(sizes, list(range(8)), cap=100 + 4 * 11, at_most=8)
    assert sorted(map(len, bins)) == [4, 4]


def test_one_long_row_leaves_the_others_together():
    sizes = sizes_of([100], [70, *[10] * 5], 6)
    assert fewest_bins(sizes, list(range(6)), cap=170, at_most=6) == [[0], [1, 2, 3, 4, 5]]


def test_rows_of_a_prompt_meet_where_micro_batches_have_one_row():
    """Those that are together no longer than the longest row, here of 20 + 9 tokens."""
    sizes = sizes_of([20, 15], [9, 3, 3, 2, 9, 4, 4, 4], 4)
    dealt = deal(sizes.rows, list(range(8)), 1, 8)
    assert all(len(batch) == 1 for batch in dealt[0])
    (found,) = deal_trees(sizes, list(range(8)), 1, 8, dealt)
    # 20 + 3 + 2 and 15 + 4 + 4, and two repeated tokens each
    assert sorted(map(sorted, found)) == [[FILLER], [FILLER], [0], [1, 3], [2], [4], [5, 7], [6]]


def test_rows_as_long_as_the_longest_stay_alone():
    """Two of them would take more memory than a micro-batch of one row."""
    sizes = sizes_of([20], [9] * 4, 4)
    assert deal_trees(sizes, list(range(4)), 1, 4, deal(sizes.rows, list(range(4)), 1, 4)) is None


def test_two_small_groups_share_a_bin():
    sizes = sizes_of([10] * 4, [4] * 8, 2)
    assert [len(rows) for rows in fewest_bins(sizes, list(range(8)), cap=40, at_most=8)] == [4, 4]


def test_nothing_is_changed_where_sharing_saves_little():
    sizes = sizes_of([1] * 4, [50] * 8, 2)
    dealt = deal(sizes.rows, list(range(8)), 1, 4)
    assert deal_trees(sizes, list(range(8)), 1, 4, dealt) is None


def test_random_cases(subtests):
    """Every row once, the same number of rows on all ranks, no micro-batch larger than without sharing."""
    generator = random.Random(0)
    used = 0
    for trial in range(60):
        with subtests.test(trial=trial):
            ranks, micro_batches, group = generator.choice([(1, 8, 4), (2, 4, 4), (3, 4, 6), (2, 8, 8)])
            groups = ranks * micro_batches * generator.choice([1, 2, 4]) // group + 1
            sizes = sizes_of(
                [generator.randint(1, 60) for _ in range(groups)],
                [generator.randint(0, 40) for _ in range(groups * group)],
                group,
                generator.choice([0.0, 0.001, 0.01]),
            )
            alive = [row for row in range(groups * group) if generator.random() < 0.8]
            dealt = deal(sizes.rows, alive, ranks, micro_batches)
            trees = deal_trees(sizes, alive, ranks, micro_batches, dealt)
            if trees is None:
                continue
            used += 1
            found = [[[row for row in batch if row != FILLER] for batch in of_rank] for of_rank in trees]
            assert sorted(row for of_rank in found for batch in of_rank for row in batch) == alive
            assert all(len(of_rank) == micro_batches for of_rank in trees)
            for batches in zip(*trees, strict=True):
                assert len(set(map(len, batches))) == 1 and batches[0]
            real = [[row for row in batch if row != FILLER] for of_rank in dealt for batch in of_rank]
            largest = max(sizes.rows.tokens(batch) for batch in real if batch)
            for batch in (batch for of_rank in found for batch in of_rank if len(batch) > 1):
                assert sizes.shared(batch)[1] <= largest
    assert used > 10
