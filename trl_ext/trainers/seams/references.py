"""
The reference of every trainer is what the policy was when the trainer was made. TRL's is not, if the policy was
changed after it was loaded, or if its adapter isn't called `default`:

| policy | TRL's reference | here |
|---|---|---|
| the name of a model | loaded from there again | the same |
| a model in memory | loaded again from the name in its configuration | a copy of it; see below for ZeRO-3 |
| a model with an adapter | a copy of the adapter `default` inside the model | a copy of the adapter that is trained |
| a model that gets an adapter | the model without it | the same, if the new adapter has no effect yet; else a copy |

Under ZeRO-3, a model that is loaded is spread over processes at once and can't be copied: TRL loads the reference, and
[`check_same_weights`] compares it with the policy.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
)

from ...errors import require
from ...roles.adapters import (
    add_reference_adapter,
    check_only_adapter_trained,
    starts_without_effect,
    trained_adapter,
    weight_pairs,
)
from ...roles.critic import without_critic
from ...roles.trunk import ADAPTER, REFERENCE_ADAPTER
from .whole_checkpoints import whole_weight


def is_spread(model: nn.Module) -> bool:
    """Whether ZeRO-3 has spread the weights of a model over processes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def loaded_like(given: dict[str, Any], path: str) -> Any:
    """The model in `path`, loaded as TRL would load it beside the policy of the trainer's arguments `given`."""
    config, policy = given["args"], given["model"]
    kwargs = {**(config.model_init_kwargs or {}), "trust_remote_code": config.trust_remote_code}
    kwargs.pop("revision", None)  # of the policy
    if given.get("quantization_config") is not None:
        kwargs["quantization_config"] = given["quantization_config"]
    if config.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    if not isinstance(policy, str):
        kwargs.setdefault("dtype", policy.dtype)
        kwargs.setdefault("attn_implementation", policy.config._attn_implementation)
    return create_model_from_path(path, **kwargs)


def reference_of(given: dict[str, Any], ref_model: Any) -> Any:
    """
    The reference, if TRL can't load or make it itself: the user's, or a copy of a policy that is in memory.

    Args:
        given (`dict[str, Any]`):
            Arguments of the trainer.
        ref_model ([`~transformers.PreTrainedModel`], `str` or `None`):
            The user's reference. A name or a folder is loaded as TRL loads the policy.
    """
    config, policy = given["args"], given["model"]
    if isinstance(ref_model, str):
        return loaded_like(given, ref_model)
    shards = config.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if ref_model is None and getattr(config, "precompute_ref_log_probs", False) and not shards:
        return None  # TRL computes them with the policy, before it is trained
    if ref_model is not None or isinstance(policy, str | PeftModel) or given.get("peft_config") is not None:
        return ref_model
    if is_spread(policy):  # TRL loads it again
        require(
            bool(get_config_model_id(policy.config)),
            "ZeRO-3 has spread the policy over processes, so that the reference can't be a copy of it, and the model "
            "doesn't say where it can be loaded from. Save it with save_pretrained and pass the folder as `model`.",
        )
        return None
    return copy.deepcopy(policy)


@contextmanager
def adapter_kept(policy: Any) -> Iterator[None]:
    """
    While TRL constructs a trainer of `policy`, which has an adapter: adds our copy of the adapter that is trained, and
    keeps TRL from adding its own. TRL takes `default`, which may not exist or may not be trained, and passes over
    weights that aren't in a module of their own.
    """
    add_reference_adapter(policy)
    adapter = trained_adapter(policy)
    copies = [reference for _, reference in weight_pairs(policy, adapter)]
    for reference in copies:
        reference.requires_grad_(True)  # for a quantized model, TRL changes the type of what is trained
    configs, added = policy.peft_config, ADAPTER not in policy.peft_config
    configs.setdefault(ADAPTER, configs[adapter])
    parameter = policy.get_parameter
    policy.add_adapter = lambda name, config: None
    # TRL copies each weight of `default` into what it gets here: onto itself
    policy.get_parameter = lambda name: parameter(name.replace(f".{REFERENCE_ADAPTER}.", f".{ADAPTER}."))
    try:
        yield
    except Exception:
        policy.delete_adapter(REFERENCE_ADAPTER)  # so that the model can be passed again
        raise
    finally:
        del policy.add_adapter, policy.get_parameter
        if added:
            del configs[ADAPTER]
        for reference in copies:
            reference.requires_grad_(False)


