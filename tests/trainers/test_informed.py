"""
Informed refill draws through real training: which prompts are generated for, what that saves, and that a run knows all
it knew when it goes on.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
import trl
from datasets import Dataset, IterableDataset
from PIL import Image

from trl_ext import DAPOTrainer, GRPOConfig, RewardFunctionError
from trl_ext.rollouts.calibration import REMEMBERED, read_curve
from trl_ext.rollouts.choosers import PromptChooser
from trl_ext.rollouts.stream import prompt_key
from trl_ext.trainers.seams.probes import preview_micro_batches


# `target` of prompts with variance, and of those without
LIVE, DEAD = 4, 5


def kinds(count: int, every: int) -> Dataset:
    """
    Prompts of which one in `every` is live. `kind` says which as a string, `level` as numbers that only deciles tell
    apart, `digit` as numbers whose first digit does.
    """
    live = [i % every == 0 for i in range(count)]
    return Dataset.from_dict(
        {
            "prompt": tiny.prompts(count)["prompt"],
            "target": [LIVE if alive else DEAD for alive in live],
            "kind": ["undecided" if alive else "hopeless" for alive in live],
            "level": [(0.30 if alive else 0.33) + i / 100_000 for i, alive in enumerate(live)],
            "digit": [(300.0 if alive else 800.0) + i / 100 for i, alive in enumerate(live)],
        }
    )


def lives(dataset: Dataset) -> dict[str, bool]:
    return {row["prompt"]: row["target"] == LIVE for row in dataset}


def as_stream(dataset: Dataset) -> IterableDataset:
    def rows():
        yield from dataset

    return IterableDataset.from_generator(rows)


def build(
    directory: Path, dataset: Any, reward: Any = None, arguments: dict[str, Any] | None = None, **settings: Any
) -> Any:
    settings = {"refill_draws": "informed", "refill_exploration": 0.25, **settings}
    settings = {"max_steps": 6, "max_refill_rounds": 4, **settings}
    arguments = {"train_dataset": dataset, **(arguments or {})}
    return tiny.trainer(
        tiny.recorded(DAPOTrainer), directory, reward or tiny.LiveFor({LIVE}), arguments, num_generations=4, **settings
    )


def trained(directory: Path, dataset: Any, **settings: Any) -> tuple[Any, tiny.Remembering]:
    reward = tiny.Remembering(tiny.LiveFor({LIVE}))
    trainer = build(directory, dataset, reward, **settings)
    trainer.train()
    return trainer, reward


def first_rounds(reward: tiny.Remembering, steps: int) -> list[list[str]]:
    """The prompt of every slot, before anything is refilled."""
    return [reward.at_step(step)[0].prompts[::4] for step in range(steps)]


def generated(reward: tiny.Remembering, steps: range) -> list[str]:
    """The prompt of every group that was generated, refills included."""
    return [prompt for step in steps for call in reward.at_step(step) for prompt in call.prompts[::4]]


def logged(trainer: Any, key: str) -> list[float]:
    name = f"selection/{key}"
    return [entry[name] for entry in tiny.history(trainer) if name in entry]


STEPS = 16
QUARTER = kinds(48, every=4)


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """16 batches of 4, where 12 of 48 prompts are live. What is generated first is what the loader deals."""
    return trained(tmp_path_factory.mktemp("blind"), QUARTER, max_steps=STEPS, refill_draws="blind")


@pytest.fixture(scope="module")
def informed(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("informed"), QUARTER, max_steps=STEPS)


@pytest.mark.train
class TestWhatIsGenerated:
    def test_live_prompts_more_often_than_blindly(self, blind, informed):
        alive, late = lives(QUARTER), range(STEPS // 2, STEPS)
        blindly, knowing = (generated(reward, late) for _, reward in (blind, informed))
        assert len(knowing) < 0.75 * len(blindly)
        share = [sum(alive[prompt] for prompt in prompts) / len(prompts) for prompts in (blindly, knowing)]
        assert share[1] > 1.5 * share[0]
        assert informed[0].counters.generated_tokens < 0.8 * blind[0].counters.generated_tokens
        assert informed[0].counters.generation_rounds < blind[0].counters.generation_rounds

    def test_refills_draw_live_prompts_too(self, tmp_path, blind):
        # With more left to chance there is more to refill
        settings = {"max_steps": STEPS, "refill_exploration": 0.5}
        _, knowing = trained(tmp_path, QUARTER, **settings)
        alive, share = lives(QUARTER), []
        for reward in (blind[1], knowing):
            calls = [call for step in range(4, STEPS) for call in reward.at_step(step)[1:]]
            drawn = [prompt for call in calls for prompt in call.prompts[::4]]
            assert len(drawn) >= 16
            share.append(sum(alive[prompt] for prompt in drawn) / len(drawn))
        assert share[1] > share[0] + 0.15

    def test_batches_are_still_full_of_live_groups(self, blind, informed):
        assert sum(logged(informed[0], "groups_kept")) >= sum(logged(blind[0], "groups_kept"))
        for batch in informed[0].batches[STEPS // 2 :]:
            assert all(batch.selection.live)

    def test_metrics_count_what_was_replaced(self, blind, informed):
        dealt, chosen = first_rounds(blind[1], STEPS), first_rounds(informed[1], STEPS)
        replaced = [sum(d != c for d, c in zip(*pair, strict=True)) for pair in zip(dealt, chosen, strict=True)]
        assert logged(informed[0], "prompts_replaced") == replaced
        assert sum(replaced) > STEPS

    def test_the_log_ends_with_how_reliable_predictions_were(self, blind, informed):
        last = informed[0].state.log_history[-1]
        assert "train_runtime" in last
        said = {key: value for key, value in last.items() if key.startswith(("reliability/", "selection/"))}
        assert said == informed[0].chooser.calibration.metrics()
        assert sum(groups for groups, _, _ in read_curve([last])) > 50
        assert not any(key.startswith("reliability/") for entry in informed[0].state.log_history[:-1] for key in entry)
        assert not any(key.startswith("reliability/") for entry in blind[0].state.log_history for key in entry)

    def test_nothing_is_replaced_while_nothing_is_known(self, blind, informed):
        assert first_rounds(informed[1], 1) == first_rounds(blind[1], 1)

    def test_what_stays_keeps_its_slot(self, blind, informed):
        stayed = 0
        for dealt, chosen in zip(first_rounds(blind[1], STEPS), first_rounds(informed[1], STEPS), strict=True):
            for slot, prompt in enumerate(dealt):
                if prompt in chosen:
                    assert chosen[slot] == prompt
                    stayed += dealt != chosen
        assert stayed > 5

    def test_dead_prompts_make_room(self, blind, informed):
        """Of those dealt and seen before: the dead go unless they are explored, the live mostly stay."""
        alive, seen = lives(QUARTER), set()
        gone: dict[bool, list[bool]] = {True: [], False: []}
        dealt, chosen = first_rounds(blind[1], STEPS), first_rounds(informed[1], STEPS)
        for step in range(STEPS):
            for prompt in seen.intersection(dealt[step]):
                gone[alive[prompt]].append(prompt not in chosen[step])
            seen.update(generated(informed[1], range(step, step + 1)))
        assert min(map(len, gone.values())) >= 5
        share_of_live, share_of_dead = (sum(gone[kind]) / len(gone[kind]) for kind in (True, False))
        assert share_of_dead > 0.5
        assert share_of_live < 0.4

    def test_groups_are_whole_and_no_prompt_comes_twice(self, informed):
        trainer, reward = informed
        assert any(len(batch.rounds) > 1 for batch in trainer.batches)
        targets = dict(zip(QUARTER["prompt"], QUARTER["target"], strict=True))
        for step in range(STEPS):
            for call in reward.at_step(step):
                assert call.prompts == [prompt for prompt in call.prompts[::4] for _ in range(4)]
                # the other columns came along
                assert call.columns["target"] == [targets[prompt] for prompt in call.prompts]
            prompts = generated(reward, range(step, step + 1))
            assert len(prompts) == len(set(prompts))

    def test_all_is_explored_where_all_is_left_to_chance(self, tmp_path, blind):
        trainer, reward = trained(tmp_path, QUARTER, max_steps=6, refill_exploration=1.0)
        assert logged(trainer, "prompts_replaced") == [0] * 6
        assert first_rounds(reward, 6) == first_rounds(blind[1], 6)

    def test_no_prompt_is_starved(self, tmp_path):
        # 8 of 16 live: enough to do without the others, which exploration sees again all the same
        half = kinds(16, every=2)
        dead = {prompt for prompt, alive in lives(half).items() if not alive}
        settings = {"similar_prompts_columns": ["kind"], "learning_rate": 0.0}
        _, explored = trained(tmp_path / "some", half, refill_exploration=0.5, max_steps=28, **settings)
        assert dead <= set(generated(explored, range(4, 28)))
        _, unexplored = trained(tmp_path / "none", half, refill_exploration=0.0, max_steps=12, **settings)
        shares = [
            sum(prompt in dead for prompt in prompts) / len(prompts)
            for prompts in (generated(unexplored, range(4, 12)), generated(explored, range(4, 12)))
        ]
        assert shares[0] < 0.7 * shares[1]


# Groups that are thrown away

ALL_RIGHT = 6


def three_kinds(completion_ids: list[list[int]], target: list[int], **columns: Any) -> list[float]:
    """Groups with variance, all wrong and all right."""
    constant = {DEAD: 0.0, ALL_RIGHT: 1.0}
    return [constant.get(t, r) for r, t in zip(tiny.hashed(completion_ids), target, strict=True)]


@pytest.mark.train
def test_what_is_thrown_away_teaches(tmp_path):
    targets = [(DEAD, ALL_RIGHT, DEAD, ALL_RIGHT, LIVE)[i % 5] for i in range(100)]
    dataset = Dataset.from_dict({"prompt": tiny.prompts(100)["prompt"], "target": targets})
    reward = tiny.Remembering(three_kinds)
    trainer = build(tmp_path, dataset, reward, max_steps=5)
    trainer.train()
    shown = {
        prompt: (sum(r >= trainer.args.success_threshold for r in call.rewards[i : i + 4]), 4)
        for call in reward.calls
        for i, prompt in zip(range(0, len(call.prompts), 4), call.prompts[::4], strict=True)
    }
    # Dead groups of further rounds, which nothing is trained on
    of_prompt = dict(zip(dataset["prompt"], targets, strict=True))
    calls = [call for step in range(5) for call in reward.at_step(step)[1:]]
    assert len(calls) > 5
    thrown_away = [of_prompt[prompt] for call in calls for prompt in call.prompts[::4]]
    assert min(thrown_away.count(DEAD), thrown_away.count(ALL_RIGHT)) >= 5
    for outlook in trainer.chooser.outlooks:
        known = {prompt: outlook._prompts[prompt_key({"prompt": prompt})] for prompt in shown}
        assert {prompt: (last.last_solved, last.last_tried) for prompt, last in known.items()} == shown
        assert len(outlook._prompts) == len(shown)
    # The regression and the calibration saw each group once: what counts in the curve fades from group to group
    groups = sum(len(call.prompts) // 4 for call in reward.calls)
    count = sum(n for n, _, _ in trainer.chooser.calibration.curve)
    fade = math.exp(-1 / REMEMBERED)
    assert count == pytest.approx((1 - fade**groups) / (1 - fade))


class Improving:
    """Half of the completions pass; for prompts that begin with w1, from a step on only."""

    __name__ = "improving"

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, prompts: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        hopeless = trainer_state.global_step < self.step
        return [float(i % 2 and not (hopeless and prompt.startswith("w1 "))) for i, prompt in enumerate(prompts)]


@pytest.mark.train
@pytest.mark.parametrize(
    ("features", "exploration"),
    [("hidden_states", 0.25), ("none", 0.25), ("none", 0.0)],
    ids=["by what similar prompts show", "by chance", "by fading"],
)
def test_all_wrong_prompts_come_back(tmp_path, features, exploration):
    """Without their samples. Where the policy has improved they come more often than where it hasn't."""
    change, last = 10, 26
    words = [f"{tiny.WORDS[2 + i % 18]} {tiny.WORDS[2 + i // 18]}" for i in range(40)]
    dataset = Dataset.from_dict({"prompt": [f"w{i % 2} {text}" for i, text in enumerate(words)]})
    settings = {"prompt_features": features, "refill_exploration": exploration, "learning_rate": 0.0}
    back: dict[int, list[str]] = {}
    for improves_at in (change, last):
        reward = tiny.Remembering(Improving(improves_at))
        trainer = build(tmp_path, dataset, reward, max_steps=last, **settings)
        trainer.train()
        early, late = generated(reward, range(change)), generated(reward, range(change + 3, last))
        all_wrong = {prompt for prompt in early if prompt.startswith("w1 ")}
        back[improves_at] = [prompt for prompt in late if prompt in all_wrong]
    assert len(all_wrong) >= 8
    assert len(set(back[change])) > len(all_wrong) / 2
    # Seen once, the others are predicted to have changed as well
    assert len(back[change]) > (1.5 if features == "hidden_states" else 1.0) * len(back[last])


