"""
The adapters of a policy: which of them is trained, and a copy of it inside the model, which is the reference.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from ..errors import require
from .critic_contract import CRITIC
from .switching import adapter_layers
from .trunk import REFERENCE_ADAPTER


def trained_adapter(policy: Any) -> str:
    """
    The name of the adapter that is trained: the active one.

    Args:
        policy ([`~peft.PeftModel`]):
            The policy, not wrapped for several processes.

    Raises:
        ValueError: if not exactly one is active.
    """
    active = list(policy.active_adapters)
    require(
        len(active) == 1,
        f"The policy has {len(active)} active adapters, {active}, and its reference can be a copy of only one. Merge "
        "the others into the base model (merge_and_unload), or activate only the one that is trained "
        "(model.set_adapter).",
    )
    return str(active[0])


def weight_pairs(policy: Any, adapter: str) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Each weight of an adapter with the same weight of the adapter `ref`."""
    weights = dict(policy.named_parameters())
    for name, reference in weights.items():
        # PEFT puts an adapter's name last, or before the name of a weight in the adapter's own module
        before, found, after = f".{name}.".rpartition(f".{REFERENCE_ADAPTER}.")
        if found:
            yield weights[f"{before}.{adapter}.{after}"[1:-1]], reference


@torch.no_grad()
def add_reference_adapter(policy: Any) -> None:
    """
    Add the adapter `ref`, a copy of the one that is trained. It isn't trained.

    Args:
        policy ([`~peft.PeftModel`]):
            A policy without an adapter of that name, not wrapped for several processes.

    Raises:
        ValueError: if PEFT can't hold a second adapter of this kind.
    """
    adapter = trained_adapter(policy)
    config = copy.deepcopy(policy.peft_config[adapter])
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # others, such as PiSSA, would change the base model again
    remedy = "Pass the reference as ref_model where the trainer takes one (DPO, PPO), or merge the adapter first."
    try:
        policy.add_adapter(REFERENCE_ADAPTER, config)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"The reference is a copy of the adapter {adapter!r}, and PEFT says: {error} {remedy}") from (
            error
        )
    if isinstance(config, LoraConfig):
        config.init_lora_weights = policy.peft_config[adapter].init_lora_weights
    pairs = list(weight_pairs(policy, adapter))
    kind = getattr(config.peft_type, "value", config.peft_type)
    require(bool(pairs), f"An adapter of the type {kind} can't be copied inside a model for the reference. {remedy}")
    for own, reference in pairs:
        reference.data = own.detach().clone()
        reference.requires_grad_(False)


@contextmanager
def without_adapter(policy: Any, adapter: str) -> Iterator[None]:
    """
    Within this context, a policy has no adapter of this name: neither its weights, in layers, nor its configuration.
    PEFT takes weights of an adapter whose configuration it doesn't know for those of every other.

    Args:
        policy ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]):
            The policy, whose active adapter is another.
        adapter (`str`):
            The adapter. If there is none of this name, nothing changes.
    """
    containers: list[Any] = [
        part
        for layer in adapter_layers(policy)
        for part in layer.children()
        if isinstance(part, nn.ModuleDict | nn.ParameterDict) and adapter in part
    ]
    held = [list(container.items()) for container in containers]
    config = policy.peft_config.pop(adapter, None)
    for container in containers:
        del container[adapter]
    try:
        yield
    finally:
        for container, items in zip(containers, held, strict=True):
            added = [item for item in container.items() if item[0] not in dict(items)]
            container.clear()
            container.update(dict([*items, *added]))  # in their order, which is that of the policy's parameters
        if config is not None:
            policy.peft_config[adapter] = config


def starts_without_effect(policy: Any) -> bool:
    """Whether a policy with a new adapter still equals the same model with the adapter switched off."""
    config = policy.peft_config[trained_adapter(policy)]
    if config.is_prompt_learning:
        return False
    if not isinstance(config, LoraConfig):
        kinds = [value for name, value in vars(config).items() if name.startswith("init_") and "weights" in name]
        return all(map(bool, kinds))
    weights = dict(policy.named_parameters())
    factors = [(name, name.replace("lora_A.", "lora_B.").replace("embedding_A.", "embedding_B.")) for name in weights]
    return not any(weights[a].any() and weights[b].any() for a, b in factors if a != b and b in weights)


def check_base_is_frozen(policy: Any, named: str, otherwise: str) -> None:
    """
    Raises `ValueError` if a policy trains weights outside of its adapters. `named` begins the message: the adapter
    that relies on the base as it is; `otherwise` ends it: what else can be done.
    """
    adapters = {*policy.peft_config, CRITIC}
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    trained = [name for name in trained if not adapters.intersection(name.split("."))]
    require(
        not trained,
        f"{named} relies on the policy's base, and {len(trained)} weights of it are trained, such as "
        f"{(trained or [''])[0]!r}. Freeze them, name their modules in modules_to_save of the peft_config (biases: "
        f"bias='none'), or {otherwise}.",
    )


def check_only_adapter_trained(policy: Any) -> None:
    """Raises `ValueError` if weights are trained that a reference inside the same model shares with the policy."""
    adapter = trained_adapter(policy)
    if not isinstance(policy.peft_config[adapter], LoraConfig):
        return
    shared = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    shared = [name for name in shared if adapter not in name.split(".")]
    require(
        not shared,
        f"{len(shared)} weights outside of the adapter {adapter!r} are trained, such as {(shared or [''])[0]!r}. The "
        "reference is the same model, so that it would move with them. Freeze them, name their modules in "
        "modules_to_save of the peft_config (biases: bias='none'), or pass ref_model where the trainer takes one.",
    )
