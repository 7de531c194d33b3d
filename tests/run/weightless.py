"""Models without weights, for what must not read any."""

from pathlib import Path
from typing import Any

import tiny
from transformers import Qwen2Config

from recipes.tasks.sort_digits import build_tokenizer


# 17e9 numbers a layer
LARGE = {"hidden_size": 32768, "intermediate_size": 131072, "num_attention_heads": 256, "num_key_value_heads": 256}
LARGE |= {"vocab_size": 32, "num_hidden_layers": 4}
LORA = ("--use_peft", "--lora_target_modules", "all-linear", "--dtype", "bfloat16")


def without_weights(path: Path, **overrides: Any) -> str:
    """A configuration, perhaps of a model that nobody could build here, and a tokenizer."""
    config = tiny.qwen2().config.to_dict() | {"architectures": ["Qwen2ForCausalLM"], "layer_types": None} | overrides
    Qwen2Config(**config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)  # of the kind that AutoTokenizer makes for Qwen2
    return str(path)