@contextmanager
def making_reference(trainer: Any, given: dict[str, Any], own: Any, wanted: bool) -> Iterator[None]:
    """
    While TRL constructs a trainer: keeps TRL from making a reference that isn't what the policy is now. Afterwards the
    reference is complete, and moves if `sync_ref_model` says so.

    Args:
        trainer (trainer of `trl_ext`):
            The one that is constructed.
        given (`dict[str, Any]`):
            Its arguments.
        own ([`~transformers.PreTrainedModel`], *optional*):
            The reference, unless TRL loads or makes it.
        wanted (`bool`):
            Whether there is to be a reference.
    """
    config, policy = given["args"], given["model"]
    kept = adapter_kept(policy) if wanted and own is None and isinstance(policy, PeftModel) else nullcontext()
    synced, config.sync_ref_model = config.sync_ref_model, False  # TRL doesn't refresh adapters, or beside a critic
    try:
        with kept:
            yield
    finally:
        config.sync_ref_model = synced
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.ref_model is not None:
        if own is None:
            check_same_weights(trainer, policy)
    elif wanted and own is None and isinstance(policy, PeftModel):
        check_only_adapter_trained(policy)
        if REFERENCE_ADAPTER not in policy.peft_config and (synced or not starts_without_effect(policy)):
            require(
                not getattr(config, "precompute_ref_log_probs", False),
                "precompute_ref_log_probs=True took the model without the new adapter for the reference, and this "
                "adapter changes the model from the start. Set precompute_ref_log_probs=False, or "
                "init_lora_weights=True in the peft_config.",
            )
            add_reference_adapter(policy)
    if synced:
        trainer.add_callback(RefreshReference(trainer))


def check_same_weights(trainer: Any, policy: nn.Module) -> None:
    """Raises `ValueError` if the policy isn't what TRL has loaded as the reference, where ZeRO-3 has spread both."""
    if not is_spread(policy):
        return
    loaded = dict(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
    differ = False
    for name, parameter in policy.named_parameters():
        own: Any = getattr(parameter, "ds_tensor", None)  # this process's share
        other: Any = getattr(loaded.get(name), "ds_tensor", None)
        if own is None or other is None or own.numel() != other.numel():
            differ = True
        else:
            differ = differ or not torch.equal(own.detach().flatten().to(other), other.detach().flatten())
    found = torch.tensor(float(differ), device=trainer.accelerator.device)
    require(
        not trainer.accelerator.reduce(found, reduction="sum").item(),
        f"The policy is not what {get_config_model_id(policy.config)!r} holds, from where ZeRO-3 has the reference "  # type: ignore[arg-type]
        "loaded again. Save the model with save_pretrained and pass the folder as `model`, or pass ref_model where "
        "the trainer takes one.",
    )


def prepared(trainer: Any, model: nn.Module) -> Any:
    """A model that isn't trained, on this process's device and sharded as the backend does it."""
    model.requires_grad_(False).eval()
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True, device_placement=True)


def use_reference(trainer: Any, model: nn.Module) -> None:
    """Take `model` for the reference, and prepare it as TRL prepares the one that it loads."""
    if trainer.args.disable_dropout:
        disable_dropout_in_model(model)
    add_fused_lm_head(model, trainer.temperature, trainer.args.cast_lm_head_to_fp32)  # type: ignore[arg-type]
    trainer.ref_model = prepared(trainer, model)


def drop_reference(trainer: Any) -> None:
    """Free the memory of a reference that isn't needed any more."""
    trainer.ref_model = None


class RefreshReference(TrainerCallback):
    """
    Moves the reference towards the policy every `ref_model_sync_steps` optimizer steps. Like TRL's
    `SyncRefModelCallback`, but for policies with a critic and for adapters, whose reference is the adapter `ref`.

    Args:
        trainer (trainer of `trl_ext`):
            The trainer of both.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        trainer, alpha = self.trainer, args.ref_model_mixup_alpha
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.ref_model is not None:
            reference = trainer.accelerator.unwrap_model(trainer.ref_model)
            with without_critic(policy):
                SyncRefModelCallback.sync_target_model(policy, reference, alpha)
            return
        for newer, weight in weight_pairs(policy, trained_adapter(policy)):
            with whole_weight(newer), whole_weight(weight, modified=True):
                weight.data.mul_(1 - alpha).add_(newer.data, alpha=alpha)
