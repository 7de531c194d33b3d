"""
TRL's fused head under ZeRO-3. It multiplies by the head's weight and never calls the head, so that DeepSpeed doesn't
gather the weight for it, and TRL does that itself.

That fails where DeepSpeed has begun to fetch the weight ahead: after two passes of generation that gather a layer at a
time (`ds3_gather_for_generation=False`), DeepSpeed expects the head after the last layer, starts to gather it there,
and TRL's own gather ends with "Cannot partition a param in flight". Or it reads what has yet to arrive.

DeepSpeed registers a weight that is used outside of its module by itself, when it is first read and isn't there. Then
it is gathered for the whole pass. Here that is said before the first pass.
"""

from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled


def gather_head_with_model(model: Any) -> None:
    """
    Have ZeRO-3 gather the weights of the head of a model for each of the model's passes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A model with TRL's fused head, not wrapped for several processes. Without ZeRO-3, nothing changes.
    """
    if not is_deepspeed_zero3_enabled():
        return
    import deepspeed

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    for weight in causal.get_output_embeddings().parameters(recurse=False):
        deepspeed.zero.register_external_parameter(causal, weight)
