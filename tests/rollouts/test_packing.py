"""
How rows are dealt to micro-batches and processes, against brute force and by hand.
"""

import random
from itertools import combinations, pairwise

import pytest

from trl_ext.rollouts.packing import FILLER, RowSizes, Width, deal, pack, step_slices


def sizes_of(prompt: list[int], completion: list[int], multiple: int = 1) -> RowSizes:
    padded = (-(-max(lengths) // multiple) * multiple for lengths in (prompt, completion))
    return RowSizes(prompt, completion, multiple, Width(*padded))


def orders(sizes: RowSizes, rows: list[int]) -> list[list[int]]:
    """By completion then prompt, and by both together."""
    return [
        sorted(rows, key=lambda row: (-sizes.completion[row], -sizes.prompt[row])),
        sorted(rows, key=lambda row: -sizes.completion[row] - sizes.prompt[row]),
    ]


def slots(sizes: RowSizes, rows: list[int]) -> int:
    """Rows times columns, written out."""
    longest = [max(lengths[row] for row in rows) for lengths in (sizes.prompt, sizes.completion)]
    needed = [max(longest[0], 1), max(longest[1], 2)]
    columns = [
        min(-(-n // sizes.multiple) * sizes.multiple, widest) for n, widest in zip(needed, sizes.widest, strict=True)
    ]
    return len(rows) * sum(columns)


def smallest_largest(sizes: RowSizes, order: list[int], micro_batches: int) -> int:
    """Of all ways to cut `order` into stretches, the largest stretch of the best."""
    best = None
    for count in range(min(micro_batches, len(order))):
        for inner in combinations(range(1, len(order)), count):
            largest = max(slots(sizes, order[a:b]) for a, b in pairwise([0, *inner, len(order)]))
            best = largest if best is None else min(best, largest)
    assert best is not None
    return best


def smallest_total(sizes: RowSizes, order: list[int], micro_batches: int, cap: int) -> float:
    """Tokens of the cheapest cut into stretches of at most `cap` tokens, by dynamic programming; infinite: none is."""
    cost = {(a, b): slots(sizes, order[a:b]) for b in range(len(order) + 1) for a in range(b)}
    best: list[float] = [0, *[float("inf")] * len(order)]
    for _ in range(micro_batches):
        best = [0] + [
            min([best[b], *(best[a] + cost[a, b] for a in range(b) if cost[a, b] <= cap)])
            for b in range(1, len(order) + 1)
        ]
    return best[-1]


def random_sizes(generator: random.Random, rows: int, longest: int = 40) -> RowSizes:
    prompt = [generator.randint(1, longest // 2) for _ in range(rows)]
    completion = [generator.choice([0, generator.randint(1, longest), longest]) for _ in range(rows)]
    return sizes_of(prompt, completion, generator.choice([1, 1, 4, 8]))


class TestPack:
    def test_every_row_once_in_as_many_micro_batches_as_there_are(self, subtests):
        for seed in range(40):
            with subtests.test(seed=seed):
                generator = random.Random(seed)
                sizes = random_sizes(generator, 24)
                rows = sorted(generator.sample(range(24), generator.randint(1, 24)))
                micro_batches = generator.randint(1, 8)
                packed = pack(sizes, rows, micro_batches)
                assert sorted(row for batch in packed for row in batch) == rows
                assert len(packed) == min(micro_batches, len(rows))
                assert all(packed)
                tokens = [slots(sizes, batch) for batch in packed]
                assert tokens == [sizes.tokens(batch) for batch in packed] == sorted(tokens, reverse=True)

    def test_nothing_to_pack(self):
        assert pack(sizes_of([1], [2]), [], 4) == []

    def test_the_largest_is_the_smallest_possible(self, subtests):
        for seed in range(40):
            with subtests.test(seed=seed):
                generator = random.Random(seed)
                sizes, micro_batches = random_sizes(generator, 8, longest=15), generator.randint(1, 4)
                packed = pack(sizes, list(range(8)), micro_batches)
                possible = {smallest_largest(sizes, order, micro_batches) for order in orders(sizes, list(range(8)))}
                assert slots(sizes, packed[0]) in possible

    def test_for_prompts_of_one_length_it_is_unique(self, subtests):
        for seed in range(20):
            with subtests.test(seed=seed):
                generator = random.Random(seed)
                sizes = sizes_of([5] * 8, [generator.randint(1, 30) for _ in range(8)])
                packed = pack(sizes, list(range(8)), 3)
                assert slots(sizes, packed[0]) == smallest_largest(sizes, orders(sizes, list(range(8)))[0], 3)

    def test_it_is_never_larger_than_trls(self, subtests):
        for seed in range(20):
            with subtests.test(seed=seed):
                generator = random.Random(seed)
                sizes = random_sizes(generator, 32)
                assert slots(sizes, pack(sizes, list(range(32)), 8)[0]) <= 4 * sizes.widest.total

    @pytest.mark.parametrize("multiple", [1, 16])
    def test_the_total_is_close_to_the_smallest(self, multiple):
        generator, found, smallest = random.Random(0), 0.0, 0.0
        for _ in range(10):
            prompt = [generator.randint(20, 60) for _ in range(32)]
            completion = [min(int(generator.lognormvariate(4, 1)) + 1, 400) for _ in range(32)]
            sizes, rows = sizes_of(prompt, completion, multiple), list(range(32))
            packed = pack(sizes, rows, 8)
            cap = slots(sizes, packed[0])
            total = sum(slots(sizes, batch) for batch in packed)
            least = min(smallest_total(sizes, order, 8, cap) for order in orders(sizes, rows))
            assert least <= total <= 1.15 * least
            found, smallest = found + total, smallest + least
        assert found <= 1.05 * smallest

    def test_by_hand(self):
        # One of 10 columns and six of 3 (prompts of 1): 10 | 3 3 3 | 3 3 3 has at most 10 tokens in each
        sizes = sizes_of([1] * 7, [2, 2, 2, 9, 2, 2, 2])
        assert [len(batch) for batch in pack(sizes, list(range(7)), 3)] == [1, 3, 3]
        assert pack(sizes, list(range(7)), 3)[0] == [3]

    def test_what_is_left_over_goes_where_it_saves_most(self):
        # 100 columns with the prompt in one; the others fit in one micro-batch (4 · 20), and best in 20 and 3 · 3
        sizes = sizes_of([1] * 5, [2, 99, 2, 19, 2])
        assert pack(sizes, list(range(5)), 3) == [[1], [3], [0, 2, 4]]

    def test_equal_rows_are_counted_out_evenly(self, subtests):
        for micro_batches in [1, 2, 4, 8]:
            with subtests.test(micro_batches=micro_batches):
                packed = pack(sizes_of([3] * 16, [9] * 16), list(range(16)), micro_batches)
                assert [len(batch) for batch in packed] == [16 // micro_batches] * micro_batches

    def test_prompts_count_too(self):
        # Two long prompts with short answers belong together, however their answers compare with the others'
        sizes = sizes_of([100, 1, 100, 1], [5, 6, 5, 7])
        assert sorted(map(sorted, pack(sizes, list(range(4)), 2))) == [[0, 2], [1, 3]]


class TestDeal:
    def test_all_ranks_work_on_equally_many_rows(self, subtests):
        for seed in range(60):
            with subtests.test(seed=seed):
                generator = random.Random(seed)
                ranks, micro_batches = generator.randint(1, 4), generator.randint(1, 5)
                sizes = random_sizes(generator, 30)
                rows = sorted(generator.sample(range(30), generator.randint(0, 30)))
                dealt = deal(sizes, rows, ranks, micro_batches)
                assert len(dealt) == ranks
                assert all(len(of_rank) == micro_batches for of_rank in dealt)
                for i in range(micro_batches):
                    assert len({len(of_rank[i]) for of_rank in dealt}) == 1
                    assert len(dealt[0][i]) >= 1
                flat = [row for of_rank in dealt for batch in of_rank for row in batch]
                assert sorted(row for row in flat if row != FILLER) == rows
                empty = sum(all(of_rank[i] == [FILLER] for of_rank in dealt) for i in range(micro_batches))
                assert 0 <= flat.count(FILLER) - empty * ranks < ranks
                assert empty == max(0, micro_batches - -(-len(rows) // ranks))

    def test_neighbours_in_length_go_to_different_ranks_in_turn(self):
        sizes = sizes_of([1] * 8, [9, 8, 7, 6, 5, 4, 3, 2])
        # Pairs of neighbours; who gets the longer one changes from pair to pair
        assert deal(sizes, list(range(8)), ranks=2, micro_batches=1) == [[[0, 3, 4, 7]], [[1, 2, 5, 6]]]

    def test_ranks_have_like_work(self):
        generator = random.Random(0)
        sizes = sizes_of([4] * 64, [generator.randint(1, 200) for _ in range(64)])
        dealt = deal(sizes, list(range(64)), ranks=4, micro_batches=4)
        tokens = [sum(slots(sizes, batch) for batch in of_rank) for of_rank in dealt]
        assert max(tokens) <= 1.1 * min(tokens)

    def test_rows_that_may_not_leave_their_rank(self):
        sizes = sizes_of([3, 3, 3, 3, 5], [9, 2, 7, 8, 6])
        dealt = deal(sizes, [0, 1, 2, 3, 4], ranks=2, micro_batches=2, homes=[0, 0, 0, 0, 1])
        assert sorted(row for batch in dealt[0] for row in batch) == [0, 1, 2, 3]
        assert sorted(row for batch in dealt[1] for row in batch) == [FILLER] * 3 + [4]
        assert [len(batch) for batch in dealt[0]] == [len(batch) for batch in dealt[1]]


class TestWindows:
    def test_by_hand(self, subtests):
        for arguments, expected in [
            # length, step, until_update, accumulation, iterations
            ((8, 0, 4, 4, 1), [(0, 4), (4, 8)]),
            ((8, 16, 4, 4, 1), [(0, 4), (4, 8)]),
            ((4, 0, 4, 4, 3), [(0, 4)]),
            ((1, 0, 1, 1, 1), [(0, 1)]),
            # Two generations to an update
            ((2, 0, 4, 4, 1), [(0, 2)]),
            ((2, 2, 2, 4, 1), [(0, 2)]),
            # Updates end at 4 | 8, 12: the first generation ends in the middle of the second update
            ((6, 0, 4, 4, 1), [(0, 4), (4, 6)]),
            ((6, 6, 2, 4, 1), [(0, 2), (2, 6)]),
            # Used twice, updates end at 4, 8, 12: 4, then 2, then the end of the batch
            ((6, 0, 4, 4, 2), [(0, 2), (2, 4), (4, 6)]),
            ((3, 0, 2, 2, 2), [(0, 1), (1, 2), (2, 3)]),
            # The last window of an epoch of five is one micro-batch
            ((5, 0, 2, 2, 1), [(0, 2), (2, 4), (4, 5)]),
            ((1, 4, 1, 2, 1), [(0, 1)]),
            # Generated anew after the third of eight micro-steps
            ((8, 3, 1, 4, 1), [(0, 4), (4, 8)]),
            ((8, 11, 4, 4, 1), [(0, 7), (7, 8)]),
        ]:
            with subtests.test(arguments=arguments, expected=expected):
                assert step_slices(*arguments) == expected

    def test_neighbours_share_a_window_if_they_share_all_their_updates(self, subtests):
        for seed in range(60):
            with subtests.test(seed=seed):
                generator = random.Random(seed)
                length, accumulation = generator.randint(1, 9), generator.randint(1, 6)
                iterations, until_update = generator.randint(1, 3), generator.randint(1, accumulation)
                step = length * iterations * generator.randint(0, 3)
                updates: list[list[int]] = [[] for _ in range(length)]  # of each micro-batch, one for each use
                for since in range(length * iterations):
                    update = 0 if since < until_update else 1 + (since - until_update) // accumulation
                    updates[since % length].append(update)
                cuts = [0, *(i for i in range(1, length) if updates[i] != updates[i - 1]), length]
                assert step_slices(length, step, until_update, accumulation, iterations) == list(pairwise(cuts))


class TestSizes:
    def test_at_least_one_column_of_prompt_and_two_of_completion(self):
        sizes = RowSizes([0, 0], [0, 1], 1, Width(9, 9))
        # TRL takes one column for one value per sequence
        assert sizes.width([0, 1]) == Width(1, 2)
        assert RowSizes([0], [0], 1, Width(1, 1)).width([0]) == Width(1, 1)

    def test_multiples_end_at_what_there_is(self):
        sizes = RowSizes([3, 9], [5, 17], 8, Width(16, 20))
        assert sizes.width([0]) == Width(8, 8)
        assert sizes.width([0, 1]) == Width(16, 20)  # 24, if there were that many
