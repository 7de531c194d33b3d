"""
Policies on a 4-bit base (bitsandbytes).
"""

from torch import nn


def keep_weights_trainable(model: nn.Module) -> None:
    """
    Have the 4-bit layers of a model keep their weights in the form that can be trained on. On CPUs with AVX512-BF16,
    bitsandbytes packs the weights anew in the first forward in evaluation mode, and a backward through packed weights
    fails ("a view of a leaf Variable"): one evaluation or rollout would end training. Changes nothing elsewhere.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            layer.state_dict()  # unpacks weights that were packed before
