"""
The reference of every trainer is what the policy was when the trainer was made, whatever was done to the policy in
memory, and whatever its adapters are called: before the first step the KL to it is 0, and DPO's loss is log 2.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_ext import DPOConfig, DPOTrainer, GRPOTrainer, PPOTrainer


KINDS = {"grpo": GRPOTrainer, "ppo": PPOTrainer, "dpo": DPOTrainer}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved")
    tiny.stopping().save_pretrained(saved)
    return str(saved)


def loaded(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def with_adapter(folder: str, name: str = "default", **settings: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(loaded(folder), tiny.lora(**settings), adapter_name=name)


def with_another(folder: str, active: str, **settings: Any) -> Any:
    model = with_adapter(folder)
    torch.manual_seed(5)
    model.add_adapter("another", tiny.lora(**settings))
    model.set_adapter(active)
    return model


def resized(folder: str) -> Any:
    model = loaded(folder)
    model.resize_token_embeddings(30)
    return model


def build(kind: str, tmp_path: Any, model: Any, arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    arguments = {"model": model, **(arguments or {})}
    if kind != "dpo":
        own: dict[str, Any] = {"beta": 0.1} if kind == "grpo" else {"num_iterations": 1}
        settings = {"max_steps": 1, **own, **settings}
        return tiny.trainer(KINDS[kind], tmp_path, tiny.hashed, arguments, **settings)
    rows = Dataset.from_dict({"prompt": ["w0 w1"] * 8, "chosen": [" w2"] * 8, "rejected": [" w3 w4"] * 8})
    args = DPOConfig(**tiny.pair_settings(tmp_path, **{"max_steps": 1, **settings}))
    return DPOTrainer(args=args, train_dataset=rows, processing_class=tiny.tokenizer(), **arguments)


def distances(trainer: Any) -> list[float]:
    """How far the policy was from its reference, before each step: the KL, or what DPO's loss differs from log 2."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    if isinstance(trainer, DPOTrainer):
        return [log["loss"] - math.log(2) for log in logs]
    return [log.get("objective/kl", log.get("kl")) for log in logs]


