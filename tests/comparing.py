"""
What a training did, for comparing two of them: gradients, calls of modules, and whether all is the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import TrainerCallback


# Ends of the keys that a clock decides
CLOCKS = ("step_time", "_runtime", "_per_second")


class Gradients(TrainerCallback):
    """Keeps the gradients with which each optimizer step is taken."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    @property
    def vectors(self) -> list[torch.Tensor]:
        """The gradient of each step as one vector."""
        return [torch.cat([gradient.flatten() for gradient in step.values()]) for step in self.steps]


@contextmanager
def module_calls() -> Iterator[list[tuple[Any, ...]]]:
    """Every call of every module: policy, reference and reward models, adapters."""
    calls: list[tuple[Any, ...]] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
        calls.append((type(module).__name__, shapes, module.training, torch.is_grad_enabled()))

    handle = register_module_forward_pre_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def without_clocks(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in log.items() if not key.endswith(CLOCKS)} for log in logs]


def equal(ours: Any, theirs: Any) -> bool:
    """Bit for bit, with NaN equal to NaN."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return bool(ours == theirs) or (ours != ours and theirs != theirs)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of a vector; 0 where both are exactly zero."""
    return ((ours - theirs).norm() / theirs.norm()).item() if ours.any() or theirs.any() else 0.0


def largest_relative_error(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Of the gradients of equally many steps."""
    return max(relative_error(mine, other) for mine, other in zip(ours, theirs, strict=True))
