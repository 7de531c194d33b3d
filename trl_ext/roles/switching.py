"""
Switching adapters: within a context, the layers of a model compute with a different adapter, and nothing else changes.

PEFT's own ways (`set_adapter`, `disable_adapter`) also decide which weights are trainable: whoever switches to another
adapter and back has frozen a third one. And with gradient checkpointing, what is recomputed in the backward pass
takes the adapter that is active by then, without a word. Here, no weight's `requires_grad` is touched, and the
recomputation of a pass takes the adapter of the pass.

This file reads what PEFT and transformers keep private, for the roles, which lie below the trainers: what a layer
computes with, and the function through which it is checkpointed.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import require, shown


# What a layer computes with: its active adapters, and whether it takes none
State = tuple[Any, bool]


class _Use:
    """One entered context, and what its layers computed with before."""

    def __init__(self, adapter: str | None) -> None:
        self.adapter = adapter
        self.thread = threading.get_ident()


# The contexts that are open, the outermost first, for each layer
_open: "WeakKeyDictionary[nn.Module, list[_Use]]" = WeakKeyDictionary()


def adapter_layers(model: nn.Module) -> list[Any]:
    """The modules of a model that compute with an adapter: PEFT's layers, and its copies of whole modules."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapters_of(layer: Any) -> set[str]:
    """Names of the adapters that a layer has weights of."""
    held = [attrgetter(name)(layer) for name in layer.adapter_layer_names]
    return {name for weights in held if hasattr(weights, "keys") for name in weights}


def _activate(layers: list[tuple[Any, State]]) -> list[tuple[Any, State]]:
    """Have each layer compute with what is given for it. Returns what it computed with before."""
    before = [(layer, (layer._active_adapter, layer._disable_adapters)) for layer, _ in layers]
    for layer, (active, disabled) in layers:
        layer._active_adapter, layer._disable_adapters = active, disabled
    return before


@contextmanager
def _active(layers: list[tuple[Any, State]]) -> Iterator[None]:
    before = _activate(layers)
    try:
        yield
    finally:
        _activate(before)


def _wanted(layer: Any, adapter: str | None) -> State:
    if adapter is None:
        return layer._active_adapter, True
    return ([adapter] if adapter in adapters_of(layer) else []), False


