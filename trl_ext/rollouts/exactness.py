"""
Which savings of compute leave the gradient as it is, for which loss and which model.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


# Losses whose value is a mean over the rows of a micro-batch: with other rows in it, it is scaled back
ROW_MEAN_LOSSES = ("grpo", "sapo", "luspo", "dr_grpo")
# Divides by the tokens of its own micro-batch
MICRO_BATCH_MEAN_LOSSES = ("bnpo",)

# Rotary position embeddings that depend on differences of positions only; `dynamic` and `longrope` read the length
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
    Which savings leave the gradient as it is.

    Args:
        trim_prompts (`bool`):
            Left padding may be cut; right padding of completions always may.
        regroup (`bool`):
            Rows may change their micro-batch inside an optimizer step, and rows without a token in the loss be left
            out.
        skip_dead (`bool`):
            Rows whose advantage is zero may be left out.
        weigh_copies (`bool`):
            Copies of a row in one optimizer step may be computed once, with their number as weight.
        reasons (`tuple[str]`):
            Why not, for each that is not exact.
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
            TRL's.
        kl (`bool`):
            Whether the loss has a KL term: it moves rows without advantage too.
        entropy_terms (`bool`):
            Whether an entropy bonus or entropy quantile is taken over each micro-batch.
        aux_loss (`bool`):
            Whether experts are balanced over each micro-batch.
        relative_positions (`bool`):
            Whether left padding doesn't move the model's outputs ([`has_relative_positions`]).
        value_loss (`bool`):
            Whether a critic learns from rows without advantage too.
    """
    reasons = []
    if not relative_positions:
        reasons.append("the left padding of prompts is kept: the model's positions may be absolute")
    composed = {
        f"loss_type='{loss_type}' divides by the tokens of its micro-batch": loss_type in MICRO_BATCH_MEAN_LOSSES,
        "the entropy term is taken over each micro-batch": entropy_terms,
        "the auxiliary loss balances experts over each micro-batch": aux_loss,
    }
    bound = [reason for reason, holds in composed.items() if holds]
    if bound:
        reasons.append(f"rows keep their micro-batch, and all are computed: {' and '.join(bound)}")
    elif kl or value_loss:
        term = "KL term (beta)" if kl else "value loss"
        reasons.append(f"rows without advantage are computed, copies too: the {term} gives them a gradient")
    policy_only = not bound and not kl and not value_loss
    return ExactSavings(relative_positions, not bound, policy_only, policy_only, tuple(reasons))


def has_relative_positions(model: nn.Module) -> bool:
    """
    Whether cutting left padding leaves a model's outputs as they are. TRL passes no positions, so that they count from
    the first column, padding included. Known to be so for rotary embeddings that depend on differences only;
    everything else (learned positions, recurrent or convolutional layers, chunked attention, scales that depend on the
    position) counts as not.
    """
    unknown: Any = getattr(model, "config", None)
    if unknown is None:
        return False
    config = unknown.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    rotary = bool(rope) and all(
        settings.get("rope_type") in RELATIVE_ROPE and settings.keys() <= ROPE_KEYS for settings in per_layer_type
    )
    layers = set(getattr(config, "layer_types", None) or ()) <= RELATIVE_LAYERS
    scaled = bool(getattr(config, "attn_temperature_tuning", False))
    recurrent = any(isinstance(module, nn.Conv1d) for module in model.modules())
    return rotary and layers and not scaled and not recurrent
