"""PPO runs that stop and go on: a resumed run equals the uninterrupted one bit for bit."""

import copy
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from resume.test_trainers import assert_resumes, assert_same_state, build
from transformers import Qwen2ForSequenceClassification

from trl_ext import PPOTrainer, RewardFunctionError
from trl_ext.trainers.seams.whole_checkpoints import REFERENCE_FILE, DamagedCheckpointError


pytestmark = pytest.mark.train


SMALL = {"num_generations": 1, "per_device_train_batch_size": 4, "max_steps": 5, "critic_learning_rate": 0.05}
# Two epochs on two steps of each batch: checkpoints 1, 2 and 3 are in the middle of a generation batch
IN_THE_MIDDLE = {"num_iterations": 2, "updates_per_generation": 2}


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)


def classifier() -> Any:
    torch.manual_seed(1)
    config = copy.deepcopy(tiny.qwen2().config)
    config.num_labels = 1
    return Qwen2ForSequenceClassification(config)


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "head": ({}, dict),
    "in the middle": (IN_THE_MIDDLE, dict),
    "model": ({"critic": "model", **IN_THE_MIDDLE}, dict),
    "value model": ({"num_iterations": 2}, lambda: {"value_model": classifier()}),
    "lora": (IN_THE_MIDDLE, lambda: {"peft_config": lora()}),
    "lora and model": ({"critic": "model"}, lambda: {"peft_config": lora()}),
    "adapter": ({"critic": "adapter", **IN_THE_MIDDLE}, lambda: {"peft_config": lora()}),
    "coefficients and scales": (
        {
            "kl_target": 0.1,
            "kl_rule": "exponential",
            "old_kl_coef": 0.5,
            "old_kl_target": 0.01,
            "reward_scaling": "running",
            "num_iterations": 2,
        },
        dict,
    ),
    "kl in the loss": (
        {"kl_coef": 0.0, "beta": 0.1, "kl_target": 0.1, "kl_rule": "exponential", "num_iterations": 2},
        dict,
    ),
    "text": (
        {"ptx_coef": 0.1, "ptx_batch_size": 3, **IN_THE_MIDDLE},
        lambda: {"ptx_dataset": Dataset.from_dict({"text": [f"w{i} w{19 - i}" for i in range(10)]})},
    ),
    "replay": ({"replay_ratio": 0.5, "replay_capacity": 2, "num_iterations": 2}, dict),
    "refill": ({"num_generations": 4, "rollout_selection": "refill", "num_iterations": 2}, dict),
    "warm-up": ({"critic_warmup_steps": 2, "value_updates_per_policy_update": 2, "critic": "model"}, dict),
    "in the middle of the warm-up": (
        {"critic_warmup_steps": 4, "lr_scheduler_type": "linear", "kl_target": 0.1, **IN_THE_MIDDLE},
        dict,
    ),
    "a warm-up that ended early": (
        {"critic_warmup_steps": 4, "critic_warmup_explained_variance": -1e9, "lr_scheduler_type": "linear"},
        dict,
    ),
    "ids": (
        {"num_iterations": 2},
        lambda: {
            "train_dataset": Dataset.from_dict({"input_ids": [[4 + i, 5] for i in range(16)], "target": range(16)})
        },
    ),
    "refreshed reference": ({"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}, dict),
    "refreshed adapter": (
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
        lambda: {"peft_config": lora()},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    settings, arguments = CASES[name]
    settings = {**SMALL, "num_iterations": 1, "learning_rate": 1e-2, **settings}
    # Coefficients change between two generation batches: after step 4
    at = [3, 4] if "old_kl_target" in settings else [3]
    full = assert_resumes(PPOTrainer, tmp_path, at=at, arguments=arguments, **settings)
    before = torch.load(tmp_path / "full" / "checkpoint-3" / "trl_ext_state.pt", weights_only=False)
    if "kl_target" in settings and "critic_warmup_steps" not in settings:
        assert (full.kl_coef or full.beta) != (settings.get("beta") or 0.05)
    if settings.get("reward_scaling"):
        assert full._reward_scale.count > before["run"]["reward_scale"]["count"] > 0
    if "ptx_coef" in settings:
        assert full._ptx.state_dict() != before["run"]["ptx"]
    if "replay_ratio" in settings:
        assert any(log["replay/ratio"] == 0.5 for log in tiny.history(full) if "replay/ratio" in log)
    middle = 3 * 2 % (full.args.steps_per_generation * full.num_iterations) != 0
    assert middle == (settings["num_iterations"] == 2)


def test_a_checkpoint_without_its_refreshed_reference_is_damaged(tmp_path):
    settings = {**SMALL, "num_iterations": 1, "sync_ref_model": True, "ref_model_sync_steps": 1}
    build(PPOTrainer, tmp_path, **settings).train()
    (tmp_path / "checkpoint-3" / REFERENCE_FILE).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"{REFERENCE_FILE} is missing"):
        build(PPOTrainer, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_replayed_rows_are_those_of_the_uninterrupted_run(tmp_path):
    settings = {**SMALL, "num_iterations": 1, "replay_ratio": 0.5, "replay_capacity": 2}
    full = build(PPOTrainer, tmp_path / "full", **settings)
    full.train()
    resumed = build(PPOTrainer, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-2"))
    assert_same_state(full, resumed)
    one, other = full.process_state()["replay"], resumed.process_state()["replay"]
    assert torch.equal(one["generator"], other["generator"])
    assert len(one["batches"]) == len(other["batches"]) == 2
    for batch, same in zip(one["batches"], other["batches"], strict=True):
        assert batch.keys() == same.keys()
        assert all(torch.equal(batch[name], same[name]) for name in batch)


@pytest.mark.parametrize("replay", [0.0, 0.5])
def test_a_reward_function_that_fails_in_the_middle_of_a_step_leaves_no_trace(replay, tmp_path):
    # One micro-batch a generation, two a step: the second generation of step 3 fails. What the first one did to the
    # running scale, the coefficient and the replay buffer is undone.
    class Fails:
        def __init__(self, at: int) -> None:
            self.calls, self.at = 0, at
            self.__name__ = "judge"

        def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
            self.calls += 1
            if self.calls == self.at:
                raise ZeroDivisionError
            rewards: list[float] = tiny.hashed(completion_ids)
            return rewards

    settings = {
        **SMALL,
        "num_iterations": 1,
        "save_strategy": "no",
        "steps_per_generation": 1,
        "max_steps": 4,
        "replay_ratio": replay,
        "reward_scaling": "running",
        "kl_target": 0.1,
        "kl_rule": "exponential",
    }
    whole = build(PPOTrainer, tmp_path / "whole", Fails(-1), **settings)
    whole.train()
    broken = build(PPOTrainer, tmp_path / "broken", Fails(6), **settings)
    with pytest.raises(RewardFunctionError):
        broken.train()
    mended = build(PPOTrainer, tmp_path / "broken", Fails(-1), **settings)
    mended.train(resume_from_checkpoint=True)
    assert_same_state(whole, mended)