POLICIES: dict[str, tuple[Callable[[str], Any], Any]] = {
    "by name": (lambda folder: folder, None),
    "without a name": (lambda folder: tiny.stopping(), None),
    "merged": (lambda folder: with_adapter(folder).merge_and_unload().requires_grad_(True), None),
    "more tokens": (resized, None),
    "an adapter": (with_adapter, None),
    "an adapter of the user's name": (lambda folder: with_adapter(folder, "policy"), None),
    "of the embedding": (lambda folder: with_adapter(folder, target_modules=["embed_tokens", "q_proj"]), None),
    "another beside it": (lambda folder: with_another(folder, "default"), None),
    "another active": (lambda folder: with_another(folder, "another"), None),
    "another active, smaller": (lambda folder: with_another(folder, "another", target_modules=["q_proj"]), None),
    "a new adapter": (loaded, LoraConfig(target_modules=["q_proj"])),
    "a new adapter, merged before": (
        lambda folder: with_adapter(folder).merge_and_unload(),
        LoraConfig(target_modules=["q_proj"]),
    ),
    "a new adapter of random weights": (loaded, tiny.lora()),
    "pissa": (lambda folder: folder, tiny.lora(init_lora_weights="pissa")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_the_reference_is_the_policy_at_the_start(name, kind, folder, tmp_path):
    make, peft_config = POLICIES[name]
    trainer = build(kind, tmp_path, make(folder), {"peft_config": peft_config})
    trainer.train()
    assert distances(trainer) == [pytest.approx(0, abs=1e-6)]


def adapters(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The weights of an adapter, under names without its own."""
    found = {key: value.clone() for key, value in model.state_dict().items() if name in key.split(".")}
    return {".".join(part for part in key.split(".") if part != name): value for key, value in found.items()}


@pytest.mark.train
@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_adapter_moves_and_its_copy_does_not(kind, folder, tmp_path):
    trainer = build(kind, tmp_path, with_another(folder, "another"), max_steps=3)
    before = {name: adapters(trainer.model, name) for name in ("default", "another", "ref")}
    trainer.train()
    after = {name: adapters(trainer.model, name) for name in before}
    for name in before:
        moved = [not torch.equal(after[name][key], value) for key, value in before[name].items()]
        assert moved and set(moved) == {name == "another"}
    assert trainer.model.active_adapters == ["another"]
    assert abs(distances(trainer)[-1]) > 1e-4


@pytest.mark.train
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_the_copy_of_an_adapter_follows_if_it_is_asked_to(kind, alpha, folder, tmp_path):
    syncing = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": alpha}
    trainer = build(kind, tmp_path, with_adapter(folder, "policy"), max_steps=2, **syncing)
    start = adapters(trainer.model, "policy")
    trainer.train()
    end, copies = adapters(trainer.model, "policy"), adapters(trainer.model, "ref")
    for name, copy in copies.items():
        torch.testing.assert_close(copy, (1 - alpha) * start[name] + alpha * end[name])
        assert not torch.equal(copy, start[name])
    if alpha == 1.0:
        assert distances(trainer)[0] == pytest.approx(0, abs=1e-6) and abs(distances(trainer)[1]) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_whose_reference_follows(kind, folder, tmp_path):
    syncing = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    given = {"peft_config": LoraConfig(target_modules=["q_proj"])}
    trainer = build(kind, tmp_path, loaded(folder), given, **syncing)
    trainer.train()
    end, copies = adapters(trainer.model, "default"), adapters(trainer.model, "ref")
    assert end and all(torch.equal(copies[name], value) for name, value in end.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_memory_moves_and_its_reference_does_not(kind, tmp_path):
    model = tiny.stopping()
    start = tiny.weights(model)
    trainer = build(kind, tmp_path, model)
    trainer.train()
    reference = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict()
    assert all(torch.equal(reference[name], value) for name, value in start.items())
    assert not torch.equal(model.state_dict()["model.norm.weight"], start["model.norm.weight"])


def test_log_probabilities_that_are_computed_before_training_are_those_of_the_trained_adapter(folder, tmp_path):
    trainer = build("dpo", tmp_path, with_another(folder, "another"), precompute_ref_log_probs=True)
    trainer.train()
    assert distances(trainer) == [pytest.approx(0, abs=1e-6)]
    assert "default" in trainer.model.peft_config and "ref" in trainer.model.peft_config


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_head_in_float32(kind, tmp_path):
    model = tiny.stopping().to(torch.bfloat16)
    trainer = build(kind, tmp_path, model, cast_lm_head_to_fp32=True)
    trainer.train()
    assert distances(trainer) == [pytest.approx(0, abs=1e-6)]


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_quantized_model_the_copy_has_the_type_of_the_adapter(kind, tmp_path):
    tiny.qwen2(hidden_size=64, intermediate_size=128, initializer_range=0.2).save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantized)
    model = get_peft_model(base, tiny.lora(), adapter_name="policy")
    trainer = build(kind, tmp_path / "out", model)
    own, copies = adapters(trainer.model, "policy"), adapters(trainer.model, "ref")
    assert {value.dtype for value in own.values()} == {torch.bfloat16}
    for name, value in own.items():
        assert copies[name].dtype == value.dtype and torch.equal(copies[name], value)


@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_a_reference_by_its_folder(kind, folder, tmp_path):
    trainer = build(kind, tmp_path, tiny.stopping(3), {"ref_model": folder})
    reference = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict()
    assert all(torch.equal(reference[name], value) for name, value in tiny.stopping().state_dict().items())
    trainer.train()
    assert abs(distances(trainer)[0]) > 1e-3


def test_a_reference_by_its_folder_has_the_type_of_the_policy(folder, tmp_path):
    trainer = build("dpo", tmp_path, tiny.stopping().to(torch.bfloat16), {"ref_model": folder})
    assert trainer.ref_model.dtype == torch.bfloat16


# What is refused


def both_active(folder: str) -> Any:
    model = with_another(folder, "default")
    model.base_model.set_adapter(["default", "another"])
    return model


def with_trained_base(folder: str) -> Any:
    model = with_adapter(folder)
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


REFUSED = {
    "two active adapters": (both_active, r"has 2 active adapters, \['default', 'another'\].*model\.set_adapter"),
    "an adapter `ref`": (lambda folder: with_adapter(folder, "ref"), r"an adapter 'ref' already.*delete_adapter"),
    "weights beside the adapter": (with_trained_base, "1 weights outside of the adapter 'default' are trained"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_policy_whose_reference_would_be_another(name, kind, folder, tmp_path):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build(kind, tmp_path, make(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_of_an_adapter(kind, folder, tmp_path):
    with_adapter(folder).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model='.*adapter' is the folder of an adapter.*AutoPeftModelForCausalLM"):
        build(kind, tmp_path, str(tmp_path / "adapter"))


@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_a_reference_that_can_not_follow_an_adapter(kind, folder, tmp_path):
    given = {"ref_model": tiny.stopping(1)}
    with pytest.raises(ValueError, match=r"sync_ref_model mixes the weights.*Leave out ref_model"):
        build(kind, tmp_path, with_adapter(folder), given, sync_ref_model=True)


def test_a_reference_that_moves_and_is_computed_once(folder, tmp_path):
    with pytest.raises(ValueError, match=r"sync_ref_model=True moves the reference, and precompute_ref_log_probs"):
        build("dpo", tmp_path, folder, sync_ref_model=True, precompute_ref_log_probs=True)


def test_a_reference_that_nothing_needs(folder, tmp_path):
    with pytest.raises(ValueError, match=r"sync_ref_model=True with beta=0: there is no reference.*Set beta"):
        build("grpo", tmp_path, folder, beta=0.0, sync_ref_model=True)


def test_log_probabilities_of_a_model_without_its_new_adapter(folder, tmp_path):
    given = {"peft_config": tiny.lora(init_lora_weights="pissa")}
    with pytest.raises(ValueError, match=r"Set precompute_ref_log_probs=False"):
        build("dpo", tmp_path, loaded(folder), given, precompute_ref_log_probs=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_can_be_passed_again_after_an_error(kind, folder, tmp_path):
    model = with_adapter(folder, "policy")
    with pytest.raises(ValueError):
        build(kind, tmp_path, model, {"quantization_config": "none", "peft_config": tiny.lora()})
    assert set(model.peft_config) == {"policy"} and "add_adapter" not in vars(model)
    build(kind, tmp_path, model)
    assert set(model.peft_config) == {"policy", "ref"}


def test_trls_own_reference_of_these_is_another(folder, tmp_path):
    """What is kept from TRL, so that this can go if it no longer happens."""
    args = trl.DPOConfig(**tiny.pair_settings(tmp_path))
    with pytest.raises(KeyError, match="default"):
        trl.DPOTrainer(
            with_adapter(folder, "policy"),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["w0"] * 8, "chosen": [" w2"] * 8, "rejected": [" w3"] * 8}),
            processing_class=tiny.tokenizer(),
        )