class TestSimilarPrompts:
    # More prompts than are looked at in 8 batches: what is dealt is new
    dataset = kinds(400, every=2)
    settings: ClassVar = {"max_steps": 8, "seed": 8, "refill_exploration": 0.0, "prompt_features": "none"}

    @pytest.fixture(autouse=True)
    def _take_the_best(self, monkeypatch):
        """So that a few groups tell what is known of a kind."""
        monkeypatch.setattr("trl_ext.rollouts.outlook.SHARPNESS", 1000.0)

    def dead(self, reward: tiny.Remembering, steps: range) -> int:
        alive = lives(self.dataset)
        return sum(not alive[prompt] for prompt in generated(reward, steps))

    @pytest.mark.train
    @pytest.mark.parametrize(
        ("column", "stream"),
        [("kind", False), ("level", False), ("kind", True), ("digit", True)],
        ids=["string", "number", "string, iterable", "number, iterable"],
    )
    def test_unseen_prompts_of_a_dead_kind_are_avoided(self, tmp_path, column, stream):
        dataset = as_stream(self.dataset) if stream else self.dataset
        trainer, reward = trained(tmp_path, dataset, similar_prompts_columns=[column], **self.settings)
        early, late = generated(reward, range(2)), generated(reward, range(2, 8))
        assert self.dead(reward, range(2))
        assert len(set(late) - set(early)) >= 16
        assert self.dead(reward, range(2, 8)) <= 4
        assert sum(logged(trainer, "prompts_replaced")[2:]) >= 6  # of 24 dealt

    @pytest.mark.train
    def test_without_the_column_they_are_not(self, tmp_path):
        # or the test above would pass with a data set in which they are never dealt
        _, reward = trained(tmp_path, self.dataset, **self.settings)
        assert self.dead(reward, range(2, 8)) >= 10

    @pytest.mark.parametrize(
        ("dataset", "settings", "said"),
        [
            (kinds(16, 2), {}, "'prompt', 'target', 'kind', 'level', 'digit'"),
            (as_stream(kinds(16, 2)), {}, "'prompt', 'target', 'kind', 'level', 'digit'"),
            (kinds(16, 2), {"remove_unused_columns": True}, "dropped by remove_unused_columns=True"),
        ],
        ids=["map", "iterable", "removed"],
    )
    def test_a_column_that_is_not_there(self, tmp_path, dataset, settings, said):
        columns = ["kind"] if settings else ["kind", "difficulty"]
        with pytest.raises(ValueError, match=f"similar_prompts_columns.*'{columns[-1]}'") as error:
            build(tmp_path, dataset, similar_prompts_columns=columns, **settings)
        assert said in str(error.value)


