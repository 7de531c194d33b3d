"""Rollouts that travel to the ranks that train on them, on one rank and between several, which are threads here."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from trl_ext.rollouts import exchange
from trl_ext.rollouts.exchange import RolloutExchange, RowKey
from trl_ext.rollouts.rollout import Rollout, ScoredRound


def scored(count: int, start: int) -> ScoredRound:
    rollouts = [
        Rollout({}, "", [], [start + i], None, "", None, None, None)  # told apart by their completion
        for i in range(count)
    ]
    return ScoredRound(rollouts, torch.zeros(count, 1))


class Meeting:
    """`gather_object` between threads: every rank gives its list and gets all of them, in the order of ranks."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks)
        self.given: dict[int, list[Any]] = {}
        self.rank = threading.local()

    def __call__(self, objects: list[Any]) -> list[Any]:
        self.given[self.rank.index] = objects
        self.barrier.wait(timeout=10)
        return [each for rank in sorted(self.given) for each in self.given[rank]]


def fetch_on(ranks: int, sizes: list[int], rows: list[RowKey], monkeypatch: Any) -> tuple[list[Any], Meeting]:
    """What each rank fetches of rounds with so many rows a rank; row r of round n has the completion `100 · n + r`."""
    meeting = Meeting(ranks)
    monkeypatch.setattr(exchange, "gather_object", meeting)

    def fetch(rank: int) -> list[int]:
        meeting.rank.index = rank
        rounds = [scored(size, 100 * number + rank * size) for number, size in enumerate(sizes)]
        return [rollout.completion_ids[0] for rollout in RolloutExchange(rounds, rank, ranks).fetch(rows)]

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(fetch, range(ranks))), meeting


def test_one_process_fetches_its_own_rows(monkeypatch):
    fetched, meeting = fetch_on(1, [4, 2], [(0, 3), (1, 0), (1, 1), (0, 0)], monkeypatch)
    assert fetched == [[3, 100, 101, 0]]
    assert not meeting.given


def test_rows_go_to_the_rank_whose_place_they_take(monkeypatch):
    # Rank 0 has rows 0 and 1 of both rounds, rank 1 has rows 2 and 3
    fetched, meeting = fetch_on(2, [2, 2], [(0, 0), (1, 3), (0, 2), (0, 1)], monkeypatch)
    assert fetched == [[0, 103], [2, 1]]
    # Only what a rank needs and doesn't have travels, from its owner
    assert [[key for key, _ in meeting.given[rank]] for rank in (0, 1)] == [[(0, 1)], [(1, 3)]]


def test_a_row_that_many_need_travels_once(monkeypatch):
    fetched, meeting = fetch_on(2, [2], [(0, 3), (0, 3), (0, 3), (0, 0)], monkeypatch)
    assert fetched == [[3, 3], [3, 0]]
    assert [len(meeting.given[rank]) for rank in (0, 1)] == [1, 1]


def test_where_all_rows_stay_nothing_is_gathered(monkeypatch):
    fetched, meeting = fetch_on(2, [2, 2], [(1, 1), (0, 0), (0, 3), (1, 2)], monkeypatch)
    assert fetched == [[101, 0], [3, 102]]
    assert not meeting.given


@pytest.mark.parametrize("ranks", [2, 3])
def test_whatever_was_chosen_arrives_in_order(ranks, monkeypatch, subtests):
    for seed in range(20):
        with subtests.test(seed=seed):
            generator = random.Random(seed)
            sizes = [generator.randint(1, 4) for _ in range(generator.randint(1, 3))]
            rounds = [generator.randrange(len(sizes)) for _ in range(2 * ranks)]
            rows = [(number, generator.randrange(sizes[number] * ranks)) for number in rounds]
            fetched, _ = fetch_on(ranks, sizes, rows, monkeypatch)
            assert [ids for of_rank in fetched for ids in of_rank] == [100 * number + row for number, row in rows]
