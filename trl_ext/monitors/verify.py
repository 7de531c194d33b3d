"""
Is the gradient the same, and what is saved? Measured on the user's own model and data.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..rollouts.micro_batches import MicroBatch, SavedCompute
from ..trainers.grpo import GRPOTrainer
from ..trainers.seams.probes import preview_micro_batches


@dataclass(frozen=True)
class Side:
    """
    One optimizer step's forward and backward passes.

    Args:
        seconds (`float`):
            Median over the repetitions.
        memory (`int`):
            Bytes: on a GPU the peak of what is allocated beyond what was before; on a CPU the tensors that autograd
            keeps for the backward pass of the largest micro-batch.
        token_slots (`int`):
            Tokens that are computed, padding included.
    """

    seconds: float
    memory: int
    token_slots: int


@dataclass(frozen=True)
class Verification:
    """
    What [`verify`] measured. Printed, it is a table.

    Args:
        grad_relative_error (`float`):
            Norm of the difference of the two gradients over the norm of TRL's.
        trl, trl_ext ([`Side`]):
            The same rollouts in TRL's micro-batches and in ours.
        micro_batches, rows, skipped_rows, merged_rows (`int`):
            Of the step: micro-batches on a process; completions on all of them, left out, and weighed as copies.
        title (`str`):
            Model, loss, device and type of the weights.
        reasons (`tuple[str]`):
            Savings that are not exact here, and so not used.
    """

    grad_relative_error: float
    trl: Side
    trl_ext: Side
    micro_batches: int
    rows: int
    skipped_rows: int
    merged_rows: int
    title: str
    reasons: tuple[str, ...]

    @property
    def time_ratio(self) -> float:
        """Ours over TRL's."""
        return self.trl_ext.seconds / self.trl.seconds

    @property
    def memory_ratio(self) -> float:
        """Ours over TRL's."""
        return self.trl_ext.memory / self.trl.memory

    def __str__(self) -> str:
        def line(name: str, theirs: float, ours: float, digits: int) -> str:
            return f"{name:<28}{theirs:>12,.{digits}f}{ours:>12,.{digits}f}{ours / theirs:>9.2f}"

        lines = [
            self.title,
            f"{self.rows} completions in {self.micro_batches} micro-batches a process; {self.skipped_rows} can't move "
            f"the policy, {self.merged_rows} are copies",
            f"{'one step, without generation':<28}{'TRL':>12}{'trl_ext':>12}{'ratio':>9}",
            line("seconds", self.trl.seconds, self.trl_ext.seconds, 3),
            line("tokens computed", self.trl.token_slots, self.trl_ext.token_slots, 0),
            line("memory of activations, MB", self.trl.memory / 1e6, self.trl_ext.memory / 1e6, 2),
            f"relative gradient error: {self.grad_relative_error:.1e}",
        ]
        return "\n".join([*lines, *(f"not saved: {reason}" for reason in self.reasons)])


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """
    Dropout off while the model stays in training mode: with it, no two passes have the same gradient. Attention layers
    read a rate of their own, or that of a dropout layer which they don't call.
    """
    rates = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
        and (name == "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout" in name)
    ]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


@contextmanager
def checkpointing_as_in_training(trainer: GRPOTrainer) -> Iterator[None]:
    """Activation checkpointing, which transformers switches on when training begins: memory depends on it."""
    model: Any = trainer.model
    wanted = trainer.args.activation_checkpointing and hasattr(model, "activation_checkpointing_enable")
    if not wanted or model.is_activation_checkpointing:
        yield
        return
    kwargs: Any = trainer.args.activation_checkpointing_kwargs
    given = dict(kwargs or {})
    own = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=given or None, **own)
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