class TestBlindByDefault:
    @pytest.mark.train
    def test_a_blind_run_keeps_no_outlook(self, blind):
        trainer, _ = blind
        assert type(trainer.chooser) is PromptChooser
        assert "outlook" not in trainer.run_state()
        assert all("selection/prompts_replaced" not in entry for entry in tiny.history(trainer))

    def test_trls_configuration(self, tmp_path):
        theirs = trl.GRPOConfig(**tiny.cpu_settings(tmp_path, max_steps=1))
        trainer = DAPOTrainer(
            model=tiny.stopping(),
            reward_funcs=tiny.hashed,
            args=theirs,
            train_dataset=tiny.prompts(),
            processing_class=tiny.tokenizer(),
        )
        assert (trainer.args.rollout_selection, trainer.args.refill_draws) == ("refill", "blind")
        assert type(trainer.chooser) is PromptChooser

    def test_our_configuration_for_another_method(self):
        plain = GRPOConfig(
            **tiny.cpu_settings("out"),
            rollout_selection="refill",
            refill_draws="informed",
            similar_prompts_columns=["kind"],
            refill_exploration=0.1,
        )
        ours = DAPOTrainer.config_class.adopt(plain)
        assert (ours.refill_draws, ours.similar_prompts_columns, ours.refill_exploration) == (
            "informed",
            ["kind"],
            0.1,
        )


