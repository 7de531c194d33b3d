"""
Which savings of compute are exact, which means that they leave the gradient unchanged, for a loss and a model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn


# Losses that are a mean over the rows of a micro-batch. If the number of rows changes, the loss has to be rescaled.
ROW_MEAN_LOSSES = ("grpo", "sapo", "luspo", "dr_grpo")
# Losses that divide by the number of tokens of their own micro-batch
MICRO_BATCH_MEAN_LOSSES = ("bnpo",)

# Rotary position embeddings whose angles depend on the position alone: attention depends on differences of positions
FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
# Those whose angles change for all positions as soon as the batch, padding included, has more columns than the model
# was first trained on
WIDTH_DEPENDENT_ROPE = ("dynamic", "longrope")
ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("truncate", "short_factor", "long_factor"),
}
RELATIVE_LAYERS = {"full_attention", "sliding_attention"}
# What a configuration doesn't show. `tests/rollouts/test_architectures.py` looks for others in all of transformers.
ABSOLUTE_ARCHITECTURES = {
    "beam": "scales queries by their position",
    "hunyuan_v1_dense": "weighs the dimensions of queries and keys after their rotation",
    "hunyuan_v1_moe": "weighs the dimensions of queries and keys after their rotation",
}
NOT_CAUSAL_ARCHITECTURES = ("cpmant", "prophetnet")


class FullWidth(NamedTuple):
    """
    Batches whose padding is kept on both sides.

    Args:
        columns (`int`):
            Those with at least this many columns, prompts and completions together.
        reason (`str`):
            Why.
    """

    columns: int
    reason: str


@dataclass(frozen=True)
class ExactSavings:
    """
    Which savings of compute are exact.

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
        trim_completions (`bool`, *optional*, defaults to `True`):
            Whether the right padding of completions may be cut.
        full_width_from (`int`, *optional*):
            Columns of a batch from which on its padding is kept on both sides, see [`ExactSavings.for_width`].
        fewest_rows (`int`, *optional*, defaults to `1`):
            Rows that a micro-batch has at least, if TRL's have as many.
        reasons (`tuple[str]`):
            For each saving that is not exact, why.
    """

    trim_prompts: bool
    regroup: bool
    skip_dead: bool
    weigh_copies: bool
    trim_completions: bool = True
    full_width_from: int | None = None
    fewest_rows: int = 1
    reasons: tuple[str, ...] = ()

    def for_width(self, columns: int) -> "ExactSavings":
        """Those for a batch of this many columns, prompts and completions together."""
        if self.full_width_from is None or columns < self.full_width_from:
            return self
        return replace(self, trim_prompts=False, trim_completions=False)


def exact_savings(
    loss_type: str,
    *,
    kl: bool,
    entropy_terms: bool,
    aux_loss: bool,
    relative_positions: bool,
    full_width: FullWidth | None = None,
    fewest_rows: int = 1,
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
        full_width ([`FullWidth`], *optional*):
            Batches whose padding the model's outputs depend on ([`needs_full_width`]).
        fewest_rows (`int`, *optional*, defaults to `1`):
            Rows with which the model's outputs are those of any larger batch ([`fewest_rows`]).
        value_loss (`bool`):
            Whether a critic learns, which gives rows without advantage a gradient.
    """
    reasons = []
    if full_width is not None:
        batches = f"in batches of {full_width.columns} or more columns, " if full_width.columns else ""
        reasons.append(f"{batches}the padding of prompts and completions is kept: {full_width.reason}")
    if not relative_positions and (full_width is None or full_width.columns):
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
        full_width_from=None if full_width is None else full_width.columns,
        fewest_rows=fewest_rows,
        reasons=tuple(reasons),
    )


def _config_of(model: nn.Module) -> Any:
    """The configuration of a model's part that reads text. `None` if it has none."""
    config: Any = getattr(model, "config", None)
    return None if config is None else config.get_text_config()


def _rope_settings(config: Any) -> Iterator[dict[str, Any]]:
    """What a configuration says of each rotary embedding. Those of types of layers stand in a dictionary each."""
    for name in ("rope_parameters", "rope_scaling"):  # the latter in models with code of their own
        rope = getattr(config, name, None) or {}
        yield from [value for value in rope.values() if isinstance(value, dict)] or ([rope] if rope else [])


def _rope_type(settings: dict[str, Any]) -> str:
    return settings.get("rope_type") or settings.get("type") or "default"


def _has_own_code(model: nn.Module) -> bool:
    """Whether a model was loaded with `trust_remote_code`, from code that isn't part of transformers."""
    return any(type(module).__module__.startswith("transformers_modules.") for module in model.modules())


def has_relative_positions(model: nn.Module) -> bool:
    """
    Whether cutting left padding leaves a model's outputs unchanged, in batches that [`needs_full_width`] doesn't name.
    TRL passes no positions, so that the model counts them from the first column, padding included. The answer is yes
    for rotary embeddings that make attention depend on differences of positions, and no for everything else: learned
    positions, recurrent or convolutional layers, chunked attention, scales that depend on the position.
    """
    config = _config_of(model)
    if config is None or config.model_type in ABSOLUTE_ARCHITECTURES or _has_own_code(model):
        return False
    rope = list(_rope_settings(config))
    relative_rope = bool(rope) and all(
        _rope_type(settings) in FIXED_ROPE + WIDTH_DEPENDENT_ROPE and settings.keys() <= ROPE_KEYS for settings in rope
    )
    relative_layers = set(getattr(config, "layer_types", None) or ()) <= RELATIVE_LAYERS
    scaled_by_position = bool(getattr(config, "attn_temperature_tuning", False))
    return relative_rope and relative_layers and not scaled_by_position and not _is_convolutional(model)


def needs_full_width(model: nn.Module) -> FullWidth | None:
    """
    The batches in which cutting right padding changes a model's outputs. `None`: there are none. Almost all models are
    causal, so that no token sees the padding after it. But some rotary embeddings take their angles from the largest
    position of the batch; of what isn't known to be neither, all padding is kept.
    """
    config = _config_of(model)
    if _has_own_code(model):
        return FullWidth(0, "the model's code is not part of transformers, and may depend on it")
    if config is None:
        return None
    if config.model_type in NOT_CAUSAL_ARCHITECTURES:
        return FullWidth(0, f"in the architecture {config.model_type!r}, tokens depend on what comes after them")
    found = []
    for settings in _rope_settings(config):
        rope_type = _rope_type(settings)
        if rope_type not in FIXED_ROPE:
            names = ("original_max_position_embeddings", "max_position_embeddings")
            known = [settings.get(name) or getattr(config, name, None) for name in names]
            columns = min(filter(None, known), default=0) if rope_type in WIDTH_DEPENDENT_ROPE else 0
            reason = f"the angles of the model's rotary embedding ({rope_type!r}) depend on the width of the batch"
            found.append(FullWidth(columns, reason))
    return min(found, default=None)


def _is_convolutional(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv1d) for module in model.modules())


def fewest_rows(model: nn.Module) -> int:
    """
    Rows with which a model's outputs are those of any larger batch. Recurrent layers have a convolution, and in some
    releases of transformers they see left padding if a batch has one row, but not if it has several.
    """
    return 2 if _is_convolutional(model) else 1
