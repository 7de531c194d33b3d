"""What passes take on fake tensors, against real passes of the same models."""

from typing import Any

import pytest
import torch
from planner.jobs import job

from trl_ext.planner import passes
from trl_ext.planner.models import build_policy
from trl_ext.planner.passes import UpdateBytes, scoring_pass_bytes, update_bytes
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
    known = [*inputs.values(), labels, *policy.parameters(), *policy.buffers()]
    known += [weight.grad for weight in policy.parameters() if weight.grad is not None]
    with head_as_on_gpus(), LiveBytes(known) as live:
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