# What lies beside training


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """The same to the last bit, tensors inside of dictionaries and lists included."""
    if isinstance(one, dict):
        assert list(one) == list(other), where  # also in the same order
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (mine, its) in enumerate(zip(one, other, strict=True)):
            assert_equal(mine, its, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def entries(state: Any) -> Iterator[tuple[Any, Any]]:
    """Keys and values of all dictionaries in a state."""
    if isinstance(state, Mapping):
        yield from state.items()
    for part in state.values() if isinstance(state, Mapping) else state if isinstance(state, list) else []:
        yield from entries(part)


@pytest.fixture
def halfway(tmp_path) -> Any:
    """A trainer that knows something."""
    trainer = build(tmp_path, QUARTER, arguments={"eval_dataset": QUARTER.select(range(4))}, max_steps=3)
    trainer.train()
    return trainer


@pytest.mark.train
@pytest.mark.parametrize(
    "beside",
    [
        lambda trainer: trainer.evaluate(),
        lambda trainer: trainer.roll_out([QUARTER[0], QUARTER[1]], 2, seed=1),
        lambda trainer: preview_micro_batches(trainer),
    ],
    ids=["evaluate", "roll_out", "preview_micro_batches"],
)
def test_neither_draws_nor_observes(halfway, beside: Callable[[Any], Any]):
    halfway.model.train()
    before = halfway.run_state()
    first_prompt = halfway.batches[0].rounds[0].rollouts[0].prompt
    assert prompt_key({"prompt": first_prompt}) in dict(entries(before["outlook"]))
    assert before["refill_stream"]["position"]
    beside(halfway)
    assert_equal(halfway.run_state(), before)


@pytest.mark.train
def test_what_a_step_keeps_is_shared_with_what_is_known(halfway):
    halfway._window = (None, 0)
    halfway.begin_window()
    kept, known = halfway._before_window["run"]["outlook"]["outlooks"], halfway.chooser.outlooks
    for state, outlook in zip(kept, known, strict=True):
        now = outlook.state_dict()
        assert len(state["prompts"]) > 0
        for name in ("prompts", "numbers", "buckets"):
            assert all(mine is its for mine, its in zip(state[name].shards, now[name].shards, strict=True))


@pytest.mark.train
def test_what_is_known_are_the_prompts_that_were_trained_on(tmp_path):
    # neither those held out, which are not replaced either, nor those that were dealt and replaced
    dataset = kinds(160, every=2)
    held_out = Dataset.from_dict({"prompt": [f"w{i} w9 w9" for i in range(4)], "target": [DEAD] * 4})
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 16, "max_steps": 4}
    reward = tiny.Remembering(tiny.LiveFor({LIVE}))
    arguments = {"eval_dataset": held_out}
    trainer = build(tmp_path, dataset, reward, arguments, similar_prompts_columns=["kind"], **settings)
    trainer.train()
    assert sum(logged(trainer, "prompts_replaced")) >= 1
    asked = [sorted(call.prompts[::4]) for call in reward.calls if call.prompts[0] in held_out["prompt"]]
    assert asked == [sorted(held_out["prompt"])] * 2
    outlook = list(entries(trainer.run_state()["outlook"]))
    assert {value for key, value in outlook if key == "now"} == {4}  # one tick a batch
    known = {key for key, _ in outlook}
    in_training = {prompt for call in reward.calls for prompt in call.prompts} - set(held_out["prompt"])
    for prompt in [*dataset["prompt"], *held_out["prompt"]]:
        assert (prompt_key({"prompt": prompt}) in known) == (prompt in in_training)