class KeptForBackward:
    """
    Bytes that autograd keeps between forward and backward pass of a micro-batch, weights left aside; the largest of
    those that were measured in `with` blocks.

    Args:
        model (`nn.Module`):
            Whose weights don't count.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.peak = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.peak = max(self.peak, sum(kept.values()))


def _gradient(trainer: GRPOTrainer, micro_batches: list[MicroBatch], kept: KeptForBackward | None) -> torch.Tensor:
    """The gradient of one optimizer step over all processes, as one vector in float32."""
    model: Any = trainer.model
    model.zero_grad(set_to_none=True)
    for batch in micro_batches:
        if kept is None:
            trainer.compute_loss(model, batch).backward()
            continue
        with kept.measuring():
            loss = trainer.compute_loss(model, batch)
        loss.backward()
    # Experts that no token went to have none
    learned = [p for p in model.parameters() if p.requires_grad]
    gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in learned]
    gradient: torch.Tensor = trainer.accelerator.reduce(torch.cat(gradients), reduction="mean")
    model.zero_grad(set_to_none=True)
    return gradient


def _seconds(trainer: GRPOTrainer, micro_batches: list[MicroBatch]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    _gradient(trainer, micro_batches, None)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _memory(trainer: GRPOTrainer, micro_batches: list[MicroBatch]) -> tuple[torch.Tensor, int]:
    kept = KeptForBackward(trainer.model)
    if trainer.accelerator.device.type != "cuda":
        return _gradient(trainer, micro_batches, kept), kept.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient = _gradient(trainer, micro_batches, None)
    return gradient, torch.cuda.max_memory_allocated() - before


def verify(trainer: GRPOTrainer, repetitions: int = 3, quiet: bool = False) -> Verification:
    """
    Generate one batch with the trainer's model, data and rewards, and take the gradient of its first optimizer step
    twice: in TRL's micro-batches, by TRL's code, and in ours. Nothing is trained; random states, metrics and logs are
    left as they were. With several processes, all must make the call.

    Args:
        trainer ([`GRPOTrainer`]):
            Before or between its trainings.
        repetitions (`int`, *optional*, defaults to `3`):
            Timed passes over each, in turn.
        quiet (`bool`, *optional*, defaults to `False`):
            Don't print the table.

    Returns:
        [`Verification`]

    Raises:
        TypeError: for a trainer that isn't one of `trl_ext`.
        ValueError: where weights are sharded (DeepSpeed, FSDP), or no completion of the batch has an advantage.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(
            f"verify compares a trainer of trl_ext with TRL, but this is a {type(trainer).__name__}. Build a "
            "trl_ext.GRPOTrainer with the same arguments, or add a trl_ext.WasteCallback to this one."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "verify needs the whole model on each device, but its weights are sharded. Run it once without DeepSpeed "
            "or FSDP, on a smaller model of the same architecture if it must be."
        )
    model: Any = trainer.model
    was_training, steps = model.training, getattr(trainer, "current_gradient_accumulation_steps", 1)
    adapts, trainer.use_adaptive_entropy = trainer.use_adaptive_entropy, False  # it would after each micro-batch
    metrics = {key: list(values) for key, values in trainer.train_metrics.items()}
    count = min(trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation or 1)
    trainer.current_gradient_accumulation_steps = count
    model.train()
    try:
        dealt = preview_micro_batches(trainer)[:count]
        saved = SavedCompute()
        fitted = trainer.fit(dealt, [(0, count)], saved)
        sides = {"trl": dealt, "trl_ext": fitted}
        with without_dropout(model), checkpointing_as_in_training(trainer):
            measured = {name: _memory(trainer, batches) for name, batches in sides.items()}
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for i in range(repetitions):
                for name in sides if i % 2 == 0 else reversed(sides):
                    seconds[name].append(_seconds(trainer, sides[name]))
    finally:
        model.train(was_training)
        trainer.use_adaptive_entropy = adapts
        trainer.current_gradient_accumulation_steps = steps
        trainer.train_metrics.clear()
        trainer.train_metrics.update(metrics)
    theirs, ours = (measured[name][0] for name in sides)
    if not theirs.any():
        raise ValueError(
            "No completion of this batch has an advantage, so there is no gradient to compare. Call verify again with "
            "another `seed`, or on prompts that the model solves sometimes."
        )
    weights = next(model.parameters())
    name, dtype = type(trainer.accelerator.unwrap_model(model)).__name__, str(weights.dtype).removeprefix("torch.")
    result = Verification(
        grad_relative_error=((ours - theirs).norm() / theirs.norm()).item(),
        trl=Side(statistics.median(seconds["trl"]), measured["trl"][1], saved.token_slots_trl),
        trl_ext=Side(statistics.median(seconds["trl_ext"]), measured["trl_ext"][1], saved.token_slots),
        micro_batches=count,
        rows=saved.rows,
        skipped_rows=saved.skipped_rows,
        merged_rows=saved.merged_rows,
        title=f"{name}, loss_type={trainer.loss_type}, {weights.device} {dtype}",
        reasons=trainer.exact_savings.reasons,
    )
    if not quiet and trainer.is_world_process_zero():
        print(result, flush=True)
    return result
