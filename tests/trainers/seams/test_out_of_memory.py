"""
Memory that runs out in the middle of training: `torch.OutOfMemoryError`, raised by a hook in the model for as many
rows as "don't fit". It shows what happens after the error, and that what is computed is right; how much memory a part
saves, only a GPU can show.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from comparing import Gradients, equal, largest_relative_error
from transformers import PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from trl_ext import DAPOTrainer, DUPOTrainer, GRPOTrainer, GSPOTrainer, PPOTrainer
from trl_ext.trainers.seams.whole_checkpoints import checkpoints_of, damage


FORWARD, BACKWARD = "forward", "backward"


@contextmanager
def memory_for(rows: int, where: str) -> Iterator[None]:
    """Within this context, passes with gradients of more than so many rows run out of memory, in either direction."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if where == FORWARD and isinstance(module, PreTrainedModel):
            found = getattr(output, "last_hidden_state", None)
            if isinstance(found, torch.Tensor) and found.requires_grad and len(found) > rows:
                full()
        # Late in the backward pass: the layers above have their gradients by then
        first = isinstance(module, Qwen2DecoderLayer) and module.self_attn.layer_idx == 0
        if where == BACKWARD and first and output.requires_grad and len(output) > rows:
            output.register_hook(full)

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "DAPO": (DAPOTrainer, {}, dict),
    "a mean over rows": (GRPOTrainer, {"loss_type": "grpo", "beta": 0.1}, dict),
    "a mean over the micro-batch's tokens": (GRPOTrainer, {"loss_type": "bnpo"}, dict),
    "a quantile of entropies": (GRPOTrainer, {"top_entropy_quantile": 0.5}, dict),
    "DUPO": (DUPOTrainer, {}, dict),
    "GSPO, token": (GSPOTrainer, {"importance_sampling_level": "sequence_token"}, dict),
    "PPO head": (PPOTrainer, {"num_iterations": 1}, dict),
    "PPO model": (PPOTrainer, {"critic": "model", "num_iterations": 2}, dict),
    "LoRA": (GRPOTrainer, {}, lambda: {"peft_config": tiny.lora(task_type="CAUSAL_LM")}),
    "LoRA and an adapter as critic": (
        PPOTrainer,
        {"critic": "adapter", "num_iterations": 1},
        lambda: {"peft_config": tiny.lora(task_type="CAUSAL_LM")},
    ),
}


def trained(folder: Any, case: str, **overrides: Any) -> tuple[Any, Gradients]:
    kind, settings, arguments = CASES[case]
    gradients = Gradients()
    settings = {"optim": "sgd", "max_steps": 2, "fit_micro_batches": False, **settings, **overrides}
    trainer = tiny.trainer(kind, folder, tiny.hashed, {**arguments(), "callbacks": [gradients]}, **settings)
    trainer.train()
    return trainer, gradients


@pytest.mark.train
@pytest.mark.parametrize("where", [FORWARD, BACKWARD])
@pytest.mark.parametrize("case", CASES)
def test_a_micro_batch_in_parts_has_the_gradient_of_the_whole(case, where, tmp_path, caplog):
    whole, expected = trained(tmp_path / "whole", case)
    with memory_for(3, where):  # of 8 rows: in parts of 4, and then of 2
        again, found = trained(tmp_path / "again", case)
    assert again.memory_fallback.parts == 4
    assert caplog.text.count("Out of memory in a micro-batch of 8 rows (CUDA out of memory") == 2
    assert "From now on each is computed in 4 parts" in caplog.text
    assert largest_relative_error(found.vectors, expected.vectors) < 1e-5
    # What the failed attempts have logged is undone, and what they did to the run
    for one, other in zip(tiny.history(again), tiny.history(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True)
    assert again._step == whole._step and again.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    state, before = again.run_state(), whole.run_state()
    for name in ("counters", "refill_stream", "duplicates"):
        assert equal(state.get(name), before.get(name)), name


@pytest.mark.train
def test_with_fitted_micro_batches_and_shared_prompts(tmp_path):
    settings = {"fit_micro_batches": True, "share_prefixes": "always"}
    _, expected = trained(tmp_path / "whole", "DAPO", **settings)
    with memory_for(2, FORWARD):
        _, found = trained(tmp_path / "again", "DAPO", **settings)
    assert largest_relative_error(found.vectors, expected.vectors) < 1e-5


@pytest.mark.train
def test_a_resumed_run_goes_on_in_parts(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    with memory_for(4, BACKWARD):
        trained(tmp_path, "DAPO", **saving)
        kind, settings, _ = CASES["DAPO"]
        again = tiny.trainer(kind, tmp_path, tiny.hashed, **{**settings, **saving, "optim": "sgd"})
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.memory_fallback.parts == 2


@pytest.mark.train
@pytest.mark.parametrize("where", [FORWARD, BACKWARD])
def test_what_does_not_fit_row_by_row_stops_the_run_with_a_checkpoint(where, tmp_path):
    kind, settings, _ = CASES["DAPO"]
    trainer = tiny.trainer(kind, tmp_path, tiny.hashed, max_steps=3, **settings)

    held: list[Any] = []
    step = trainer.training_step

    def later(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 1 and not held:
            held.append(memory_for(0, where))
            held[0].__enter__()
        return step(*args, **kwargs)

    trainer.training_step = later
    try:
        with pytest.raises(torch.OutOfMemoryError) as error:
            trainer.train()
    finally:
        held[0].__exit__(None, None, None)
    notes = "".join(error.value.__notes__)
    assert "each part is as small as it can be" in notes
    assert "per_device_train_batch_size=4 and gradient_accumulation_steps=4" in notes
    (checkpoint,) = checkpoints_of(tmp_path)
    assert checkpoint.name == "checkpoint-1" and damage(checkpoint) is None and str(checkpoint) in notes
