"""
What is refused about a reference before a model is loaded. How it is made is in `seams/references.py`.
"""

from typing import Any

from peft import PeftModel

from ..errors import require
from ..roles.adapters import trained_adapter
from ..roles.reward_adapter import is_adapter
from ..roles.trunk import REFERENCE_ADAPTER


def check_reference(given: dict[str, Any], ref_model: Any, wanted: bool) -> None:
    """
    Whether the reference can be what the policy is now.

    Args:
        given (`dict[str, Any]`):
            Arguments of the trainer.
        ref_model ([`~transformers.PreTrainedModel`], `str` or `None`):
            The user's reference.
        wanted (`bool`):
            Whether anything in the loss or in the rewards depends on a reference.

    Raises:
        ValueError: if it can't, or if a reference would have no effect.
    """
    config, policy = given["args"], given["model"]
    for name, model in (("model", policy), ("ref_model", ref_model)):
        require(
            not isinstance(model, str) or not is_adapter(model),
            f"{name}={model!r} is the folder of an adapter, not of a model. Load it with "
            "AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True), and pass what that returns.",
        )
    require(
        ref_model is None or ref_model is not policy or isinstance(policy, str),
        "`model` and `ref_model` are the same object, so that the reference would be trained. Leave out ref_model: "
        "the policy as it is now is the default.",
    )
    weights = [name for name in ("kl_coef", "beta") if hasattr(config, name)]
    without = f"{'=0 and '.join(weights)}=0"
    remedy = "Set one of them" if len(weights) > 1 else f"Set {weights[0]}"
    require(
        ref_model is None or wanted,
        f"ref_model has no effect with {without}. {remedy}, or leave ref_model out.",
    )
    require(
        wanted or not config.sync_ref_model,
        f"sync_ref_model=True with {without}: there is no reference to refresh. {remedy}.",
    )
    adapted = isinstance(policy, PeftModel) or given.get("peft_config") is not None
    require(
        not (adapted and config.sync_ref_model and ref_model is not None),
        "sync_ref_model mixes the weights of the policy into the reference, and the policy has an adapter where "
        "ref_model has none. Leave out ref_model: the reference is then a copy of the adapter.",
    )
    require(
        not (config.sync_ref_model and getattr(config, "precompute_ref_log_probs", False)),
        "sync_ref_model=True moves the reference, and precompute_ref_log_probs=True computes its log-probabilities "
        "once, before training. Set one of them to False.",
    )
    if wanted and ref_model is None and isinstance(policy, PeftModel):
        trained_adapter(policy)
        require(
            REFERENCE_ADAPTER not in policy.peft_config,
            f"The policy has an adapter {REFERENCE_ADAPTER!r} already, and the copy that is the reference gets this "
            f"name. Remove it with model.delete_adapter({REFERENCE_ADAPTER!r}), or load it under a different name.",
        )
