"""What a run is measured by."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from trl_ext.evaluation.credit import TokenCredit
from trl_ext.run import measuring
from trl_ext.run.arguments import DPOArguments, PolicyArguments


@dataclass
class PairTrainer:
    """A finished trainer of pairs."""

    eval_dataset: Any
    state: Any = field(
        default_factory=lambda: SimpleNamespace(log_history=[{"step": 3, "eval_rewards/accuracies": 0.75}])
    )


def test_prompts_at_once_fill_a_generation_batch():
    args = SimpleNamespace(generation_batch_size=32)
    assert [measuring.prompts_at_once(args, samples) for samples in (1, 8, 12, 64)] == [32, 4, 2, 1]


def test_held_out_rows_are_a_seeded_choice(capsys):
    rows = {"test": tiny.prompts(20)}
    chosen = [
        measuring.held_out_rows(rows, PolicyArguments(held_out_prompts=5, held_out_seed=seed)) for seed in (0, 0, 1)
    ]
    assert chosen[0]["prompt"] == chosen[1]["prompt"] != chosen[2]["prompt"]
    assert len(set(chosen[0]["prompt"])) == 5
    assert measuring.held_out_rows(rows, PolicyArguments(held_out_prompts=0)) is None
    assert measuring.held_out_rows(rows, PolicyArguments(dataset_test_split="dev")) is None
    assert "no split 'dev' (--dataset_test_split), only test" in capsys.readouterr().out


def test_pairs_count_where_their_number_is_known():
    measured = measuring.pair_accuracy(PairTrainer(tiny.prompts(20)))
    assert measured[3]["pair_accuracy"].mean == pytest.approx(0.75)
    assert measuring.pair_accuracy(PairTrainer(tiny.prompts(20).to_iterable_dataset())) == {}
    assert measuring.pair_accuracy(PairTrainer(None)) == {}


def test_nothing_is_sampled_without_a_split_nor_credited_without_a_critic():
    assert measuring.score_completions(object(), DPOArguments(), {}) == {}
    assert measuring.token_credits(object(), {}, PolicyArguments()) == []


def test_the_best_and_the_worst_of_the_longer_half_are_shown(monkeypatch):
    scores = {1: 9.0, 2: -9.0, 3: 1.0, 5: 0.5, 4: 2.0}  # by length
    credits = [TokenCredit("w1", ["w2"] * n, [0.0] * n, [0.0] * n, None, score) for n, score in scores.items()]
    asked: list[Any] = []
    monkeypatch.setattr(measuring, "credit_by_token", lambda *given: asked.append(given) or credits)
    trainer = SimpleNamespace(critic="any")
    shown = measuring.token_credits(trainer, {"train": None, "test": tiny.prompts(40)}, PolicyArguments())
    assert [(len(credit.tokens), credit.score) for credit in shown] == [(4, 2.0), (5, 0.5)]
    ((_, rows, seed),) = asked
    assert (len(rows), len({row["prompt"] for row in rows}), seed) == (32, 32, 0)
