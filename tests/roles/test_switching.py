"""Which adapter computes inside a context, what is recomputed with it, and that all is as before afterwards."""

import copy
import threading
from contextlib import nullcontext

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from roles.test_adapters import CONFIGS, logits, with_adapter
from trl_ext.roles.switching import adapter_layers, using_adapter


IDS = torch.tensor([[4, 5, 6, 7, 8], [9, 4, 10, 11, 12]])


def two_adapters(config=None, base=None):
    """`default` is active and trained; `other` is trained too. Both have an effect."""
    torch.manual_seed(1)
    model = get_peft_model(tiny.qwen2() if base is None else base, config or tiny.lora())
    model.add_adapter("other", copy.deepcopy(config or tiny.lora()))
    for name, weight in model.named_parameters():
        if any(part in name for part in ("lora", "ia3", "vera_lambda", "modules_to_save", "trainable_tokens")):
            weight.data = weight.data + 0.3 * torch.rand_like(weight)
            weight.requires_grad_(".original" not in name and "vera_A" not in name and "vera_B" not in name)
    return model


def state(model):
    return (
        [(module.active_adapter, module.disable_adapters) for module in adapter_layers(model)],
        [weight.requires_grad for weight in model.parameters()],
        [module.training for module in model.modules()],
        (model.active_adapter, model.active_adapters),
        [vars(module).get("_gradient_checkpointing_func") for module in model.modules()],
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_computes_as_the_named_adapter_and_leaves_everything_as_it_was(kind):
    model = with_adapter(CONFIGS[kind]) if "prompt" in kind else two_adapters(CONFIGS[kind])
    if "prompt" in kind:
        model.add_adapter("other", CONFIGS[kind])
    twin = copy.deepcopy(model)
    expected = {"default": logits(twin)}
    with twin.disable_adapter():
        expected[None] = logits(twin)
    twin.set_adapter("other")
    expected["other"] = logits(twin)
    assert not torch.equal(expected["other"], expected["default"])
    model.train()
    before = state(model)
    for adapter, wanted in expected.items():
        with using_adapter(model, adapter):
            assert torch.equal(logits(model), wanted), adapter
            assert adapter is None or model.active_adapters == [adapter]
        assert state(model) == before
        assert torch.equal(logits(model), expected["default"])
    with pytest.raises(ZeroDivisionError), using_adapter(model, "other"):
        raise ZeroDivisionError
    assert state(model) == before


def test_layers_without_the_adapter_compute_alone():
    """One adapter covers more layers than the other, and a whole copy of the head."""
    model = get_peft_model(tiny.qwen2(tie_word_embeddings=False), tiny.lora(modules_to_save=["lm_head"]))
    model.add_adapter("other", tiny.lora(target_modules=["k_proj"]))
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.zero_()
    twin = copy.deepcopy(model)
    twin.set_adapter("other")
    with using_adapter(model, "other"):
        assert logits(model).any() and torch.equal(logits(model), logits(twin))
        head = model.base_model.model.lm_head
        assert head.weight is head.original_module.weight  # which a fused head reads
    assert not logits(model).any()


def gradients(model, adapter):
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None and f".{adapter}." in name
    }


def loss(model):
    return model(IDS).logits.float().square().mean()


CHECKPOINTING = {"off": None, "not reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


def four_bit(folder):
    tiny.qwen2(hidden_size=64, intermediate_size=128, initializer_range=0.2).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=tiny.nf4())


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("quantized", [False, True])
def test_one_backward_through_passes_of_two_adapters(checkpointing, quantized, tmp_path):
    """Each gets the gradient that it gets alone, whichever is active by the time of the backward pass."""
    model = two_adapters(base=four_bit(tmp_path) if quantized else None)
    alone = {}
    for adapter in ("default", "other"):
        model.zero_grad()
        trained = [(weight, weight.requires_grad) for weight in model.parameters()]
        model.set_adapter(adapter)
        loss(model).backward()
        alone |= gradients(model, adapter)
        for weight, required in trained:
            weight.requires_grad_(required)
    model.set_adapter("default")
    for weight, required in trained:
        weight.requires_grad_(required)
    model.zero_grad()
    assert all(gradient.any() for gradient in alone.values()) and len(alone) == 16
    model.train()
    if CHECKPOINTING[checkpointing] is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
    before = state(model)
    own = loss(model)
    with using_adapter(model, "other"):
        others = loss(model)
    with using_adapter(model, None):
        loss(model)  # a reference
    (own + others).backward()
    assert state(model) == before
    found = gradients(model, "default") | gradients(model, "other")
    assert found.keys() == alone.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-5, atol=1e-8, msg=name)