@contextmanager
def _recomputed_alike(model: nn.Module, wanted: dict[Any, State]) -> Iterator[None]:
    """In a pass of this context, layers under gradient checkpointing recompute with the adapters that they used."""

    def with_adapters(checkpoint: Callable[..., Any], inside: list[tuple[Any, State]]) -> Callable[..., Any]:
        def checkpointed(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def activated(*given: Any, **named: Any) -> Any:
                with _active(inside):
                    return run(*given, **named)

            return checkpoint(activated, *args, **kwargs)

        return checkpointed

    changed: list[tuple[Any, Callable[..., Any]]] = []
    modules: list[Any] = list(model.modules())
    for module in modules:
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        inside = [] if checkpoint is None else [(part, wanted[part]) for part in module.modules() if part in wanted]
        if checkpoint is not None and inside:
            changed.append((module, checkpoint))
            module._gradient_checkpointing_func = with_adapters(checkpoint, inside)
    try:
        yield
    finally:
        for module, checkpoint in changed:
            module._gradient_checkpointing_func = checkpoint


@contextmanager
def _named(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Within this context, PEFT's models in `model` call `adapter` the active one; `None`: they prepend no prompts."""
    models: list[Any] = [module for module in model.modules() if isinstance(module, PeftModel | BaseTuner)]
    before = [module.active_adapter for module in models]
    with ExitStack() as stack:
        for module in models:
            in_layers = not any(c.is_prompt_learning or c.is_adaption_prompt for c in module.peft_config.values())
            if adapter is None and not in_layers:
                stack.enter_context(module.disable_adapter())
            elif adapter is not None:
                require(
                    in_layers or adapter == module.active_adapter or module.peft_config[adapter].is_prompt_learning,
                    f"PEFT can't switch to the adapter {adapter!r}, whose type is an adaption prompt. Make it the "
                    "active one (set_adapter).",
                )
                module.active_adapter = adapter
        try:
            yield
        finally:
            for module, name in zip(models, before, strict=True):
                module.active_adapter = name


def _enter(use: _Use, layers: list[Any], inside: bool) -> list[Any]:
    """Note that a context is entered. Returns the layers that don't compute with its adapter yet."""
    others = {id(other): other for layer in layers for other in _open.get(layer, [])[-1:]}
    for other in others.values():
        if other.thread != use.thread:
            raise RuntimeError(
                f"Another thread computes with {_shown(other.adapter)} of this model, so that this one can't switch "
                f"to {_shown(use.adapter)}: a layer has one active adapter. Score in the thread that trains, or load "
                "a model of its own for it."
            )
        if other.adapter != use.adapter and not inside:
            raise RuntimeError(
                f"The model computes with {_shown(other.adapter)} in a context that is still open, so that it can't "
                f"switch to {_shown(use.adapter)} inside of it. Leave that context first."
            )
    new = [layer for layer in layers if layer not in _open or _open[layer][-1].adapter != use.adapter]
    for layer in layers:
        _open.setdefault(layer, []).append(use)
    return new


def _leave(use: _Use, layers: list[Any]) -> str | None:
    """Note that a context is left. Returns what is wrong with that."""
    wrong = None
    for layer in layers:
        contexts = _open.get(layer, [])
        if use not in contexts:
            wrong = "was left already, with a context outside of it"
            continue
        if contexts[-1] is not use:
            wrong = "is left before a context inside of it"
        del contexts[contexts.index(use) :]
        if not contexts:
            del _open[layer]
    if use.thread != threading.get_ident():
        wrong = "is left in another thread than it was entered in"
    return wrong


def _shown(adapter: str | None) -> str:
    return "its adapters switched off" if adapter is None else f"the adapter {adapter!r}"


@contextmanager
def staying_trainable(weights: list[nn.Parameter]) -> Iterator[None]:
    """After this context, these weights are trainable, whatever adapters PEFT has switched to in it."""
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@contextmanager
def using_adapter(model: nn.Module, adapter: str | None, inside: bool = False) -> Iterator[None]:
    """
    Within this context, the adapter layers inside `model` compute with one adapter, or with none. Which weights are
    trainable, the modes of modules, and afterwards the active adapters are as before. With gradient checkpointing, the
    recomputation of a pass that is made in this context uses its adapter too.

    Args:
        model (`torch.nn.Module`):
            A [`~peft.PeftModel`], or a model or a part of one whose layers PEFT has replaced.
        adapter (`str` or `None`):
            Name of the adapter. `None`: the base model alone.
        inside (`bool`, *optional*, defaults to `False`):
            Whether it may lie in the context of a different adapter: for a pass between two passes of that context,
            such as a critic's after the layers of its actor.

    Raises:
        ValueError: if there is no such adapter, or adapters are merged into the base model.
        RuntimeError: if a context of this model with a different adapter is open, or one of another thread, and if
            contexts are left in a different order than the reverse of that in which they were entered.
    """
    layers = adapter_layers(model)
    known = {name for layer in layers for name in adapters_of(layer)} | {*getattr(model, "peft_config", {})}
    require(
        bool(known), f"There are no adapters to switch in {shown(model)}. Pass a model to which PEFT has added them."
    )
    require(
        adapter is None or adapter in known,
        f"The model has no adapter {adapter!r}. It has {', '.join(sorted(known))}.",
    )
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    require(
        not merged,
        f"The adapters {merged} are merged into the base model, so that no other can be used. Call unmerge_adapter().",
    )
    use, wrong = _Use(adapter), None
    wanted = {layer: _wanted(layer, adapter) for layer in _enter(use, layers, inside)}
    try:
        with ExitStack() as stack:
            if wanted or not layers:  # else a context outside of this one has done it
                stack.enter_context(_named(model, adapter))
                stack.enter_context(_active([*wanted.items()]))
                stack.enter_context(_recomputed_alike(model, wanted))
            yield
    finally:
        wrong = _leave(use, layers)
    if wrong is not None:
        raise RuntimeError(
            f"The context in which the model computes with {_shown(adapter)} {wrong}. Use `with` statements, one "
            "inside the other."
        )
