"""
Measures on the user's own model and data whether the gradient is TRL's, and how much time and memory are saved.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import require, require_count
from ..rollouts.micro_batches import MicroBatch, SavedCompute
from ..rollouts.prefix_exactness import dropout_rates
from ..trainers.grpo import GRPOTrainer
from ..trainers.seams.probes import preview_micro_batches


@dataclass(frozen=True)
class Side:
    """
    Forward and backward passes of one optimizer step.

    Args:
        seconds (`float`):
            Median over the repetitions.
        memory (`int`):
            Bytes. On a GPU: the peak of allocated memory, minus what was allocated before. On a CPU: the tensors that
            autograd keeps for the backward pass, for the micro-batch that keeps most.
        token_slots (`int`):
            Tokens that are computed, including padding.
    """

    seconds: float
    memory: int
    token_slots: int


@dataclass(frozen=True)
class Verification:
    """
    The result of [`verify`]. Its `str` is a table.

    Args:
        grad_relative_error (`float`):
            Norm of the difference of the two gradients, divided by the norm of TRL's.
        trl, trl_ext ([`Side`]):
            The same rollouts in TRL's micro-batches, and in ours.
        micro_batches (`int`):
            Micro-batches of the step on one process.
        rows (`int`):
            Completions of the step on all processes.
        skipped_rows, merged_rows (`int`):
            How many of them are not computed because they can't move the policy, and because they are copies of rows
            that are computed with a weight.
        title (`str`):
            Model, loss, device and type of the weights.
        reasons (`tuple[str]`):
            For each saving that is not exact here, and therefore not used, why.
        shared_slots (`int`):
            Tokens that are not computed because completions share their prompt.
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
    shared_slots: int = 0

    @property
    def time_ratio(self) -> float:
        """Our seconds over TRL's."""
        return self.trl_ext.seconds / self.trl.seconds

    @property
    def memory_ratio(self) -> float:
        """Our memory over TRL's."""
        return self.trl_ext.memory / self.trl.memory

    def __str__(self) -> str:
        def line(name: str, theirs: float, ours: float, digits: int) -> str:
            return f"{name:<28}{theirs:>12,.{digits}f}{ours:>12,.{digits}f}{ours / theirs:>9.2f}"

        shared = f"; shared prompts save {self.shared_slots:,} tokens" if self.shared_slots else ""
        lines = [
            self.title,
            f"{self.rows} completions in {self.micro_batches} micro-batches a process; {self.skipped_rows} can't move "
            f"the policy, {self.merged_rows} are copies{shared}",
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
    Switches dropout off while the model stays in training mode: with dropout, no two passes have the same gradient.
    """
    rates = list(dropout_rates(model))
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


@contextmanager
def checkpointing_as_in_training(trainer: GRPOTrainer) -> Iterator[None]:
    """Switches activation checkpointing on as transformers does when training begins, because memory depends on it."""
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
    Counts the bytes that autograd keeps between the forward and the backward pass of a micro-batch, without weights.

    Args:
        model (`nn.Module`):
            The model whose weights are not counted.

    Attributes:
        peak (`int`):
            The largest number of bytes that was measured in a block `with measuring()`.
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


class Measurement(NamedTuple):
    """Time and memory of a [`Side`]."""

    seconds: float
    memory: int


def _gradient(trainer: GRPOTrainer, micro_batches: list[MicroBatch], kept: KeptForBackward | None) -> torch.Tensor:
    """The gradient of one optimizer step, averaged over all processes, as one vector in float32."""
    model: Any = trainer.model
    model.zero_grad(set_to_none=True)
    for batch in micro_batches:
        if kept is None:
            trainer.compute_loss(model, batch).backward()
            continue
        with kept.measuring():
            loss = trainer.compute_loss(model, batch)
        loss.backward()
    # Experts to which no token was routed have no gradient
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in trained]
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


@contextmanager
def _left_as_found(trainer: GRPOTrainer, micro_batches: int) -> Iterator[None]:
    """Lets losses be computed as in one optimizer step, and afterwards leaves the trainer as it was."""
    model: Any = trainer.model
    was_training, steps = model.training, getattr(trainer, "current_gradient_accumulation_steps", 1)
    adapts = trainer.use_adaptive_entropy
    metrics = {key: list(values) for key, values in trainer.train_metrics.items()}
    trainer.current_gradient_accumulation_steps = micro_batches
    trainer.use_adaptive_entropy = False  # it changes a coefficient after each micro-batch
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        trainer.use_adaptive_entropy = adapts
        trainer.current_gradient_accumulation_steps = steps
        trainer.train_metrics.clear()
        trainer.train_metrics.update(metrics)


@contextmanager
def _sharing_of(trainer: GRPOTrainer, name: str) -> Iterator[None]:
    """TRL's passes share no prompts."""
    before = trainer.sharing
    trainer.sharing = None if name == "trl" else before
    try:
        yield
    finally:
        trainer.sharing = before


def _measured(
    trainer: GRPOTrainer, micro_batches: dict[str, list[MicroBatch]], repetitions: int
) -> dict[str, tuple[torch.Tensor, Measurement]]:
    """Gradient, time and memory of each way to deal the same rows to micro-batches."""
    found = {}
    for name, batches in micro_batches.items():
        with _sharing_of(trainer, name):
            found[name] = _memory(trainer, batches)
    seconds: dict[str, list[float]] = {name: [] for name in micro_batches}
    for i in range(repetitions):
        # In turn, and each of them first as often as the other
        for name in micro_batches if i % 2 == 0 else reversed(micro_batches):
            with _sharing_of(trainer, name):
                seconds[name].append(_seconds(trainer, micro_batches[name]))
    return {
        name: (gradient, Measurement(statistics.median(seconds[name]), memory))
        for name, (gradient, memory) in found.items()
    }


def verify(trainer: GRPOTrainer, repetitions: int = 3, quiet: bool = False) -> Verification:
    """
    Generate one batch with the trainer's model, data and rewards, and compute the gradient of its first optimizer step
    twice: by TRL's code in TRL's micro-batches, and in ours. Nothing is trained, and random states, metrics and logs
    are restored. With several processes, all must make the call.

    Args:
        trainer ([`GRPOTrainer`]):
            A trainer that has not been trained, or is between two trainings.
        repetitions (`int`, *optional*, defaults to `3`):
            Number of timed passes over each of the two.
        quiet (`bool`, *optional*, defaults to `False`):
            Don't print the table.

    Returns:
        [`Verification`]

    Raises:
        TypeError: for a trainer that isn't one of `trl_ext`.
        ValueError: if `repetitions` is less than 1, if weights are sharded (DeepSpeed, FSDP), or if no completion of
            the batch has an advantage.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(
            f"verify compares a trainer of trl_ext with TRL, but this is a {type(trainer).__name__}. Build a "
            "trl_ext.GRPOTrainer with the same arguments, or add a trl_ext.WasteCallback to this one."
        )
    require_count("repetitions", repetitions)
    require(
        not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled),
        "verify needs the whole model on each device, but its weights are sharded. Run it once without DeepSpeed "
        "or FSDP, on a smaller model of the same architecture if necessary.",
    )
    count, saved = (
        min(trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation or 1),
        SavedCompute(),
    )
    with _left_as_found(trainer, count):
        dealt = preview_micro_batches(trainer)[:count]
        sides = {"trl": dealt, "trl_ext": trainer.fit(dealt, [(0, count)], saved)}
        with without_dropout(trainer.model), checkpointing_as_in_training(trainer):
            measured = _measured(trainer, sides, repetitions)
    (theirs, of_trl), (ours, of_trl_ext) = measured["trl"], measured["trl_ext"]
    require(
        bool(theirs.any()),
        "No completion of this batch has an advantage, so there is no gradient to compare. Call verify again with a "
        "different `seed`, or on prompts that the model solves sometimes.",
    )
    result = Verification(
        grad_relative_error=((ours - theirs).norm() / theirs.norm()).item(),
        trl=Side(of_trl.seconds, of_trl.memory, saved.token_slots_trl),
        trl_ext=Side(of_trl_ext.seconds, of_trl_ext.memory, saved.token_slots),
        micro_batches=count,
        rows=saved.rows,
        skipped_rows=saved.skipped_rows,
        merged_rows=saved.merged_rows,
        title=_title(trainer),
        reasons=(*trainer.exact_savings.reasons, *trainer.sharing_obstacles),
        shared_slots=saved.shared_slots,
    )
    if not quiet and trainer.is_world_process_zero():
        print(result, flush=True)
    return result


def _title(trainer: GRPOTrainer) -> str:
    model: Any = trainer.model
    weights = next(model.parameters())
    name, dtype = type(trainer.accelerator.unwrap_model(model)).__name__, str(weights.dtype).removeprefix("torch.")
    return f"{name}, loss_type={trainer.loss_type}, {weights.device} {dtype}"
