"""What the studies on learning ask, and how they judge it."""

import math
import random

import numpy as np
import pytest
from automaton import LETTERS, NOISE, TRANSITIONS, AutomatonTask, draw, walk
from learning import METHODS, STUDIES, TASKS, WITHOUT
from learning_report import COLOURS, level, markdown, plot, reached, table, target_markdown, target_table
from learning_runs import workers

from trl_ext import PPOConfig


def test_states_are_those_after_each_letter():
    assert {letter: len(after) for letter, after in TRANSITIONS.items()} == dict.fromkeys(LETTERS, 10)
    states = walk("4", "DPA", {}, random.Random(0))
    assert states[0] == TRANSITIONS["D"][4]
    assert states[1] == TRANSITIONS["P"][int(states[0])]
    assert states[2] == TRANSITIONS["A"][int(states[1])]


@pytest.fixture(scope="module")
def task():
    return AutomatonTask(seed=3, train_size=300, test_size=100)


def test_words_look_alike_and_answers_end(task):
    for row in [*task.data["train"], *task.data["test"]]:
        state, word = row["prompt"][1], row["prompt"][2:-1]
        assert (row["prompt"][0], len(word), len(set(word)), row["prompt"][-1]) == ("r", 6, 3, "=")
        assert row["answer"] == walk(state, word, {}, random.Random(0))
        assert row["answer_ids"] == [*(4 + int(digit) for digit in row["answer"]), task.tokenizer.eos_token_id]
        assert task.tokenizer.unk_token_id not in task.tokenizer(row["prompt"])["input_ids"]


def test_words_that_are_held_out_are_not_shown(task, monkeypatch):
    assert len(set(task.data["test"]["prompt"])) == len(task.held_out) == 100
    assert AutomatonTask(seed=3, train_size=1, test_size=50).data["test"]["prompt"] == task.data["test"]["prompt"][:50]
    # They would hardly ever be drawn again; so the next ones to be drawn are held out
    monkeypatch.setattr(task, "held_out", {draw(rng) for rng in [random.Random(7)] for _ in range(50)})
    monkeypatch.setattr(task, "rng", random.Random(7))
    assert not task.held_out & set(task.others(10))


def test_demonstrations_are_as_often_wrong_as_they_are_said_to_be(task):
    shown = task.demonstrations(4000)
    # A tenth of the random states is right
    wrong = {letter: [] for letter in LETTERS}
    for asked, states in zip(shown["prompt"], shown["completion"], strict=True):
        for letter, before, after in zip(asked[2:-1], asked[1] + states, states, strict=False):
            wrong[letter].append(TRANSITIONS[letter][int(before)] != after)
    found = {letter: float(np.mean(each)) for letter, each in wrong.items()}
    assert found == pytest.approx({letter: 0.9 * NOISE.get(letter, 0.0) for letter in LETTERS}, abs=0.06)


def test_studies_name_what_there_is():
    for study in STUDIES.values():
        assert {*study.methods} <= METHODS.keys() & COLOURS.keys()
        assert {*study.tasks} <= TASKS.keys()


def test_each_part_of_vapo_is_left_out_and_nothing_else(tmp_path):
    """Without all of them, it is PPO with a critic of VAPO's kind, but for its loss, a mean over completions."""

    def settings_of(method):
        _, config_class, settings = METHODS[method]
        task = {"steps_per_generation": 4, "max_steps": 100, "per_device_train_batch_size": 64, "use_cpu": True}
        return config_class(output_dir=str(tmp_path), bf16=False, **task | settings).to_dict()

    whole, ppo = settings_of("VAPO"), settings_of("none of them: PPO")
    follows = {"token_normalization", "num_generations_eval"}  # what is not set
    differ = {
        name: {key for key in whole if settings_of(f"no {name}")[key] != whole[key]} - follows for name in WITHOUT
    }
    assert {name: len(keys) for name, keys in differ.items()} == dict.fromkeys(WITHOUT, 1)
    usual = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).to_dict()
    for keys in differ.values():
        for key in keys - {"loss_type"}:
            assert ppo[key] == usual[key] != whole[key], key


