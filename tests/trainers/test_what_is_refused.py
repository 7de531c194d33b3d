"""Models that can't be trained or can't judge: one error that says what to change, whichever the trainer."""

from typing import Any

import pytest
import tiny
from datasets import Dataset
from peft import PeftModel, get_peft_model

from trl_ext import DAPOTrainer, DPOConfig, DPOTrainer, GRPOTrainer, PPOTrainer


def frozen_model() -> Any:
    return tiny.stopping().requires_grad_(False)


def loaded_for_inference(tmp_path: Any) -> PeftModel:
    get_peft_model(tiny.stopping(), tiny.lora()).save_pretrained(tmp_path / "adapter")
    return PeftModel.from_pretrained(tiny.stopping(), tmp_path / "adapter")


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, PPOTrainer])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_policy_that_no_step_can_move(trainer_class, beta, tmp_path):
    settings = {"beta": beta} if trainer_class is GRPOTrainer else {"kl_coef": beta}
    model = loaded_for_inference(tmp_path)
    trainer = tiny.trainer(trainer_class, tmp_path, tiny.hashed, {"model": model}, **settings)
    with pytest.raises(ValueError, match=r"No weight of the policy can be trained.*is_trainable=True"):
        trainer.train()


def test_a_frozen_policy_can_still_be_sampled(tmp_path):
    trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, {"model": frozen_model()})
    assert trainer.roll_out([{"prompt": "w1 w2", "target": 4}], 2, seed=0).rewards.shape == (1, 2, 1)
    with pytest.raises(ValueError, match="unfreeze the model"):
        trainer.train()


def test_dpo_of_a_frozen_adapter(tmp_path):
    rows = Dataset.from_dict({"prompt": ["w0 w1"] * 8, "chosen": [" w2"] * 8, "rejected": [" w3 w4"] * 8})
    args = DPOConfig(**tiny.pair_settings(tmp_path))
    model = loaded_for_inference(tmp_path)
    trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match="No weight of the policy can be trained"):
        trainer.train()


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DAPOTrainer])
def test_a_reward_model_with_two_outputs(trainer_class, tmp_path):
    judge = tiny.classifier(num_labels=2)
    with pytest.raises(
        ValueError, match=r"has 2 outputs, and the first would be the reward\. Load it with num_labels=1"
    ):
        tiny.trainer(trainer_class, tmp_path, judge)


def test_ppos_reward_model_with_two_outputs(tmp_path):
    arguments = {"reward_model": tiny.classifier(num_labels=2)}
    with pytest.raises(ValueError, match="has 2 outputs"):
        tiny.trainer(PPOTrainer, tmp_path, [], arguments)


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, PPOTrainer])
def test_a_language_model_for_a_reward_model(trainer_class, tmp_path):
    tiny.stopping().save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="is a Qwen2ForCausalLM: as a sequence classifier it would get"):
        tiny.trainer(trainer_class, tmp_path, str(tmp_path / "policy"))