def test_images_survive_the_way_through_the_hook(tmp_path):
    # No tiny model sees images: only that rows come out as they went in, one copy for each completion
    trainer = build(tmp_path, QUARTER)
    images = [Image.new("RGB", (3, 2), (i, 0, 255 - i)) for i in range(4)]
    rows = [{"prompt": [{"role": "user", "content": "Which?"}], "image": image} for image in images]
    dealt = [row for row in rows for _ in range(4)]
    groups = trainer._first_of_groups(dealt)
    assert list(map(prompt_key, groups)) == list(map(prompt_key, rows))
    assert len(set(map(prompt_key, groups))) == 4
    repeated = trainer._local_rows(groups, 4)
    assert len({id(row["image"]) for row in repeated}) == 16
    assert [row["image"].tobytes() for row in repeated] == [row["image"].tobytes() for row in dealt]
    assert list(map(prompt_key, repeated)) == list(map(prompt_key, dealt))


# Runs that stop and go on


def assert_same_run(one: Any, other: Any) -> None:
    assert_equal(dict(one.model.state_dict()), dict(other.model.state_dict()))
    assert_equal(one.run_state(), other.run_state())
    assert one._step == other._step


@pytest.mark.train
@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        (QUARTER, {"similar_prompts_columns": ["kind", "level"]}),
        (QUARTER, {"updates_per_generation": 2}),
        (as_stream(QUARTER), {"similar_prompts_columns": ["digit"]}),
    ],
    ids=["columns", "updates", "iterable"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, dataset, settings):
    settings = {"save_strategy": "steps", "save_steps": 1, **settings}
    full = build(tmp_path / "full", dataset, **settings)
    full.train()
    replaced = {entry["step"]: entry.get("selection/prompts_replaced") for entry in tiny.history(full)}
    assert replaced[5]  # what was learned before the checkpoints was used after
    for step in (3, 4):  # with two updates, 3 is in mid-generation
        resumed = build(tmp_path / f"from-{step}", dataset, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "full" / f"checkpoint-{step}"))
        assert_same_run(full, resumed)
        tail = [entry for entry in tiny.history(full) if entry["step"] > step]
        assert tiny.history(resumed)[-len(tail) :] == tail


