import math
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest

from trl_ext.evaluation.batches import BatchesOfProcess, evaluation_rounds, weighted_mean


SIZES = [
    (groups, processes, each, together)
    for groups, processes, each, together in product((1, 2, 5, 9, 16), (2, 3, 4), (1, 2, 4), (1, 2, 3))
    if processes * each % together == 0
]


@pytest.mark.parametrize(("groups", "processes", "batch_size", "together"), SIZES)
def test_no_row_counts_more_than_another(groups, processes, batch_size, together):
    order = [row for row in reversed(range(groups)) for _ in range(together)]
    rounds = evaluation_rounds(order, processes, batch_size, together)
    weights: Counter[int] = Counter()
    for round_ in rounds:
        parts = [round_.of_process(i, processes) for i in range(processes)]
        assert len({len(part) for part in parts}) == 1 and 0 < len(parts[0]) <= batch_size
        gathered = [row for part in parts for row in part]
        for start in range(0, len(gathered), together):  # groups are as TRL cuts them
            assert len(set(gathered[start : start + together])) == 1
        assert set(gathered) == set(gathered[: round_.distinct])
        weights.update({row: Fraction(n, round_.copies) for row, n in Counter(gathered).items()})
    assert weights == dict.fromkeys(range(groups), together)
    assert sum(round_.distinct for round_ in rounds) == len(order)


def test_rows_keep_their_order_and_full_rounds_come_first():
    rounds = evaluation_rounds(range(11), processes=2, batch_size=2)
    assert [(round_.rows, round_.copies) for round_ in rounds] == [
        ([0, 1, 2, 3], 1),
        ([4, 5, 6, 7], 1),
        ([8, 9], 1),
        ([10, 10], 2),
    ]
    sampler = BatchesOfProcess(rounds, index=1, processes=2)
    assert list(sampler) == list(sampler) == [[2, 3], [6, 7], [9], [10]] and len(sampler) == 4


def test_a_weighted_mean_leaves_out_what_is_not_a_number():
    assert weighted_mean([1.0, math.nan, 4.0], [1.0, 5.0, 2.0]) == 3.0
    assert weighted_mean([math.nan], [1.0]) is None and weighted_mean([3.0], [0.0]) is None
    assert weighted_mean([2**60 + 1, 2**60 + 1], [0.1, 0.7]) == 2**60 + 1  # a count isn't rounded
