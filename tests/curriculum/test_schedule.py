"""Curricula: choices by hand, and on real trainers with rewards that are known beforehand."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from comparing import equal
from datasets import Dataset

from trl_ext import GRPOTrainer, PPOTrainer
from trl_ext.curriculum.schedule import PRIOR_COMPLETIONS, DifficultyCurriculum


def rows(count: int, **columns: list[Any]) -> list[dict[str, Any]]:
    return [{"prompt": f"w{i}", **{name: values[i] for name, values in columns.items()}} for i in range(count)]


# Difficulty


def test_difficulty_starts_at_a_half_and_follows_failures():
    curriculum, row = DifficultyCurriculum(column="level", memory=1.0), {"prompt": "w1"}
    assert curriculum.difficulty(row) == 0.5
    curriculum.observe([row], torch.tensor([[0.0, 0.0, 1.0, float("nan")]]))
    assert curriculum.difficulty(row) == pytest.approx((PRIOR_COMPLETIONS * 0.5 + 2) / (PRIOR_COMPLETIONS + 3))
    assert curriculum.difficulty({"prompt": "w2"}) == 0.5


def test_earlier_evidence_fades():
    curriculum, row = DifficultyCurriculum(column="level", memory=0.5), {"prompt": "w1"}
    curriculum.observe([row], torch.zeros(1, 4))
    curriculum.observe([row], torch.ones(1, 4))
    assert curriculum.difficulty(row) == pytest.approx((PRIOR_COMPLETIONS * 0.5 + 2) / (PRIOR_COMPLETIONS + 6))


@pytest.mark.parametrize("column", ["level", None])
def test_what_nothing_scored_teaches_nothing(column):
    curriculum, row = DifficultyCurriculum(column=column), {"prompt": "w1"}
    curriculum.observe([row], torch.full((1, 4), float("nan")))
    assert curriculum.difficulty(row) == 0.5 and not curriculum.state_dict()["seen"]


def test_without_a_column_difficulty_is_predicted():
    """By hand, for groups of one: a + b = 2, of new prompts as of the uniform distribution."""
    curriculum, seen, new = DifficultyCurriculum(), {"prompt": "w1"}, {"prompt": "w2"}
    assert curriculum.difficulties([seen, new]) == [0.5, 0.5]
    curriculum.observe([seen], torch.zeros(1, 1))
    # Of all prompts, m = (0 + 4 · 1/2) / 5 = 2/5. The prompt itself failed once: p ~ Beta(4/5, 6/5 + 1)
    assert curriculum.difficulties([seen, new]) == pytest.approx([11 / 15, 3 / 5])
    curriculum.begin(None)
    # In the longest memory the failure is worth 0.99: m = 2 / 4.99, and Beta(2m, 2 (1 − m) + 1) holds with 0.99
    m = 2 / 4.99
    assert curriculum.difficulties([seen, new]) == pytest.approx([1 - (0.99 * 2 * m / 3 + 0.01 * m), 1 - m])


def test_a_prediction_is_by_what_is_read_of_prompts():
    def read(rows: Any, projection: Any) -> Any:
        return np.array([[float(row["prompt"] in ("a", "c"))] for row in rows], dtype=np.float16), len(rows)

    known: dict[str, DifficultyCurriculum] = {}
    for features in ("hidden_states", "none"):
        known[features] = DifficultyCurriculum(prompt_features=features)
        known[features].read_prompts(read)
        for _ in range(6):
            known[features].begin(None)
            outcomes = torch.tensor([[1.0] * 4, [1.0, 0.0, 0.0, 0.0]])
            known[features].observe([{"prompt": "a"}, {"prompt": "b"}], outcomes)
    new = [{"prompt": "c"}, {"prompt": "d"}]
    easy, hard = known["hidden_states"].difficulties(new)
    assert easy < 0.25 and hard > 0.6
    alike = known["none"].difficulties(new)
    assert alike[0] == alike[1]


def test_a_column_counts_by_its_rank():
    curriculum = DifficultyCurriculum(column="level")
    levels = [100, 1, 1, 10_000]
    curriculum.read_column(levels)
    found = [curriculum.prior(row) for row in rows(4, level=levels)]
    assert found == [0.625, 0.25, 0.25, 0.875]
    assert curriculum.prior({"prompt": "w1", "level": None}) == 0.5


def test_a_pass_rate_is_its_own_measure():
    curriculum = DifficultyCurriculum(column="pass_rate")
    curriculum.read_column([0.0, 0.9])
    assert curriculum.prior({"prompt": "w1", "pass_rate": 0.9}) == pytest.approx(0.1)


def test_with_a_minus_more_is_easier():
    curriculum = DifficultyCurriculum(column="-margin")
    assert curriculum.column == "margin"
    curriculum.read_column([100, 1, 1, 10_000])
    found = [curriculum.prior(row) for row in rows(4, margin=[100, 1, 1, 10_000])]
    assert found == [0.375, 0.75, 0.75, 0.125] == curriculum.priors([100, 1, 1, 10_000])
    assert curriculum.priors([5, None, 4]) == [0.25, 0.5, 0.75]


def test_pass_rates_know_their_direction_and_their_range():
    with pytest.raises(ValueError, match="a larger pass rate already means an easier row"):
        DifficultyCurriculum(column="-pass_rate")
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        DifficultyCurriculum(column="pass_rate").read_column([0.5, 50])


@pytest.mark.parametrize(("values", "told"), [(["a", 1], "finite"), ([1, float("inf")], "finite"), ([2, 2], "same")])
def test_a_column_that_says_nothing_is_refused(values, told):
    with pytest.raises(ValueError, match=told):
        DifficultyCurriculum(column="level").read_column(values)


# Choice


def with_levels(schedule: str, **settings: Any) -> tuple[DifficultyCurriculum, list[dict[str, Any]]]:
    """Eight rows, the hardest first."""
    curriculum = DifficultyCurriculum(schedule, column="level", **settings)
    curriculum.read_column(range(8))
    return curriculum, rows(8, level=list(range(7, -1, -1)))


@pytest.mark.parametrize(
    ("progress", "chosen"), [(0.0, [6, 7]), (0.25, [4, 5]), (0.5, [2, 3]), (0.8, [0, 1]), (1.0, [0, 1])]
)
def test_easy_to_hard_moves_a_window(progress, chosen):
    curriculum, candidates = with_levels("easy_to_hard", until=0.8)
    assert curriculum.choose(candidates, 2, progress) == chosen


def test_the_frontier_is_where_half_of_them_pass():
    curriculum, candidates = with_levels("frontier")
    assert curriculum.choose(candidates, 2, 0.0) == [3, 4]
    for row in (candidates[3], candidates[4]):
        curriculum.observe([row], torch.ones(1, 16))  # solved by now
    assert curriculum.choose(candidates, 2, 0.0) == [2, 5]


def test_a_mixture_keeps_what_is_dealt():
    curriculum, candidates = with_levels("mixed", share=0.5)
    assert curriculum.choose(candidates, 4, 0.0) == [0, 1, 3, 4]


@pytest.mark.parametrize("schedule", ["easy_to_hard", "frontier", "mixed"])
def test_as_many_as_wanted_each_once(schedule):
    curriculum = DifficultyCurriculum(schedule)
    rng = random.Random(0)
    for _ in range(50):
        candidates = rows(rng.randrange(1, 20))
        curriculum.observe(candidates, torch.tensor([[float(rng.random() < 0.5)] for _ in candidates]))
        count = rng.randrange(1, 12)
        chosen = curriculum.choose(candidates, count, rng.random())
        assert len(set(chosen)) == len(chosen) == min(count, len(candidates)) and chosen == sorted(chosen)
        assert set(chosen) <= set(range(len(candidates)))


# Orders of a whole data set

# Rows 1 and 4, and 2 and 3, are equally hard; 2 and 3 are nearest ½, and 0 is as far from it as 5
HARD = [0.0, 0.8, 0.6, 0.6, 0.8, 1.0]


def test_an_epoch_from_easy_to_hard():
    order = DifficultyCurriculum("easy_to_hard").epoch_order(HARD, seed=0, epoch=0)
    assert [HARD[i] for i in order] == sorted(HARD) and sorted(order) == list(range(6))


def test_an_epoch_from_the_frontier_on():
    order = DifficultyCurriculum("frontier").epoch_order(HARD, seed=0, epoch=0)
    assert [set(order[i : i + 2]) for i in (0, 2, 4)] == [{2, 3}, {1, 4}, {0, 5}]


@pytest.mark.parametrize(("share", "places"), [(0.5, [1, 3, 5]), (0.25, [3]), (0.9, [1, 2, 3, 4, 5])])
def test_an_epoch_of_both(share, places):
    """With a share of ½, every other row is the one nearest ½ of those that are left."""
    order = DifficultyCurriculum("mixed", share=share).epoch_order(HARD, seed=0, epoch=0)
    by_chance = DifficultyCurriculum("frontier").epoch_order([0.5] * 6, seed=0, epoch=0)  # all alike
    assert sorted(order) == list(range(6))
    for place, row in enumerate(order):
        left = order[place:]
        if place in places:
            assert abs(HARD[row] - 0.5) == min(abs(HARD[i] - 0.5) for i in left)
        else:
            assert row == next(i for i in by_chance if i in left)


@pytest.mark.parametrize("schedule", ["easy_to_hard", "frontier", "mixed"])
def test_ties_are_shuffled_by_seed_and_epoch_and_nothing_else(schedule):
    curriculum, same = DifficultyCurriculum(schedule), [0.7] * 50
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = curriculum.epoch_order(same, seed=3, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert curriculum.epoch_order(same, seed=3, epoch=0) == first
    others = curriculum.epoch_order(same, 4, 0), curriculum.epoch_order(same, 3, 1)
    assert all(other != first and sorted(other) == list(range(50)) for other in others)


@pytest.mark.parametrize(("progress", "length"), [(0.0, 8), (0.4, 36), (0.8, 64), (1.0, 64)])
def test_completions_grow(progress, length):
    assert DifficultyCurriculum(start_completion_length=8).completion_length(64, progress) == length
    assert DifficultyCurriculum().completion_length(64, progress) == 64


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "hard"},
        {"lookahead": 1},
        {"until": 0.0},
        {"share": 1.0},
        {"memory": 1.5},
        {"memory": 0.9},  # without a column
        {"prompt_features": "words"},
        {"start_completion_length": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        DifficultyCurriculum(**settings)


# On trainers


@dataclass
class Judge:
    """1 for `easy` of the 4 completions of a prompt; what it was asked, in order."""

    asked: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    __name__ = "judge"

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], easy: list[int], **kwargs: Any) -> Any:
        self.asked += prompts
        self.lengths.append(max(map(len, completion_ids)))
        return [float(i % 4 < right) for i, right in enumerate(easy)]


def data(count: int = 32) -> Dataset:
    """Prompts that are solved by 0, 1, 2, 3, 4 of 4 completions, in turn; of some, a column says something else."""
    known = tiny.prompts(count).add_column("easy", [i % 5 for i in range(count)])
    return known.add_column("unknown", [None] * (count - 2) + [1, 2])


def trained(tmp_path: Any, curriculum: Any, trainer_class: Any = GRPOTrainer, **settings: Any) -> tuple[Any, Judge]:
    judge = Judge()
    trainer = tiny.trainer(
        trainer_class,
        tmp_path,
        judge,
        {"train_dataset": data(), "curriculum": curriculum},
        **{"max_steps": 6, "gradient_accumulation_steps": 2, **settings},
    )
    trainer.train(resume_from_checkpoint=settings.pop("resume", None))
    return trainer, judge


@pytest.mark.train
@pytest.mark.parametrize("column", ["level", "-easy"])
def test_easy_prompts_come_before_hard_ones(column, tmp_path):
    dataset_levels = [-(i % 5) for i in range(32)]  # more is harder
    judge = Judge()
    trainer = tiny.trainer(
        GRPOTrainer,
        tmp_path,
        judge,
        {
            "train_dataset": data().add_column("level", dataset_levels),
            "curriculum": DifficultyCurriculum("easy_to_hard", column, memory=0.0, until=1.0),
        },
        max_steps=6,
    )
    trainer.train()
    logged = [e["curriculum/difficulty"] for e in trainer.state.log_history if "curriculum/difficulty" in e]
    assert len(logged) == 6 and logged[0] < 0.3 and logged[-1] > 0.55 and logged == sorted(logged)
    solved = [e["reward"] for e in trainer.state.log_history if "reward" in e]
    assert sum(solved[:2]) > sum(solved[-2:]) + 0.5


@pytest.mark.train
@pytest.mark.parametrize("selection", ["all", "refill", "duplicate"])
def test_pass_rates_follow_the_rollouts(selection, tmp_path):
    curriculum = DifficultyCurriculum("frontier", column="unknown", memory=1.0)
    trainer, judge = trained(tmp_path, curriculum, rollout_selection=selection)
    right = {row["prompt"]: row["easy"] for row in data()}
    seen = set(judge.asked)
    assert len(trainer.chooser.state_dict()["seen"]) == len(seen) > 8
    assert not curriculum.state_dict()["seen"]  # what the user passed stays as it was
    for prompt in seen:
        times = judge.asked.count(prompt)
        failed = times * (1 - right[prompt] / 4)
        assert trainer.chooser.difficulty({"prompt": prompt}) == pytest.approx(
            (PRIOR_COMPLETIONS * 0.5 + failed) / (PRIOR_COMPLETIONS + times)
        )


@pytest.mark.train
def test_ppo_learns_pass_rates_from_single_completions(tmp_path):
    trainer, judge = trained(tmp_path, DifficultyCurriculum("mixed"), PPOTrainer, num_generations=1, num_iterations=1)
    for outlook in trainer.chooser.state_dict()["outlook"]["outlooks"]:
        assert len(outlook["prompts"]) == len(set(judge.asked)) > 16
    logged = trainer.state.log_history[0]
    assert {"curriculum/prompts_replaced", "selection/calibration_error"} <= set(logged)
    assert logged["compute/prediction_tokens"] > 0


# Prompts that begin with w1 are never solved; of the completions for others, half pass
TOLD = Dataset.from_dict(
    {
        "prompt": [f"w{i % 2} {tiny.WORDS[2 + i % 18]} {tiny.WORDS[2 + i // 18]}" for i in range(300)],
        "easy": [0 if i % 2 else 2 for i in range(300)],
    }
)


@pytest.mark.train
def test_unseen_prompts_at_the_frontier_are_found_by_hidden_states(tmp_path):
    hopeless, tokens = {}, {}
    for features in ("hidden_states", "none"):
        judge = Judge()
        trainer = tiny.trainer(
            GRPOTrainer,
            tmp_path,
            judge,
            {"train_dataset": TOLD, "curriculum": DifficultyCurriculum(prompt_features=features)},
            max_steps=12,
        )
        trainer.train()
        late = judge.asked[len(judge.asked) // 2 :: 4]
        unseen = [prompt for prompt in late if prompt not in judge.asked[: len(judge.asked) // 2]]
        assert len(unseen) == len(late) == 24
        hopeless[features] = sum(prompt.startswith("w1") for prompt in unseen)
        tokens[features] = trainer.state.log_history[-2].get("compute/prediction_tokens")
    assert hopeless["hidden_states"] <= 4
    assert hopeless["none"] >= 8
    # Of 12 × 16 candidates, those that come a second time aren't read again
    assert tokens["none"] is None and 3 * 12 * 12 < tokens["hidden_states"] < 3 * 12 * 16


@pytest.mark.train
def test_completions_get_longer_over_the_run(tmp_path):
    trainer, judge = trained(tmp_path, DifficultyCurriculum(start_completion_length=1, until=1.0), max_steps=6)
    assert judge.lengths[0] == 1 and judge.lengths == sorted(judge.lengths) and judge.lengths[-1] >= 5
    assert trainer.generation_config.max_new_tokens == trainer.max_completion_length == 6


@pytest.mark.train
def test_a_resumed_run_sees_what_the_other_saw(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole, judge = trained(tmp_path / "a", DifficultyCurriculum("frontier"), **settings)
    again = Judge()
    resumed = tiny.trainer(
        GRPOTrainer,
        tmp_path / "b",
        again,
        {"train_dataset": data(), "curriculum": DifficultyCurriculum("frontier")},
        max_steps=6,
        **settings,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.asked == judge.asked[len(judge.asked) // 2 :]
    assert equal(resumed.chooser.state_dict(), whole.chooser.state_dict())
    for ours, theirs in zip(tiny.weights(resumed.model).values(), tiny.weights(whole.model).values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("curriculum", "settings", "dataset", "told"),
    [
        (DifficultyCurriculum(column="level"), {}, data(), "level"),
        (DifficultyCurriculum(column="easy"), {"remove_unused_columns": True}, data(), "remove_unused_columns"),
        (DifficultyCurriculum(), {}, data().to_iterable_dataset(), "streamed"),
        (
            DifficultyCurriculum(),
            {"rollout_selection": "refill", "refill_draws": "informed"},
            data(),
            "informed",
        ),
    ],
    ids=["column", "dropped", "streamed", "informed"],
)
def test_what_a_curriculum_cannot_work_with(curriculum, settings, dataset, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        tiny.trainer(GRPOTrainer, tmp_path, Judge(), {"train_dataset": dataset, "curriculum": curriculum}, **settings)


@pytest.mark.parametrize("curriculum", ["frontier", DifficultyCurriculum])
def test_a_curriculum_is_an_object(curriculum, tmp_path):
    with pytest.raises(TypeError, match=r"is not a prompt chooser. Pass a DifficultyCurriculum\(\.\.\.\)"):
        tiny.trainer(GRPOTrainer, tmp_path, Judge(), {"train_dataset": data(), "curriculum": curriculum})


@pytest.mark.train
def test_refill_looks_as_far_ahead_as_the_curriculum_says(tmp_path):
    curriculum = DifficultyCurriculum("frontier", lookahead=3)
    trainer = tiny.trainer(
        GRPOTrainer,
        tmp_path,
        Judge(),
        {"train_dataset": data(), "curriculum": curriculum},
        rollout_selection="refill",
        max_steps=2,
    )
    stream, looked = trainer.prompt_stream, []

    def draw(count, exclude, choose=None, lookahead=None):
        looked.append((choose is not None, lookahead))
        return type(stream).draw(stream, count, exclude, choose, lookahead)

    stream.draw = draw
    trainer.train()
    assert {lookahead for chooses, lookahead in looked if chooses} == {3}


def test_it_tells_its_settings():
    curriculum = DifficultyCurriculum("mixed", column="-margin", share=0.25)
    assert eval(repr(curriculum)).__dict__ == curriculum.__dict__