def test_a_backward_pass_inside_another_context_recomputes_alike():
    model = two_adapters().train()
    model.enable_input_require_grads()
    with using_adapter(model, "other"):
        loss(model).backward()
    expected = gradients(model, "other")
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with using_adapter(model, "other"):
        found = loss(model)
    with using_adapter(model, None):
        found.backward()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model, "other").items())
    assert expected.keys() == gradients(model, "other").keys()


# Wrong nesting


def test_the_same_adapter_again_is_no_error():
    model = two_adapters()
    with using_adapter(model, "other"):
        expected = logits(model)
        with using_adapter(model.base_model.model.model.layers[0], "other"), using_adapter(model, "other"):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)


def test_a_context_of_a_part_and_then_of_the_whole():
    model = two_adapters()
    with using_adapter(model, "other"):
        expected = logits(model)
    with using_adapter(model.base_model.model.model.layers[0], "other"):
        assert not torch.equal(logits(model), expected)
        with using_adapter(model, "other"):
            assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("inner", ["default", None])
def test_a_different_adapter_inside_is_an_error(inner):
    model = two_adapters()
    before, own = state(model), logits(model)
    with (
        pytest.raises(RuntimeError, match="computes with the adapter 'other' in a context that is still open"),
        using_adapter(model, "other"),
        using_adapter(model, inner),
    ):
        pass
    assert state(model) == before and torch.equal(logits(model), own)
    with using_adapter(model, inner):
        pass


def test_contexts_left_in_the_wrong_order_are_an_error():
    model = two_adapters()
    before = state(model)
    outer, inner = using_adapter(model, "other"), using_adapter(model, "other")
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="'other' is left before a context inside of it"):
        outer.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="'other' was left already"):
        inner.__exit__(None, None, None)
    assert state(model) == before
    with using_adapter(model, None):
        pass


def test_another_thread_is_refused():
    model = two_adapters()
    errors = []

    def score():
        try:
            with using_adapter(model, "other"):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    for context in (using_adapter(model, "other"), nullcontext()):
        with context:
            thread = threading.Thread(target=score)
            thread.start()
            thread.join()
    assert len(errors) == 1
    assert "Another thread computes with the adapter 'other'" in errors[0] and "Score in the thread" in errors[0]


def test_what_can_not_be_switched_is_refused():
    model = two_adapters()
    with (
        pytest.raises(ValueError, match=r"has no adapter 'critic'\. It has default, other\."),
        using_adapter(model, "critic"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="no adapters to switch in a Qwen2ForCausalLM"),
        using_adapter(tiny.qwen2(), None),
    ):
        pass
    model.merge_adapter()
    with (
        pytest.raises(ValueError, match=r"\['default'\] are merged into the base model.*unmerge_adapter"),
        using_adapter(model, None),
    ):
        pass


def test_a_copy_of_a_model_has_contexts_of_its_own():
    model = two_adapters()
    with using_adapter(model, "other"):
        twin = copy.deepcopy(model)
        expected = logits(model)
        with using_adapter(twin, None):
            assert torch.equal(logits(model), expected)


def test_a_model_that_peft_changed_without_wrapping_it():
    base = tiny.qwen2()
    base.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "one")
    base.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "two")
    base.set_adapter("one")
    own = logits(base)
    with using_adapter(base, "two"):
        assert not torch.equal(logits(base), own)
    assert torch.equal(logits(base), own)