@pytest.mark.distributed
def test_runs_side_by_side_keep_their_places():
    with workers(2) as do:
        assert dict(do(math.sqrt, [(1.0,), (4.0,), (9.0,)])) == {0: 1.0, 1: 2.0, 2: 3.0}


def curve(values, distance=10.0):
    """Points of a run at even distances, a tenth of a second a token."""
    return [
        {"steps": i, "tokens": distance * i, "cpu": i, "pass@1": value, "pass@8": value}
        for i, value in enumerate(values)
    ]


def test_level_is_the_mean_of_the_last_fifth():
    points = curve([0.0] * 8 + [0.4, 0.6, 0.8, 1.0])
    assert level(points, "pass@1", 100) == pytest.approx(0.6)
    assert level(curve([0.0, 1.0], distance=1000.0), "pass@1", 100) == pytest.approx(0.09)


def test_a_target_is_reached_on_the_rising_curve():
    points = curve([0.1, 0.2, 0.5, 0.3, 0.4, 0.6])  # rises as 0.1, 0.2, 0.4, 0.4, 0.4, 0.6
    assert reached(points, 0.1, "tokens") == 0
    assert reached(points, 0.3, "tokens") == pytest.approx(15)
    assert reached(points, 0.5, "tokens") == pytest.approx(45)
    assert reached(points, 0.5, "cpu") == pytest.approx(4.5)
    assert reached(points, 0.7, "tokens") is None


def test_ratios_of_tokens_to_target():
    """A method that is twice as fast takes half; one that doesn't get there, all that it had, at least."""
    slow = np.linspace(0.2, 0.6, 11)
    curves = {
        "GRPO": {0: curve(slow), 1: curve(slow + 0.1)},
        "fast": {0: curve(slow, 5.0), 1: curve(slow + 0.1, 5.0)},
        "stuck": {0: curve([0.2] * 13), 1: curve(slow + 0.1)},
    }
    grpo, fast, stuck = target_table(curves, "GRPO")
    assert (grpo["tokens_ratio"][0], grpo["missed"]) == (0, 0)
    assert math.exp(fast["tokens_ratio"][0]) == pytest.approx(0.5)
    assert math.exp(fast["cpu_ratio"][0]) == pytest.approx(1)
    assert fast["pass@1_difference"] == pytest.approx((0.04, 0))
    assert stuck["missed"] == 1
    assert fast["live"] is None
    for i, point in enumerate(curves["fast"][0][1:] + curves["fast"][1][1:]):
        point |= {"groups_generated": 10.0, "groups_kept": float(i)}  # on average, 9.5 of 10
    assert target_table(curves, "GRPO")[1]["live"] == pytest.approx(0.95)
    # The target, 0.56, is at 90 tokens
    assert stuck["tokens_ratio"][0] == pytest.approx((math.log(120 / 90) + 0) / 2)


def test_reports(tmp_path):
    """Both kinds: what they say of a method that is twice as fast."""
    better = {seed: curve(np.linspace(0.2, 0.6, 11) + 0.01 * seed, 5.0) for seed in range(3)}
    curves = {"GRPO": {seed: curve(np.linspace(0.2, 0.6, 11) + 0.01 * seed) for seed in range(3)}, "DAPO": better}
    assert "| DAPO | +0.000 ± 0.000 (+0.000 to +0.000) | +0.100 ± 0.000 " in markdown(table(curves))
    assert "| DAPO | 0.610 (+0.040 ± 0.000) | 0.610 (+0.040 ± 0.000) | 0.50 (0.50 to 0.50) | 0 of 3 | 1.00 " in (
        target_markdown(target_table(curves, "GRPO"), "GRPO")
    )
    plot(curves, tmp_path / "areas.png")
    assert (tmp_path / "areas.png").stat().st_size
