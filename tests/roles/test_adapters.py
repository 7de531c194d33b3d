"""The adapter that is trained, and its copy inside the model, whatever its kind, its name and its neighbours."""

import pytest
import tiny
import torch
from peft import AdaptionPromptConfig, IA3Config, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from trl_ext.roles.adapters import (
    add_reference_adapter,
    check_only_adapter_trained,
    starts_without_effect,
    trained_adapter,
    weight_pairs,
)


def random_lora(**settings):
    return tiny.lora(target_modules=["q_proj"], **settings)


CONFIGS = {
    "lora": random_lora(),
    "of the embedding": tiny.lora(target_modules=["embed_tokens", "q_proj"]),
    "dora": random_lora(use_dora=True),
    "new tokens": random_lora(trainable_token_indices=[5, 6]),
    "modules_to_save": random_lora(modules_to_save=["lm_head"]),
    "ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "vera": VeraConfig(r=4, target_modules=["q_proj"], d_initial=0.5),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def with_adapter(config, name="default", seed=0):
    torch.manual_seed(seed)
    model = get_peft_model(tiny.stopping(), config, adapter_name=name)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.rand_like(weight))  # not what a new adapter starts with
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[4, 5, 6, 7]])).logits


@pytest.mark.parametrize("name", ["default", "policy"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_copy_is_the_policy_as_it_was(kind, name):
    model = with_adapter(CONFIGS[kind], name)
    before, own = logits(model), get_peft_model_state_dict(model, adapter_name=name)
    add_reference_adapter(model)
    assert torch.equal(logits(model), before) and trained_adapter(model) == name
    pairs = list(weight_pairs(model, name))
    assert len(pairs) == sum(weight.requires_grad for weight in model.parameters()) > 0
    for mine, copy in pairs:
        assert torch.equal(mine, copy) and mine.requires_grad and not copy.requires_grad
        mine.data.add_(1.0)
    model.set_adapter("ref")
    assert torch.equal(logits(model), before)
    model.set_adapter(name)
    assert not torch.equal(logits(model), before)
    assert own.keys() == get_peft_model_state_dict(model, adapter_name="ref").keys()


def test_a_copy_does_not_change_the_base_model():
    """PiSSA takes what the adapter holds out of the base model: a second one would take more out of it."""
    model = with_adapter(tiny.lora(init_lora_weights="pissa"))
    before = tiny.weights(model)
    add_reference_adapter(model)
    after = tiny.weights(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.peft_config["default"].init_lora_weights == "pissa"


def test_the_trained_adapter_is_the_active_one():
    model = with_adapter(tiny.lora())
    model.add_adapter("another", tiny.lora())
    assert trained_adapter(model) == "default"
    model.set_adapter("another")
    assert trained_adapter(model) == "another"
    model.base_model.set_adapter(["default", "another"])
    with pytest.raises(ValueError, match=r"has 2 active adapters, \['default', 'another'\].*model\.set_adapter"):
        trained_adapter(model)


NEW = {
    "lora": (LoraConfig(target_modules=["q_proj", "embed_tokens"]), True),
    "random lora": (tiny.lora(), False),
    "random lora of the embedding": (tiny.lora(target_modules=["embed_tokens"]), False),
    "gaussian": (tiny.lora(init_lora_weights="gaussian"), True),
    "dora": (LoraConfig(target_modules=["q_proj"], use_dora=True), True),
    "pissa": (tiny.lora(init_lora_weights="pissa"), False),
    "olora": (tiny.lora(init_lora_weights="olora"), False),
    "ia3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), True),
    "random ia3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False), False),
    "prompt tuning": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False),
}


@pytest.mark.parametrize("kind", NEW)
def test_whether_a_new_adapter_has_no_effect_yet(kind):
    config, without = NEW[kind]
    torch.manual_seed(0)
    model = get_peft_model(tiny.stopping(), config)
    own = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert starts_without_effect(model) == without
    if without:
        assert torch.equal(own[:, -4:], base)
    elif kind != "prompt tuning":
        assert not torch.allclose(own, base)


def test_weights_beside_the_adapter():
    model = with_adapter(tiny.lora(modules_to_save=["lm_head"]))
    check_only_adapter_trained(model)
    next(model.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 weights outside of the adapter 'default' are trained.*embed_tokens"):
        check_only_adapter_trained(model)
    biased = get_peft_model(tiny.stopping(), LoraConfig(target_modules=["q_proj"], bias="all"))
    with pytest.raises(ValueError, match=r"bias='none'"):
        check_only_adapter_trained(biased)
    with pytest.raises(ValueError, match=r"PEFT says: LoraModel supports only 1 adapter with bias.*ref_model"):
        add_reference_adapter(biased)


def test_an_adapter_that_can_not_be_copied():
    model = get_peft_model(tiny.gpt2(), AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"ref_model where the trainer takes one"):
        add_reference_adapter(model)
