"""What passes take on fake tensors, against real passes of the same models."""

from typing import Any

import pytest
import torch
from planner.jobs import job, shape

from trl_ext.planner import passes
from trl_ext.planner.models import build_policy, count_numbers
from trl_ext.planner.passes import (
    UpdateBytes,
    prefill_bytes,
    reward_pass_bytes,
    scoring_pass_bytes,
    update_bytes,
)
from trl_ext.roles.critic import CRITICS, base_model_of
from trl_ext.trainers.seams.fake_passes import LiveBytes, head_as_on_gpus


def real(planned: Any) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A model with weights, and its inputs."""
    policy = build_policy(planned, planned.model.layers).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*policy.parameters(), *policy.buffers()):
            tensor.copy_(torch.randn(tensor.shape) * 0.02)
    if planned.gradient_checkpointing:
        base_model_of(policy).gradient_checkpointing_enable({"use_reentrant": False})
        base_model_of(policy).enable_input_require_grads()
    ids = torch.randint(0, 512, (planned.rows, planned.tokens))
    labels = torch.zeros((planned.rows, planned.completion_tokens + 1), dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # without padding, transformers makes no mask
    return policy.train(), {"input_ids": ids, "attention_mask": mask}, labels


def measured(planned: Any) -> UpdateBytes:
    """Every storage that is alive in a real forward and backward pass."""
    policy, inputs, labels = real(planned)
    for weight in policy.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    known = [*policy.parameters(), *policy.buffers()]
    known += [weight.grad for weight in policy.parameters() if weight.grad is not None]
    with head_as_on_gpus(), LiveBytes(known) as live:
        inputs, labels = {name: tensor.clone() for name, tensor in inputs.items()}, labels.clone()
        outputs = policy(**inputs, labels=labels, fused_lm_head=True)
        loss = passes._loss_of(planned, outputs, None)
        del outputs
        kept, forward = live.bytes, live.peak
        live.reset_peak()
        loss.backward()
        return UpdateBytes(kept, forward, live.peak)


def saved_for_backward(planned: Any) -> int:
    """By the hooks of torch's own, without what is a weight or an input."""
    policy, inputs, labels = real(planned)
    known = {t.untyped_storage().data_ptr() for t in (*inputs.values(), labels, *policy.parameters())}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, or its place would be given away
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = policy(**inputs, labels=labels, fused_lm_head=True)
        passes._loss_of(planned, outputs, None)
    return sum(size for size, _ in found.values())


SIZES = {"strategy": "zero3", "per_device_train_batch_size": 4, "prompt_tokens": 48, "completion_tokens": 80}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_an_update_takes_what_a_real_one_takes(critic, gradient_checkpointing):
    """Six layers, by two and four of them: within 5 %."""
    planned = job(critic=critic, gradient_checkpointing=gradient_checkpointing, **SIZES)
    found, expected = update_bytes(planned), measured(planned)
    for name in ("kept", "forward", "backward"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0.05), name


def test_what_is_kept_is_what_autograd_saves():
    """Without checkpointing. Beside it, a few results that the loss no longer needs are alive: within 5 %."""
    planned = job(gradient_checkpointing=False, **SIZES)
    assert update_bytes(planned).kept == pytest.approx(saved_for_backward(planned), rel=0.05)


@pytest.mark.filterwarnings("error::FutureWarning")  # which `trl-ext plan` would print
def test_checkpointing_keeps_less():
    kept = [update_bytes(job(gradient_checkpointing=on, **SIZES)).kept for on in (True, False)]
    assert 4 * kept[0] < kept[1]


def test_shared_prompts_take_less_than_their_copies():
    sizes = SIZES | {"prompt_tokens": 96, "completion_tokens": 16}
    shared, copied = (update_bytes(job(share_prefixes=share, **sizes)).kept for share in (True, False))
    assert shared < 0.5 * copied


def test_a_pass_without_gradients_takes_no_more_for_more_layers():
    planned = job(**SIZES)
    assert scoring_pass_bytes(planned) < update_bytes(planned).backward
    deeper = planned.but(model=type(planned.model)("deeper", planned.model.with_layers(24)))
    assert scoring_pass_bytes(deeper) == scoring_pass_bytes(planned)
    assert update_bytes(deeper).kept > 2.5 * update_bytes(planned).kept


