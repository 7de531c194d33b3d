"""Rows by key: a slow twin that copies everything, and what keeping a moment and saving it cost."""

import copy
import math
import random
from collections import namedtuple

import pytest
import torch

from trl_ext.rollouts.ledger import FEW, SHARDS, Ledger, LedgerState
from trl_ext.trainers.seams.checkpoints import read_state


Pair = namedtuple("Pair", "first second")


def filled(count: int) -> Ledger:
    ledger = Ledger(Pair._make)
    for i in range(count):
        ledger[f"p{i}"] = Pair(float(i), 0.5)
    return ledger


def saved(state: LedgerState, tmp_path) -> LedgerState:
    torch.save({"rows": state}, tmp_path / "state.pt")
    return read_state(tmp_path / "state.pt")["rows"]


@pytest.mark.parametrize("seed", range(4))
def test_against_a_twin_that_copies_everything(seed, tmp_path):
    draw = random.Random(seed)
    ledger, twin, moments = Ledger(Pair._make), {}, []
    for _ in range(400):
        what = draw.random()
        if what < 0.7:
            for _ in range(draw.randrange(1, 60)):
                key = draw.choice([f"p{draw.randrange(300)}", draw.randrange(50), ("a", draw.randrange(9), None)])
                ledger[key] = twin[key] = Pair(draw.random(), draw.randrange(9))
        elif what < 0.8:
            moments.append((ledger.state(), dict(twin)))
        elif what < 0.85:
            limit = draw.random() / 8
            ledger.keep(lambda row, limit=limit: row.first >= limit)
            twin = {key: row for key, row in twin.items() if row.first >= limit}
        elif what < 0.95 and moments:
            state, then = draw.choice(moments)
            ledger.load(state if draw.random() < 0.7 else saved(state, tmp_path))
            twin = dict(then)
        elif moments:
            state, then = draw.choice(moments)
            assert saved(state, tmp_path) == then
        assert len(ledger) == len(twin)
    assert ledger == twin and set(ledger) == set(twin)
    assert all(isinstance(row, Pair) for row in ledger.values())
    for state, then in moments:
        assert state == then and len(state) == len(then)
        assert saved(state, tmp_path) == then


def test_numbers_and_keys_come_back_bit_for_bit(tmp_path):
    keys = ["", 'a "quoted"\nword', "ü", 7, 7.5, (), ("a", 3.0, None, True), (math.inf, "b")]
    numbers = [0.1, -0.0, 5e-324, 1e308, math.inf, 1 / 3, 2.0**53, -1e-9]
    ledger = Ledger(tuple)
    for key, number in zip(keys, numbers, strict=True):
        ledger[key] = (number, number / 7)
    again = Ledger(tuple)
    again.load(saved(ledger.state(), tmp_path))
    assert set(again) == set(keys)
    for key, number in zip(keys, numbers, strict=True):
        assert [x.hex() for x in again[key]] == [x.hex() for x in (number, number / 7)]


def test_nothing_is_known(tmp_path):
    ledger = Ledger(tuple)
    assert ledger.state() == {} and not ledger.state() and saved(ledger.state(), tmp_path) == {}
    assert ledger.get("a") is None and "a" not in ledger
    with pytest.raises(KeyError):
        ledger["a"]


def test_a_moment_shares_what_has_not_changed():
    ledger = filled(5000)
    state = ledger.state()
    assert copy.deepcopy({"rows": [state]})["rows"][0] is state
    ledger["p7"] = Pair(-1.0, -1.0)
    ledger["p7"] = Pair(-2.0, -1.0)
    copied = [one is not other for one, other in zip(state.shards, ledger.state().shards, strict=True)]
    assert sum(copied) == 1 and len(copied) == SHARDS
    assert state["p7"] == (7.0, 0.5) and ledger["p7"] == (-2.0, -1.0)


def test_a_second_save_encodes_what_changed(tmp_path):
    ledger = filled(5000)
    (first,) = ledger.state()._blocks()
    ledger["p7"] = Pair(-1.0, -1.0)
    state = ledger.state()
    same, second = state._blocks()
    assert same is first and len(second) < len(first) / 100
    assert saved(state, tmp_path) == dict(ledger)
    # Going back to where nothing has changed since keeps what is encoded
    ledger.load(state)
    assert ledger.state()._blocks()[0] is first


def test_what_is_out_of_date_is_dropped(tmp_path):
    ledger = filled(10)
    for i in range(3 * FEW):
        ledger["p3"] = Pair(float(i), 1.0)
        if i % 100 == 0:
            assert len(ledger.state()._blocks()) * 100 <= FEW + 200
    assert len(ledger.state().changes.keys) <= FEW + 20
    assert saved(ledger.state(), tmp_path) == dict(ledger)


def test_ledgers_that_loaded_the_same_state_are_independent(tmp_path):
    first, second = filled(10), Ledger(Pair._make)
    second.load(first.state())
    first["p1"], second["p2"] = Pair(1.0, 9.0), Pair(2.0, 9.0)
    for ledger, changed in ((first, "p1"), (second, "p2")):
        again = saved(ledger.state(), tmp_path)
        assert [key for key, row in again.items() if row[1] == 9.0] == [changed] and len(again) == 10
