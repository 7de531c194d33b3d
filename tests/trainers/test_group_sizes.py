"""Prompts with several times `num_generations` completions, through real training."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from refused import check

from trl_ext import DAPOConfig, DAPOTrainer, PPOConfig, RLOOConfig
from trl_ext.objectives.advantages import STD_EPSILON


# `target` of prompts whose completions may pass, and of those whose never do
LIVE, DEAD = 4, 5
# 8 slots of 2 completions
SETTINGS: dict[str, Any] = {
    "refill_draws": "informed",
    "refill_exploration": 0.0,
    "num_generations": 2,
    "max_num_generations": 8,
    "max_steps": 4,
    "max_refill_rounds": 2,
    "learning_rate": 1e-4,
}


def passes(completion_ids: list[list[int]], target: list[int], **kwargs: Any) -> list[float]:
    """1 for about half of the completions of a live prompt, and otherwise 0."""
    return [float(t == LIVE and r > 0.5) for r, t in zip(tiny.hashed(completion_ids), target, strict=True)]


def build(directory: Path, **settings: Any) -> tuple[Any, tiny.Remembering]:
    """As many prompts as there are slots, half of them dead: there is nothing else to draw."""
    targets = [LIVE if i % 2 == 0 else DEAD for i in range(8)]
    dataset = Dataset.from_dict({"prompt": tiny.prompts(8)["prompt"], "target": targets})
    reward = tiny.Remembering(passes)
    trainer = tiny.trainer(
        tiny.recorded(DAPOTrainer), directory, reward, {"train_dataset": dataset}, **{**SETTINGS, **settings}
    )
    return trainer, reward


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, tiny.Remembering, Path]:
    directory = tmp_path_factory.mktemp("group_sizes")
    trainer, reward = build(directory, save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer, reward, directory


def slots_of(batch: tiny.TrainedBatch) -> list[list[Any]]:
    """The completions that were generated for each slot of a batch."""
    refs = batch.selection.slots
    return [batch.rounds[ref.round].rollouts[2 * ref.group : 2 * ref.group + 2] for ref in refs]


def rewards_of(rollouts: list[Any]) -> torch.Tensor:
    return torch.tensor(passes([r.completion_ids for r in rollouts], [r.row["target"] for r in rollouts]))


@pytest.mark.train
class TestTraining:
    def test_what_is_predicted_decides_who_gets_more(self, run):
        trainer, reward, _ = run
        sizes, seen = [], set()
        for step, batch in enumerate(trainer.batches):
            call = reward.at_step(step)[0]
            assert len(call.prompts) == len(batch.prompts) == 16
            target = dict(zip(call.prompts, call.columns["target"], strict=True))
            count = {prompt: call.prompts.count(prompt) for prompt in target}
            sizes += [(target[prompt], n) for prompt, n in count.items() if prompt in seen]
            seen |= target.keys()
        dead, live = ([n for which, n in sizes if which == kind] for kind in (DEAD, LIVE))
        assert max(live) > 4 and sum(live) > 3 * sum(dead)

    def test_advantages_compare_all_completions_of_a_prompt_and_weigh_prompts_equally(self, run):
        sizes = set()
        for batch in run[0].batches:
            slots = slots_of(batch)
            of_prompt: dict[str, list[Any]] = {}
            for slot in slots:
                of_prompt.setdefault(slot[0].prompt, []).extend(slot)
            advantages = []
            for slot in (slots[source] for source in batch.selection.sources):
                rewards = rewards_of(of_prompt[slot[0].prompt])
                weight = 16 / (len(of_prompt) * len(rewards))
                centred = rewards_of(slot) - rewards.mean()
                advantages.append(weight * centred / (rewards.std() + STD_EPSILON))
                sizes.add(len(rewards))
            torch.testing.assert_close(batch.output["advantages"], torch.cat(advantages))
        assert sizes >= {2, 4}

    def test_a_group_is_live_as_a_whole(self, run):
        alive = []
        for batch in run[0].batches:
            live = dict(zip([slot[0].prompt for slot in slots_of(batch)], batch.selection.live, strict=True))
            for slot, is_live in zip(slots_of(batch), batch.selection.live, strict=True):
                assert live[slot[0].prompt] == is_live
                alive.append((is_live, bool(rewards_of(slot).std() > 0)))
        assert (True, False) in alive  # by another slot's completions

    def test_metrics_count_prompts(self, run):
        for step, (entry, batch) in enumerate(zip(tiny.history(run[0]), run[0].batches, strict=True)):
            prompts = [prompt for call in run[1].at_step(step) for prompt in dict.fromkeys(call.prompts)]
            assert entry["selection/groups_generated"] == len(prompts)
            slots = zip(slots_of(batch), batch.selection.live, strict=True)
            assert entry["selection/groups_kept"] == len({slot[0].prompt for slot, is_live in slots if is_live})
            dead = entry["selection/groups_dead"] / len(prompts)
            assert entry["frac_reward_zero_std"] == pytest.approx(dead)

    def test_a_resumed_run_equals_the_uninterrupted_one(self, run, tmp_path):
        full, _, directory = run
        resumed, _ = build(tmp_path)
        resumed.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
        for mine, its in zip(resumed.batches, full.batches[2:], strict=True):
            assert mine.completions == its.completions
        for name, weight in full.model.state_dict().items():
            assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("config_class", "settings", "parts"),
    [
        (DAPOConfig, {"max_num_generations": 6}, ["max_num_generations=6", "multiple of num_generations=4"]),
        (DAPOConfig, {"max_num_generations": 4}, ["max_num_generations=4", "at least 8"]),
        (DAPOConfig, {"refill_value": "signal"}, ["max_num_generations=8", "refill_value='signal'"]),
        (DAPOConfig, {"refill_draws": "blind"}, ["max_num_generations=8", "Set rollout_selection='refill' and"]),
        (
            DAPOConfig,
            {"multi_objective_aggregation": "normalize_then_sum"},
            ["Set advantage_estimator='leave_one_out'"],
        ),
        (RLOOConfig, {"normalize_advantages": True}, ["max_num_generations=8", "normalize_advantages=True"]),
        (PPOConfig, {}, ["max_num_generations=8", "those of a critic"]),
    ],
)
def test_what_has_no_meaning(config_class, settings, parts, tmp_path):
    given = {"rollout_selection": "refill", "refill_draws": "informed", "max_num_generations": 8, **settings}
    check(lambda: config_class(**tiny.cpu_settings(tmp_path, updates_per_generation=1, **given)), parts)