def test_live_bytes_forget_what_is_freed():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first.view(10, 100)  # the same storage
        assert live.bytes == 4000
        del first
        assert live.bytes == 4000
        del second
        torch.zeros(10)
    assert live.bytes == 0 and live.peak == 4000


def test_autocast_keeps_a_copy_of_every_weight():
    """In one process, all weights are in float32 and cast for a pass: 2 bytes for each number of a linear layer."""
    full = job(lora_r=0, reference="model", per_device_train_batch_size=1, prompt_tokens=8, completion_tokens=8)
    deeper = full.but(model=type(full.model)("deeper", full.model.with_layers(24)))
    layer = count_numbers(full).layer - 2 * 64 - 128  # but not of norms and biases
    expected = 2 * (24 - full.model.layers) * layer
    for of_pass in (scoring_pass_bytes, prefill_bytes):
        assert of_pass(deeper) - of_pass(full) == pytest.approx(expected, rel=0.05), of_pass
    # An adapter generates without autocast, and its base is in bfloat16 already
    adapted = job(per_device_train_batch_size=1, prompt_tokens=8, completion_tokens=8)
    assert prefill_bytes(adapted) == prefill_bytes(adapted.but(model=deeper.model))


def test_shared_rows_by_hand():
    """A copy of the prompt's last token stands before each branch. Groups of 4, and pairs, have rows of their own."""
    sizes = {"prompt_tokens": 10, "completion_tokens": 5, "share_prefixes": True}
    shapes = {
        "one group": job("grpo", num_generations=4, per_device_train_batch_size=4, **sizes),
        "two groups": job("grpo", num_generations=4, per_device_train_batch_size=8, **sizes),
        "half a group": job("grpo", num_generations=4, per_device_train_batch_size=2, **sizes),
        "pairs": job("dpo", per_device_train_batch_size=3, **sizes),
    }
    assert {name: planned.batch_shape for name, planned in shapes.items()} == {
        "one group": (1, 10 + 4 * 6),
        "two groups": (2, 10 + 4 * 6),
        "half a group": (1, 10 + 2 * 6),
        "pairs": (3, 10 + 2 * 6),
    }


def test_a_reward_model_scores_in_the_type_that_it_was_loaded_in():
    """Twice as much in float32, as it is loaded beside a policy whose weights are all trained."""
    trained = [job(lora_r=lora_r, reference=None, reward="model") for lora_r in (0, 4)]
    wide, narrow = map(reward_pass_bytes, trained)
    assert 1.7 * narrow < wide < 2.1 * narrow


def test_a_pass_of_the_reference_comes_beside_what_the_policy_keeps():
    """DPO's reference has its pass between the policy's forward and backward pass."""
    with_reference, without = (update_bytes(job("dpo", critic=None, reference=r)) for r in ("adapter", None))
    assert with_reference.forward > without.forward


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("lora_r", [0, 8])
def test_a_deep_model_takes_what_two_shallow_ones_foretell(critic, lora_r):
    """Where the head takes the most in a shallow model, and the critic's pass, or autocast's copies, in a deep one."""
    if critic == "adapter" and not lora_r:
        pytest.skip("an adapter critic is beside LoRA")
    reference = "adapter" if lora_r else "model"
    model = shape(vocab_size=4096, num_hidden_layers=20)
    planned = job(critic=critic, lora_r=lora_r, reference=reference, model=model, prompt_tokens=8, completion_tokens=8)
    asked = passes._Pass(*planned.batch_shape, planned.scored_columns)
    measured = max(passes._measure_without_gradients(planned, asked, 20))
    assert scoring_pass_bytes(planned) == pytest.approx(measured, rel=1e-3)
    kept, backward, forward = passes._measure_update(planned, 20)
    found = update_bytes(planned)
    assert found.kept == pytest.approx(kept, rel=1e-3)
    assert found.forward == pytest.approx(max(forward), rel=1e-3)
    assert found.backward == pytest.approx(backward, rel=0.03)


def test_generation_takes_a_copy_of_the_head_and_the_logits_of_last_tokens():
    """Under autocast. What grows with the vocabulary: 2 bytes a number of the head, and a few of each row's logits."""
    full = job(lora_r=0, reference="model", prompt_tokens=32)
    narrow, wide = (prefill_bytes(full.but(model=shape(vocab_size=size))) for size in (512, 4096))
    assert wide - narrow == pytest.approx(2 * 64 * (4096 - 512), rel=0.1)
