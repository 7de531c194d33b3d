"""
A policy on a 4-bit base: evaluation and rollouts before and between optimizer steps, and resuming. The processor is
taken as it is: where it has AVX512-BF16, bitsandbytes packs weights in evaluation.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from comparing import Gradients, largest_relative_error
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from trl import RewardConfig

from trl_ext import AdapterReward, DPOConfig, DPOTrainer, GRPOTrainer, PPOTrainer
from trl_ext.run.supervised import RewardTrainer


pytestmark = pytest.mark.train
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


def base(folder: Path, kind: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    if not (folder / "base").exists():
        # bitsandbytes packs layers whose sizes are multiples of 64
        tiny.qwen2(hidden_size=64, intermediate_size=128, initializer_range=0.2).save_pretrained(folder / "base")
    return kind.from_pretrained(folder / "base", quantization_config=tiny.nf4(), **settings)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")


def trainer(trainer_class: Any, folder: Path, name: str, **settings: Any) -> Any:
    given = {"model": base(folder), "peft_config": lora(), "eval_dataset": tiny.prompts(4)}
    if trainer_class is not DPOTrainer:
        return tiny.trainer(trainer_class, folder / name, tiny.hashed, given, **settings)
    rows = [{"prompt": f"w{i} w1", "chosen": " w2", "rejected": " w3 w4"} for i in range(16)]
    given |= {"eval_dataset": Dataset.from_list(rows[:4]), "train_dataset": Dataset.from_list(rows)}
    args = DPOConfig(**tiny.pair_settings(folder / name, **settings))
    return DPOTrainer(args=args, processing_class=tiny.tokenizer(), **given)


TRAINERS = [GRPOTrainer, PPOTrainer, DPOTrainer]


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_prompts_are_shared(tmp_path, trainer_class):
    """The gradient of adapters in bfloat16 is the same up to their rounding."""
    found = []
    for share in (False, "always"):
        gradients = Gradients()
        made = trainer(trainer_class, tmp_path, str(share), share_prefixes=share, max_steps=1)
        made.add_callback(gradients)
        made.train()
        found.append([vector.float() for vector in gradients.vectors])
    assert made.sharing.packed_passes + made.sharing.cached_passes > 0
    assert found[0][0].any() and largest_relative_error(found[1], found[0]) <= 1e-2


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_it_is_evaluated_before_and_between_steps(tmp_path, trainer_class):
    made = trainer(trainer_class, tmp_path, "run", eval_strategy="steps", eval_steps=1, max_steps=2)
    made.evaluate()
    if trainer_class is not DPOTrainer:
        made.roll_out([{"prompt": "w1 w2", "target": 4}], 2, seed=0)
    before = tiny.weights(made.model)
    made.train()
    changed = {name for name, value in tiny.weights(made.model).items() if not torch.equal(before[name], value)}
    assert changed and all("lora" in name or "critic" in name for name in changed)


def test_weights_that_were_packed_before_are_unpacked(tmp_path):
    model = base(tmp_path).eval()
    with torch.no_grad():
        expected = model(torch.tensor([[4, 5, 6]])).logits
    made = tiny.trainer(
        GRPOTrainer, tmp_path / "run", tiny.hashed, {"model": model, "peft_config": lora()}, max_steps=1
    )
    made.train()
    with made.model.disable_adapter(), torch.no_grad():
        found = made.model.eval()(torch.tensor([[4, 5, 6]])).logits
    # Packing has rounded the scales of blocks to bfloat16, which unpacking can't undo
    assert (found - expected).abs().max() < 0.05 < expected.std()


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_a_resumed_run_has_the_same_types_and_weights(tmp_path, trainer_class):
    whole = trainer(trainer_class, tmp_path, "whole", **SAVING)
    whole.train()
    types = {name: value.dtype for name, value in whole.model.named_parameters() if "lora" in name}
    again = trainer(trainer_class, tmp_path, "again", **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert {name: value.dtype for name, value in again.model.named_parameters() if "lora" in name} == types
    for name, value in tiny.weights(whole.model).items():
        assert torch.equal(tiny.weights(again.model)[name], value), name


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_optimizers_with_states_in_8_bits_train_a_critic_at_its_own_rate(tmp_path, optim):
    settings = {**SAVING, "critic": "adapter", "critic_learning_rate": 0.01, "optim": optim}
    whole = trainer(PPOTrainer, tmp_path, "whole", **settings)
    before = tiny.weights(whole.model)
    whole.train()
    assert type(whole.optimizer.optimizer).__module__.startswith("bitsandbytes")
    assert {bool(group.get("is_critic")) for group in whole.optimizer.param_groups} == {True, False}
    moved = {name for name, value in tiny.weights(whole.model).items() if not torch.equal(before[name], value)}
    assert {any("critic" in name.split(".") for name in moved), any(".default." in name for name in moved)} == {True}
    again = trainer(PPOTrainer, tmp_path, "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, value in tiny.weights(whole.model).items():
        assert torch.equal(tiny.weights(again.model)[name], value), name


@pytest.mark.parametrize("start", ["policy", "adapter", "name", "value_model", "reward_model"])
def test_a_critic_of_its_own_does_not_start_from_a_quantized_model(start, tmp_path):
    """It would train its head alone, and couldn't be resumed."""
    given: dict[str, Any] = {"model": base(tmp_path), "peft_config": lora()}
    settings: dict[str, Any] = {"critic": "model"}
    if start == "adapter":
        given = {"model": get_peft_model(given["model"], lora())}
    if start == "name":
        given["model"] = str(tmp_path / "base")
        settings["model_init_kwargs"] = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    if start == "value_model":
        given["value_model"] = scorer(tmp_path)
    if start == "reward_model":
        given["reward_model"] = scorer(tmp_path)
        settings["critic_init"] = "reward"
    with pytest.raises(ValueError, match=r"critic='model'\) would start from a quantized model.*critic='head'"):
        tiny.trainer(PPOTrainer, tmp_path / "run", tiny.hashed, given, **settings)


