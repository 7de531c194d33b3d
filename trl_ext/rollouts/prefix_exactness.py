"""
Whether the passes of a model may compute shared prompts once, and what that costs.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from .exactness import has_relative_positions
from .prefix_trees import Cost


# Attention that takes a mask of places, see [`~trl_ext.rollouts.shared_pass.attention_mask`]
MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")
DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# How much longer a multiplication takes in attention than in a linear layer. `benchmarks/prefix_cost.py` measures it;
# on a GPU it has not been measured yet, and the number is on the safe side.
SLOWER_IN_ATTENTION = {"cpu": 1.5, "cuda": 4.0}
# What stands in the source of models of transformers that take a mask for each type of layer, and of those in which
# every layer has the window
BY_LAYER_TYPE = "attention_mask, dict)"
IN_EVERY_LAYER = "create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask"


class Window(NamedTuple):
    """
    A sliding window of a model's attention.

    Args:
        tokens (`int`):
            Last tokens that a token sees, itself included.
        masks (`str`, *optional*):
            How the model takes a mask of places that keeps to the window: `"by_layer_type"`, with a second mask for
            layers that see all, or `"one"`. `None`: it can't be given one.
    """

    tokens: int
    masks: str | None = None


def dropout_rates(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """
    Where a model holds the rates of its dropout: module, attribute, rate. Attention layers hold a rate of their own,
    or read that of a dropout layer which they don't call.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" if isinstance(module, DROPOUT_LAYERS) else "dropout" in name):
                yield module, name, value


def sharing_obstacles(model: Any, attention: str | None, trains: bool = True) -> list[str]:
    """
    Why the passes of a causal language model, or of a PEFT model, with this `attn_implementation` must not share
    prompts. Empty: they may. Passes that train nothing (`trains=False`) have no dropout.
    """
    obstacles = []
    if not has_relative_positions(model):
        obstacles.append("the model's positions may be absolute")
    if trains and any(rate > 0 for _, _, rate in dropout_rates(model)):
        obstacles.append("with dropout, each row has its own random numbers (disable_dropout=True, lora_dropout=0)")
    config = getattr(model, "peft_config", {})
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in config.values()):
        obstacles.append("the adapter puts tokens before each row")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if attention not in MASKED_ATTENTION:
        obstacles.append(f"attn_implementation={attention!r} takes no mask of places")
    if getattr(base.config, "alibi", False):
        obstacles.append("the model's biases are counted from the mask of padding")
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        obstacles.append(f"{type(base).__name__} takes no position_ids")
    return obstacles


def attention_window(model: Any) -> Window | None:
    """The sliding window of a model, if it has one in any layer."""
    config: Any = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    tokens: int | None = getattr(config, "sliding_window", None)
    if tokens is None or (layers is not None and "sliding_attention" not in layers):
        return None
    try:
        source = " ".join(inspect.getsource(type(model.base_model).forward).split())
    except (OSError, TypeError):  # no source
        return Window(tokens)
    if layers is not None and BY_LAYER_TYPE in source:
        return Window(tokens, "by_layer_type")
    return Window(tokens, "one" if IN_EVERY_LAYER in source else None)


def common_window(models: Iterable[Any]) -> Window | None:
    """The sliding window of models that get the same mask. Where they differ, no mask keeps to it."""
    windows = list(map(attention_window, models))
    if len(set(windows)) <= 1:
        return next(iter(windows), None)
    return Window(min(window.tokens for window in windows if window is not None))


def can_repeat_cache(model: Any) -> bool:
    """Whether a model keeps keys and values in its passes now: with activation checkpointing, it doesn't."""
    return not (model.training and getattr(model, "is_activation_checkpointing", False))


def pass_cost(model: Any, device_type: str) -> Cost:
    """What a pass of a causal language model, or of a PEFT model, costs."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = base.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Multiplications for a pair of places: a product of a query and a key, and a weighted value
    pair = 2 * config.num_hidden_layers * heads * head_size
    layers = [p for name, p in base.base_model.named_parameters() if "embed" not in name]
    # ZeRO-3 leaves an empty tensor in place of a weight that is elsewhere
    token = sum(getattr(p, "ds_numel", p.numel()) for p in layers)
    return Cost(SLOWER_IN_ATTENTION.get(device_type, max(SLOWER_IN_ATTENTION.values())) * pair / max(token, 1))
