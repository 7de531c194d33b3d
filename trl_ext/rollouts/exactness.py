"""
Which savings of compute are exact, which means that they leave the gradient unchanged, for a loss and a model.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


# Losses that are a mean over the rows of a micro-batch. If the number of rows changes, the loss has to be rescaled.
ROW_MEAN_LOSSES = ("grpo", "sapo", "luspo", "dr_grpo")
# Losses that divide by the number of tokens of their own micro-batch
MICRO_BATCH_MEAN_LOSSES = ("bnpo",)

# Rotary position embeddings that depend on differences of positions alone. (`dynamic` and `longrope` depend on the
# length of the sequence too.)
RELATIVE_ROPE = ("default", "linear", "llama3", "yarn")
ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "truncate",
}
RELATIVE_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class ExactSavings:
    """
    Which savings of compute are exact. Cutting the right padding of completions always is.

    Args:
        trim_prompts (`bool`):
            Whether the left padding of prompts may be cut.
        regroup (`bool`):
            Whether rows may move to a different micro-batch of their optimizer step, and rows without a token in the
            loss may be left out.
        skip_dead (`bool`):
            Whether rows whose advantage is zero may be left out.
        weigh_copies (`bool`):
            Whether copies of a row in one optimizer step may be computed once, weighted by their number.
        reasons (`tuple[str]`):
            For each saving that is not exact, why.
    """

    trim_prompts: bool
    regroup: bool
    skip_dead: bool
    weigh_copies: bool
    reasons: tuple[str, ...] = ()


def exact_savings(
    loss_type: str,
    *,
    kl: bool,
    entropy_terms: bool,
    aux_loss: bool,
    relative_positions: bool,
    value_loss: bool = False,
) -> ExactSavings:
    """
    Which savings are exact for a loss.

    Args:
        loss_type (`str`):
            TRL's `loss_type`.
        kl (`bool`):
            Whether the loss has a KL term, which gives rows without advantage a gradient.
        entropy_terms (`bool`):
            Whether an entropy bonus or an entropy quantile is computed over each micro-batch.
        aux_loss (`bool`):
            Whether an auxiliary loss balances experts over each micro-batch.
        relative_positions (`bool`):
            Whether the model's outputs don't depend on left padding ([`has_relative_positions`]).
        value_loss (`bool`):
            Whether a critic learns, which gives rows without advantage a gradient.
    """
    reasons = []
    if not relative_positions:
        reasons.append("the left padding of prompts is kept: the model's positions may be absolute")
    taken_over_micro_batch = {
        f"loss_type='{loss_type}' divides by the tokens of its micro-batch": loss_type in MICRO_BATCH_MEAN_LOSSES,
        "the entropy term is computed over each micro-batch": entropy_terms,
        "the auxiliary loss balances experts over each micro-batch": aux_loss,
    }
    fixed_because = [reason for reason, holds in taken_over_micro_batch.items() if holds]
    if fixed_because:
        reasons.append(f"rows keep their micro-batch, and all are computed: {' and '.join(fixed_because)}")
    elif kl or value_loss:
        term = "KL term (beta)" if kl else "value loss"
        reasons.append(f"rows without advantage and copies are computed: the {term} gives them a gradient")
    regroup = not fixed_because
    only_policy_terms = regroup and not kl and not value_loss
    return ExactSavings(
        trim_prompts=relative_positions,
        regroup=regroup,
        skip_dead=only_policy_terms,
        weigh_copies=only_policy_terms,
        reasons=tuple(reasons),
    )


def has_relative_positions(model: nn.Module) -> bool:
    """
    Whether cutting left padding leaves a model's outputs unchanged. TRL passes no positions, so that the model counts
    them from the first column, padding included. The answer is yes for rotary embeddings that depend on differences of
    positions alone, and no for everything else: learned positions, recurrent or convolutional layers, chunked
    attention, scales that depend on the position.
    """
    model_config: Any = getattr(model, "config", None)
    if model_config is None:
        return False
    config = model_config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    relative_rope = bool(rope) and all(
        settings.get("rope_type") in RELATIVE_ROPE and settings.keys() <= ROPE_KEYS for settings in per_layer_type
    )
    relative_layers = set(getattr(config, "layer_types", None) or ()) <= RELATIVE_LAYERS
    scaled_by_position = bool(getattr(config, "attn_temperature_tuning", False))
    convolutional = any(isinstance(module, nn.Conv1d) for module in model.modules())
    return relative_rope and relative_layers and not scaled_by_position and not convolutional