class FailsAtRefill(tiny.LiveFor):
    """Fails in the second round of the generation for one step, when prompts were replaced, drawn and observed."""

    def __init__(self, step: int) -> None:
        super().__init__({LIVE})
        self.step, self.rounds = step, 0

    def __call__(self, trainer_state: Any, **columns: Any) -> list[float]:
        self.rounds += trainer_state.global_step == self.step
        if self.rounds == 2:
            raise ZeroDivisionError("no such thing")
        return super().__call__(**columns)


@pytest.mark.train
@pytest.mark.parametrize("saved", [False, True], ids=["saved by the fault", "saved before"])
def test_a_reward_function_that_fails(tmp_path, saved):
    settings = {"save_strategy": "steps" if saved else "no", "save_steps": 1}
    whole = build(tmp_path / "whole", QUARTER, **settings)
    whole.train()
    refilled = [step for step, batch in enumerate(whole.batches) if len(batch.rounds) > 1]
    assert max(refilled) >= 2
    with pytest.raises(RewardFunctionError):
        build(tmp_path / "failed", QUARTER, FailsAtRefill(max(refilled)), **settings).train()
    mended = build(tmp_path / "failed", QUARTER, **settings)
    mended.train(resume_from_checkpoint=True)
    assert len(mended.batches) == 6 - max(refilled)
    assert_same_run(whole, mended)