def scorer(folder: Path) -> Any:
    if not (folder / "scorer").exists():
        tiny.classifier(hidden_size=64, intermediate_size=128).save_pretrained(folder / "scorer")
    quantized = BitsAndBytesConfig(load_in_4bit=True)
    return AutoModelForSequenceClassification.from_pretrained(folder / "scorer", quantization_config=quantized)


def test_a_reward_adapter_is_trained_and_read_on_a_4_bit_base(tmp_path):
    rows = Dataset.from_list([{"chosen_ids": [5, 6 + i % 4], "rejected_ids": [5, 12 + i % 4, 9]} for i in range(16)])
    args = RewardConfig(
        **tiny.pair_settings(tmp_path / "reward", eval_strategy="steps", eval_steps=1, eval_on_start=True)
    )
    learner = RewardTrainer(
        base(tmp_path, AutoModelForSequenceClassification, num_labels=1),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS"),
    )
    learner.train()  # evaluated before and between steps, which packs weights on some processors
    learner.save_model()
    own = base(tmp_path, AutoModelForSequenceClassification, num_labels=1)
    own = PeftModel.from_pretrained(own, tmp_path / "reward").eval()
    reward = AdapterReward(tmp_path / "reward", check_base_name=False)
    given = {"model": base(tmp_path), "peft_config": lora()}
    made = tiny.trainer(GRPOTrainer, tmp_path / "run", reward, given)
    score = made.reward_guards[0].func
    texts = ["w1 w2", "w5", "w7 w8 w9"]
    with torch.no_grad():
        ids = [tiny.tokenizer()(text, return_tensors="pt")["input_ids"] for text in texts]
        wanted = torch.stack([own(row).logits[0, 0].float() for row in ids])
    found = score(prompts=texts, completions=[""] * 3, completion_ids=[[]] * 3)
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, wanted[0])
    made.train()
    assert score(prompts=texts, completions=[""] * 3, completion_ids=[[]] * 3) == found
