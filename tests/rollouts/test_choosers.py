"""The two protocols that trainers call: a chooser or observer of a user's own is one class, and nothing else."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch

from trl_ext import DAPOTrainer, GRPOTrainer
from trl_ext.rollouts.choosers import PromptChooser, RolloutObserver


class Latest(PromptChooser):
    """Chooses the last of its candidates, and counts what it sees."""

    key = "latest"
    lookahead = 2

    def __init__(self) -> None:
        self.chosen: list[str] = []
        self.rounds: list[tuple[int, int, int]] = []  # rows, groups and live groups of each round

    def choose(self, rows: Sequence[dict[str, Any]], count: int, progress: float = 0.0, dealt: int = 0) -> list[int]:
        places = list(range(len(rows)))[-count:]
        self.chosen += [rows[i]["prompt"] for i in places]
        return places

    def observe(self, rows: Sequence[dict[str, Any]], outcomes: torch.Tensor, live: list[bool]) -> None:
        self.rounds.append((len(rows), len(outcomes), sum(live)))

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": list(self.chosen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chosen = list(state["chosen"])


@pytest.mark.train
def test_a_new_chooser_is_one_class(tmp_path):
    chooser = Latest()
    reward = tiny.Remembering(tiny.first_token_even)
    trainer = tiny.trainer(GRPOTrainer, tmp_path, reward, {"curriculum": chooser})
    trainer.train()
    asked = [call.prompts[::4] for call in reward.calls]
    assert sorted(functools.reduce(operator.iadd, asked, [])) == sorted(chooser.chosen) and len(chooser.chosen) == 8
    assert [(rows, groups) for rows, groups, _ in chooser.rounds] == [(4, 4), (4, 4)]
    assert 0 < sum(live for _, _, live in chooser.rounds) < 8
    state = trainer.run_state()["latest"]
    chooser.chosen.append("later")
    assert len(state["chosen"]) == 8
    trainer.load_run_state(trainer.run_state() | {"latest": state})
    assert len(chooser.chosen) == 8


def test_a_chooser_is_asked_for_every_round(tmp_path):
    chooser = Latest()
    reward = tiny.Remembering(tiny.LiveFor({4, 5, 6}))
    trainer = tiny.trainer(DAPOTrainer, tmp_path, reward, {"curriculum": chooser}, max_steps=1)
    trainer.train()
    assert len(reward.calls) == len(chooser.rounds) > 1
    assert chooser.chosen == [prompt for call in reward.calls for prompt in call.prompts[::4]]


class Counting(RolloutObserver):
    key = "counting"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def begin(self, trainer: Any) -> None:
        self.seen.append("begin")

    def observe(self, rows: Sequence[dict[str, Any]], outcomes: torch.Tensor, live: list[bool]) -> None:
        self.seen.append(f"{len(outcomes)} groups")

    def end(self, trainer: Any, batch: Any) -> None:
        self.seen.append("end")
        trainer.train_metrics["counting/rows"].append(len(batch.rows))


@pytest.mark.train
@pytest.mark.parametrize("selection", ["all", "duplicate"])
def test_observers_see_training_and_nothing_else(tmp_path, selection):
    observer = Counting()
    trainer = tiny.trainer(
        GRPOTrainer, tmp_path, arguments={"eval_dataset": tiny.prompts(4)}, rollout_selection=selection
    )
    trainer.add_observer(observer)
    with pytest.raises(ValueError, match="an observer with the key 'counting' already"):
        trainer.add_observer(Counting())
    trainer.evaluate()
    assert observer.seen == []
    trainer.train()
    middle = ["end", "4 groups"] if selection == "all" else ["4 groups", "end"]
    assert observer.seen == ["begin", *middle] * 2
    assert [entry["counting/rows"] for entry in tiny.history(trainer)] == [16, 16]


def test_the_blind_chooser_takes_what_is_dealt():
    rows = [{"prompt": str(i)} for i in range(6)]
    assert PromptChooser().choose(rows, 4) == [0, 1, 2, 3]
    assert PromptChooser().choose(rows[:2], 4) == [0, 1]
    assert (PromptChooser().lookahead, PromptChooser().needs_rows, PromptChooser().key) == (1, False, "")
    assert PromptChooser().completion_length(20, 0.1) == 20
