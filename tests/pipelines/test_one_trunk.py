"""The whole schedule with four roles on one base: a critic and a reward model that are adapters."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pipelines.dpo_then_ppo_worker import dpo_args, lora, policy_settings, schedule
from pipelines.runs import adapter, same
from transformers import TrainerCallback

from trl_ext import AdapterReward, PPOConfig
from trl_ext.pipelines.dpo_then_ppo import DPOThenPPO
from trl_ext.pipelines.training import StageStoppedError


pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> Path:
    return Path(tiny.reward_adapter(tmp_path_factory.mktemp("one_trunk")))


def build(output: Path, reward: Path, **overrides: Any) -> DPOThenPPO:
    """Two rounds of pairs, DPO and PPO; the critic is fitted to what the pairs were made of."""
    settings = {
        "model": str(reward.parent / "base"),
        "reward_funcs": AdapterReward(reward),
        "dpo_args": dpo_args(max_steps=2),
        "policy_args": PPOConfig(**policy_settings(max_steps=2, critic="adapter", critic_learning_rate=1e-2)),
        "peft_config": lora(lora_dropout=0.0),
        "accuracy_threshold": None,
        "held_out": None,
        "rounds": 2,
        **overrides,
    }
    return schedule(output, **settings)


def critic(folder: Path) -> dict[str, torch.Tensor]:
    return adapter(folder / "critic" / "adapter")


def test_four_roles_on_one_base(tmp_path: Path, reward: Path) -> None:
    told: list[Any] = []

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_training_stop = state.global_step == 1

    def watch(stage: str, trainer: Any) -> None:
        if stage == "ppo":
            told.append(trainer.roles.describe())

    def stop(stage: str, trainer: Any) -> None:
        if stage == "ppo":
            trainer.add_callback(Stop())

    run = build(tmp_path / "run", reward, prepare=watch)
    before = {name: weight.clone() for name, weight in run.policy.get_base_model().state_dict().items()}
    run.train()
    assert all(role["shares_base"] for roles in told for role in roles.values())
    assert {"actor", "critic", "reference"} <= told[0].keys() and len(told[0]) == 4
    for name, weight in run.policy.get_base_model().state_dict().items():
        if name in before and "lora" not in name:
            assert torch.equal(weight, before[name]), name
    first, second = (critic(tmp_path / f"run/round_{round_}/ppo") for round_ in (1, 2))
    assert any(weight.any() for name, weight in first.items() if "lora_B" in name)
    assert first.keys() == second.keys() and not same(first, second)
    assert same(critic(tmp_path / "run"), second)
    assert not any("critic" in name or "reward" in name for name in adapter(tmp_path / "run"))

    with pytest.raises(StageStoppedError, match="ppo was stopped at step 1"):
        build(tmp_path / "stopped", reward, prepare=stop).train()
    again = build(tmp_path / "stopped", reward)
    again.train()
    assert same(adapter(tmp_path / "stopped"), adapter(tmp_path / "run"))
    assert same(critic(tmp_path / "stopped"), second)
