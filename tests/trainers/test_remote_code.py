"""Models whose code lies beside their weights: `trust_remote_code` reaches whatever PPO reads."""

import json
from typing import Any

import pytest
import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_ext import GRPOTrainer, PPOTrainer


CODE = """
from transformers import AutoModel, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Model


class OwnConfig(Qwen2Config):
    model_type = "own"


class OwnModel(Qwen2Model):
    config_class = OwnConfig


AutoModel.register(OwnConfig, OwnModel)  # the classifier asks for its backbone there


class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig


class OwnForSequenceClassification(Qwen2ForSequenceClassification):
    config_class = OwnConfig
"""
CLASSES = {"AutoConfig": "OwnConfig"} | {
    f"AutoModelFor{kind}": f"OwnFor{kind}" for kind in ("CausalLM", "SequenceClassification")
}


def with_code(folder: Any, model: Any) -> str:
    model.save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {name: f"own.{cls}" for name, cls in CLASSES.items()}}
    config["architectures"] = [name.replace("Qwen2", "Own") for name in config["architectures"]]
    (folder / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        "policy": with_code(tmp_path_factory.mktemp("policy"), tiny.stopping()),
        "judge": with_code(tmp_path_factory.mktemp("judge"), tiny.classifier()),
    }


ARGUMENTS = {
    "policy": lambda models: {"model": models["policy"]},
    "reference": lambda models: {"model": models["policy"], "ref_model": models["policy"]},
    "critic": lambda models: {"model": models["policy"], "value_model": models["judge"]},
    "judge of text": lambda models: {"model": models["policy"], "reward_model": models["judge"]},
    "judge of ids": lambda models: {
        "model": models["policy"],
        "reward_model": models["judge"],
        "train_dataset": Dataset.from_dict({"input_ids": [[4 + i, 5] for i in range(16)]}),
        "processing_class": None,
    },
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_ppo_reads_every_model_with_its_code(name, models, tmp_path):
    trainer = tiny.trainer(
        PPOTrainer, tmp_path, tiny.hashed, ARGUMENTS[name](models), max_steps=1, trust_remote_code=True
    )
    trainer.train()
    assert type(trainer.accelerator.unwrap_model(trainer.model)).__name__ == "OwnForCausalLM"


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, PPOTrainer])
def test_code_that_is_not_trusted_is_not_run(trainer_class, models, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        tiny.trainer(trainer_class, tmp_path, tiny.hashed, {"model": models["policy"]})
    assert AutoModelForCausalLM.from_pretrained(models["policy"], trust_remote_code=True) is not None
