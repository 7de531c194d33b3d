"""What is refused before a model is loaded."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from peft import get_peft_model
from pipelines.dpo_then_ppo_worker import dpo_args, lora, pairs, policy_settings, prompts
from pipelines.runs import short

import trl_ext
from trl_ext import PPOConfig
from trl_ext.rewards.implicit import IMPLICIT_REWARD


GRPO: Any = {"policy_trainer": trl_ext.GRPOTrainer, "policy_args": trl_ext.GRPOConfig(**policy_settings())}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"peft_config": None}, "peft_config` is missing"),
        ({"reference": "start"}, "reference='start' is unknown"),
        ({"rounds": 0}, "rounds=0"),
        ({"accuracy_threshold": 1.5}, "accuracy_threshold=1.5"),
        ({"accuracy_logs": 0}, "accuracy_logs=0"),
        ({"fit_critic": -1}, "fit_critic=-1"),
        ({"dpo_held_out_every": -1}, "dpo_held_out_every=-1"),
        ({"dpo_patience": 0}, "dpo_patience=0"),
        ({"dpo_held_out_every": 2}, "Pass held_out"),
        ({"fit_critic": 1}, "pairs were given"),
        ({"fit_critic": 1, "pairs": None, **GRPO}, "GRPOTrainer has no critic"),
        ({"reward_funcs": IMPLICIT_REWARD, "pairs": None}, "can't judge those it learns from"),
        ({"reward_funcs": IMPLICIT_REWARD, "rounds": 2}, "can't judge those it learns from"),
        ({"pairs": prompts()}, r"pairs lacks the columns \['chosen', 'rejected'\]"),
        ({"train_dataset": pairs().remove_columns("prompt")}, "train_dataset lacks"),
        ({"train_dataset": iter([])}, "train_dataset is a"),
        (
            {"dpo_args": dpo_args(eval_strategy="steps", eval_steps=1)},
            "eval_strategy of dpo_args needs eval_pairs",
        ),
        ({"policy_args": PPOConfig(**policy_settings(reward_weights=[1.0, 2.0]))}, "2 numbers for 1 rewards"),
        ({"dpo_args": dpo_args(save_only_model=True)}, "save_only_model of dpo_args"),
        ({"clean": "cross_fitting", "pairs": pairs().remove_columns("prompt")}, r"pairs lacks .* \['prompt'\]"),
        ({"clean": "well"}, "clean='well' is unknown"),
        ({"clean": "cross_fitting"}, "from 50 pairs on"),
        ({"pairs": pairs().select([])}, "pairs has no rows"),
        ({"eval_pairs": pairs()}, "dpo_args never evaluates"),
        ({"dpo_args": dpo_args(logging_strategy="no")}, "logging_strategy of dpo_args is 'no'"),
        ({"pair_settings": {"num_generation": 4}}, r"pair_settings has \['num_generation'\]"),
        ({"reward_funcs": IMPLICIT_REWARD, "held_out": prompts()}, "nor the policy at the start"),
        (
            {"policy_args": PPOConfig(**policy_settings(eval_strategy="steps", eval_steps=1))},
            "eval_strategy of policy_args needs an eval_dataset",
        ),
        (
            {"policy_args": PPOConfig(**policy_settings(sync_ref_model=True))},
            "sync_ref_model refreshes a copy of the adapter",
        ),
    ],
)
def test_before_a_model_is_loaded(tmp_path: Path, overrides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short(tmp_path, **{"model": "no/such/model", **overrides})
    assert not (tmp_path / "start").exists()


def test_a_model_with_an_adapter_and_a_peft_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"already has an adapter\. Pass one of them"):
        short(tmp_path, model=get_peft_model(tiny.qwen2(), lora()))


def test_an_adapter_that_cant_be_trained(tmp_path: Path) -> None:
    model = get_peft_model(tiny.qwen2(), lora())
    for weight in model.parameters():
        weight.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        short(tmp_path, model=model, peft_config=None)


@pytest.mark.train
@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"policy_kwargs": {"curriculums": 1}}, ValueError, "policy_kwargs has 'curriculums'"),
        ({"policy_kwargs": {"curriculum": "frontier"}}, TypeError, "curriculum='frontier' is not a prompt chooser"),
        ({"train_dataset": prompts(1)}, ValueError, "train_dataset has 1 prompts, fewer than the 4"),
    ],
)
def test_what_stage_two_cant_work_with_is_told_before_dpo(
    tmp_path: Path, overrides: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        short(tmp_path, **overrides).train()
    assert not (tmp_path / "round_1/dpo").exists()
    short(tmp_path).train()  # the corrected call


@pytest.mark.parametrize(
    "overrides",
    [
        {"policy_trainer": trl_ext.DPOTrainer},
        {"policy_trainer": "ppo"},
        {"policy_args": dpo_args()},
        {"dpo_args": PPOConfig(**policy_settings())},
    ],
)
def test_of_another_kind(tmp_path: Path, overrides: Any) -> None:
    with pytest.raises(TypeError):
        short(tmp_path, **overrides)
