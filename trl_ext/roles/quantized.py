"""
Policies on a 4-bit base (bitsandbytes).
"""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig


# Beside a saved adapter: how its base was quantized. PEFT's own files name the base and don't say.
QUANTIZATION_FILE = "base_quantization.json"


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


def save_quantization(model: Any, folder: Path) -> None:
    """
    Write down how the base of a saved adapter is quantized; nothing for a base that isn't.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, not wrapped for several processes.
        folder (`Path`):
            The folder of the adapter.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "is_quantized", False):
        return
    quantization = base.config.quantization_config
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    text = json.dumps({"quantization_config": settings, "dtype": str(base.dtype).removeprefix("torch.")}, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / QUANTIZATION_FILE).write_text(text + "\n", encoding="utf-8")


def loading_of_quantized(folder: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` with which the base of a saved adapter was loaded, if it was quantized then."""
    file = folder / QUANTIZATION_FILE
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    quantization = AutoQuantizationConfig.from_dict(found["quantization_config"])
    return {"quantization_config": quantization, "dtype": found["dtype"]}


def keep_head_in_float32(model: Any, names: tuple[str, ...]) -> None:
    """
    Have the trained head of a sequence classifier on a quantized base compute in float32. TRL takes all that is
    trained on such a base to bfloat16, where a head can't read states in float32, and loses small steps.
    Changes nothing for other models.

    Args:
        model ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]):
            The classifier.
        names (`tuple[str, ...]`):
            What its head may be called.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "modules_to_save" in name and set(names).intersection(name.split(".")):
            module.float()
            module.register_forward_pre_hook(lambda head, args: (args[0].to(head.weight.dtype), *args[1:]))
