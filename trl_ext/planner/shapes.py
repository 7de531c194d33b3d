"""
Shapes of models: the named ones, and those of local configurations. Weights are neither needed nor loaded.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from ..errors import meant, require


@dataclass(frozen=True, eq=False)
class Shape:
    """
    A model without its weights.

    Attributes:
        name (`str`):
            As the user wrote it.
        config ([`~transformers.PretrainedConfig`]):
            Its configuration.
        text (`str`):
            What it is, in a phrase.
        weights (`str`):
            Hub id or folder of a model of this shape.
    """

    name: str
    config: PretrainedConfig
    text: str = ""
    weights: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shape) and self._text_of_config == other._text_of_config

    def __hash__(self) -> int:
        return hash(self._text_of_config)

    @cached_property
    def _text_of_config(self) -> str:
        return str(self.config.to_json_string())

    @property
    def layers(self) -> int:
        layers: int = self.config.get_text_config().num_hidden_layers
        return layers

    def with_layers(self, layers: int) -> PretrainedConfig:
        """The configuration of the same model with a different number of layers."""
        config = copy.deepcopy(self.config)
        text: Any = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = text.layer_types[:1] * layers
        return config


def _config(
    kind: type[Any], hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, tied: bool = False
) -> Any:
    return kind(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


# Configuration, what it is, and weights of this shape. Numbers: hidden size, layers, heads, heads of keys and values,
# MLP, vocabulary
SHAPES: dict[str, tuple[Any, str, str]] = {
    "0.5b": (
        _config(Qwen2Config, 896, 24, 14, 2, 4864, 151936, tied=True),
        "as Qwen2.5-0.5B",
        "Qwen/Qwen2.5-0.5B-Instruct",
    ),
    "7b": (_config(Qwen2Config, 3584, 28, 28, 4, 18944, 152064), "as Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
    "14b": (_config(Qwen2Config, 5120, 48, 40, 8, 13824, 152064), "as Qwen2.5-14B", "Qwen/Qwen2.5-14B-Instruct"),
    "32b": (_config(Qwen2Config, 5120, 64, 40, 8, 27648, 152064), "as Qwen2.5-32B", "Qwen/Qwen2.5-32B-Instruct"),
    "33b": (
        _config(LlamaConfig, 6656, 60, 52, 52, 17920, 32000),
        "as LLaMA-33B, every head with keys and values of its own",
        "huggyllama/llama-30b",
    ),
    "70b": (
        _config(LlamaConfig, 8192, 80, 64, 8, 28672, 128256),
        "as Llama-3-70B",
        "meta-llama/Meta-Llama-3-70B-Instruct",
    ),
}


def find_shape(name: str, argument: str = "model") -> Shape:
    """
    The shape behind a name.

    Args:
        name (`str`):
            One of [`SHAPES`], a folder with a `config.json`, such a file, or the id of a model whose configuration is
            in the local cache of the Hub. Nothing is downloaded.
        argument (`str`, *optional*, defaults to `"model"`):
            The argument that names it, for error messages.

    Raises:
        ValueError: if there is none, or its layers are not alike: what two and four of them take is taken for all.
    """
    if name.lower() in SHAPES:
        return Shape(name.lower(), *SHAPES[name.lower()])
    path = Path(name)
    folder = path.parent if path.name == "config.json" else path
    known = f"one of {', '.join(SHAPES)}, or a folder with a config.json"
    try:
        found = AutoConfig.from_pretrained(str(folder) if path.exists() else name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--{argument} is '{name}', of which no configuration is here: write {known}.{meant(name, SHAPES)}"
        ) from error
    types = set(getattr(found.get_text_config(), "layer_types", None) or [])
    require(
        len(types) < 2,
        f"--{argument} is '{name}', whose layers are of several kinds ({', '.join(sorted(types))}). The planner takes "
        "one kind of layer for all, and can't tell.",
    )
    return Shape(name, found, found.model_type, name)
