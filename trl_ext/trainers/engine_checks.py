"""
What is refused about the vLLM engine before a model is loaded. How the engine gets weights is in `seams/engine.py`.
"""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel

from ..errors import require
from ..roles.adapters import trained_adapter


# Values of `vllm_sync`
VLLM_SYNCS = ("weights", "adapter")
ALL_WEIGHTS = "Set vllm_sync='weights'"
LARGEST_RANK = 512  # that vLLM takes

# Settings of an adapter with which the base isn't what vLLM has loaded, or which vLLM's adapters don't have
NOT_SENT = {
    "use_dora": (False, "vLLM has no DoRA"),
    "bias": ("none", "biases belong to the base"),
    "modules_to_save": (None, "modules_to_save belong to the base"),
    "trainable_token_indices": (None, "embeddings belong to the base"),
    "target_parameters": (None, "vLLM's adapters are on modules"),
    "layer_replication": (None, "vLLM's base doesn't have the repeated layers"),
    "rank_pattern": ({}, "vLLM scales all modules alike"),
    "alpha_pattern": ({}, "vLLM scales all modules alike"),
}
KEEPING_THE_BASE = (True, False, "gaussian", "eva")  # values of `init_lora_weights`


def check_engine(config: Any) -> None:
    """Whether `vllm_sync` has an engine that it is about."""
    if config.vllm_sync == "weights":
        return
    given = f"vllm_sync={config.vllm_sync!r}"
    require(config.use_vllm, f"{given} has no effect without vLLM. Set use_vllm=True, or leave vllm_sync out.")
    require(
        config.vllm_mode == "colocate",
        f"{given} is for an engine in the same processes, and TRL sends a server all weights. Set "
        "vllm_mode='colocate', or vllm_sync='weights'.",
    )
    require(
        "revision" not in (config.model_init_kwargs or {}),
        f"{given} has vLLM load the base, which TRL doesn't tell the revision in model_init_kwargs. {ALL_WEIGHTS}.",
    )


def sent_rank(config: Any, given: Mapping[str, Any]) -> int | None:
    """
    The rank of the adapter that is sent to a colocated vLLM engine.

    Args:
        config ([`~trl_ext.GRPOConfig`]):
            Of the trainer.
        given (`Mapping[str, Any]`):
            Arguments of the trainer.

    Returns:
        `int`, *optional*: `None` if the engine gets all weights.

    Raises:
        ValueError: for a policy whose adapter vLLM can't apply to the base that it loads.
    """
    if config.vllm_sync == "weights":
        return None
    policy = given["model"]
    adapter: Any = given.get("peft_config")
    if isinstance(policy, PeftModel):
        adapter = policy.peft_config[trained_adapter(policy)]
    require(
        adapter is not None,
        f"vllm_sync='adapter', and this policy trains all weights. Pass a peft_config (LoraConfig). {ALL_WEIGHTS} to "
        "train the whole model.",
    )
    require(
        isinstance(policy, str | PeftModel),
        "vllm_sync='adapter' has vLLM load the base from where the policy was loaded, and this model may have changed "
        f"since. Save it with save_pretrained and pass the folder as `model`. {ALL_WEIGHTS} to have the weights sent.",
    )
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    require(
        isinstance(adapter, LoraConfig),
        f"vllm_sync='adapter' is for LoRA, and the adapter is of the type {kind}. {ALL_WEIGHTS}.",
    )
    for name, (plain, reason) in NOT_SENT.items():
        value = getattr(adapter, name, plain)
        require(
            not value or value == plain,
            f"vllm_sync='adapter' can't be used with {name}={value!r} of the adapter: {reason}. {ALL_WEIGHTS}, or "
            f"leave {name} out.",
        )
    start = adapter.init_lora_weights
    require(
        start in KEEPING_THE_BASE,
        f"vllm_sync='adapter' can't be used with init_lora_weights={start!r}, which changes the base. {ALL_WEIGHTS}.",
    )
    require(
        adapter.r <= LARGEST_RANK,
        f"vllm_sync='adapter' with r={adapter.r}: vLLM takes ranks up to {LARGEST_RANK}. {ALL_WEIGHTS}, or lower r.",
    )
    return int(adapter.r)
