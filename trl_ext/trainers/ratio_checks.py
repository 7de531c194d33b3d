"""
Checks of what bounds importance ratios: clip ranges that fit the ratio's size, a trust region in their place, and
ratios that are exact with the rest of the loss.
"""

from dataclasses import fields
from typing import Any

from ..errors import require, require_one_of
from ..objectives.ratios import IMPORTANCE_LEVELS
from ..objectives.trust_region import TRUST_REGIONS


# Losses that clip the ratio to 1 ± epsilon
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED_LOSSES, "cispo", "sapo", "vespo")  # that TRL's trainer knows
# A sequence ratio is a geometric mean over tokens: it differs from 1 by 1e-4 to 1e-3 when token ratios differ by 1e-1.
# Clip ranges in use are well within these limits (0.1–0.3 for tokens, 2e-4–3e-3 for sequences).
SMALLEST_TOKEN_EPSILON = 0.005
LARGEST_SEQUENCE_EPSILON = 0.05


def check_ratios(config: Any) -> None:
    """
    Raises an error for a [`~trl_ext.GRPOConfig`] whose ratios would not be bounded as it says, and resolves the
    arguments that bound them.

    Raises:
        ValueError: says what to change.
    """
    require_one_of("loss_type", config.loss_type, LOSS_TYPES)
    if TRUST_REGIONS[config.trust_region].divergence is None:
        _check_clip(config)
        _check_replaced_ratio(config)
    _check_trust_region(config)


def note_idle_region(config: Any) -> None:
    """Notes that no update can leave a trust region, once TRL has resolved the sizes of a generation batch."""
    updates = config.gradient_accumulation_steps % (config.steps_per_generation * config.num_iterations)
    if TRUST_REGIONS[config.trust_region].divergence is not None and not updates and not config.use_vllm:
        config._notes.append(
            f"trust_region={config.trust_region!r} has no effect with one optimizer step for each generation batch: "
            "the policy is the one that sampled. Set updates_per_generation or num_iterations to 2 or more."
        )


def _set_by_user(config: Any, *names: str) -> list[str]:
    """Those of the arguments that are not left open, and differ from the default."""
    defaults = {f.name: f.default for f in fields(config)}
    left_open = config._left_open
    return [name for name in names if name not in left_open and getattr(config, name) != defaults[name]]


def _check_clip(config: Any) -> None:
    """Token ratios and sequence ratios need clip ranges of different sizes."""
    if config.loss_type not in CLIPPED_LOSSES:
        return
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    size = IMPORTANCE_LEVELS[config.importance_sampling_level].of
    if size == "token":
        require(
            max(config.epsilon, high) >= SMALLEST_TOKEN_EPSILON,
            f"epsilon={config.epsilon}, epsilon_high={high} are clip ranges for sequence ratios (GSPO), but "
            "importance_sampling_level='token': most token ratios are outside of so narrow a range. Set "
            "importance_sampling_level='sequence', or epsilon=0.2.",
        )
    elif size == "sequence" and max(config.epsilon, high) > LARGEST_SEQUENCE_EPSILON:
        problem = (
            f"epsilon={config.epsilon}, epsilon_high={high} are clip ranges for token ratios, but "
            f"importance_sampling_level={config.importance_sampling_level!r}: almost no sequence would be clipped. "
            "Set epsilon=3e-4 and epsilon_high=4e-4 (GSPO), or importance_sampling_level='token'."
        )
        # A script for TRL that sets the level but no clip range has to run as it does with TRL
        if _set_by_user(config, "epsilon", "epsilon_high"):
            raise ValueError(problem)
        config._notes.append(f"{problem} Training continues with this range, as in TRL.")


def _check_replaced_ratio(config: Any) -> None:
    level = config.importance_sampling_level
    if IMPORTANCE_LEVELS[level].old_logps is None:
        return
    refused = {"loss_type": (config.loss_type == "vespo", "'grpo'")}  # which computes a ratio of its own
    if level == "sequence_token":
        refused["use_bias_correction_kl"] = (bool(config.use_bias_correction_kl), "False")
        refused["top_entropy_quantile"] = (config.top_entropy_quantile < 1.0, "1.0")
    for name, (wrong, remedy) in refused.items():
        require(
            not wrong,
            f"{name}={getattr(config, name)!r} is not exact with importance_sampling_level={level!r}. Set "
            f"{name}={remedy}, or importance_sampling_level='sequence'.",
        )


def _check_trust_region(config: Any) -> None:
    """A trust region takes the place of the clip, and is about tokens."""
    name, threshold = config.trust_region, config.trust_region_threshold
    region = TRUST_REGIONS[name]
    if region.divergence is None:
        require(
            threshold is None,
            f"trust_region_threshold={threshold} has no effect with trust_region={name!r}, whose bound is epsilon. "
            "Set trust_region='binary_tv', or leave trust_region_threshold out.",
        )
        return
    clips = [f"{other}={getattr(config, other)}" for other in _set_by_user(config, "epsilon", "epsilon_high", "delta")]
    require(
        not clips,
        f"{' and '.join(clips)} would clip the ratio, in whose place trust_region={name!r} bounds a divergence. Leave "
        "it out, or set trust_region='ratio_clip'.",
    )
    require(
        config.importance_sampling_level == "token",
        f"trust_region={name!r} bounds a divergence of each token, but importance_sampling_level="
        f"{config.importance_sampling_level!r} has one ratio for a completion. Set importance_sampling_level='token', "
        "or trust_region='ratio_clip'.",
    )
    require(
        config.loss_type in CLIPPED_LOSSES,
        f"trust_region={name!r} takes the place of the clip to 1 ± epsilon, which loss_type={config.loss_type!r} "
        f"doesn't have. Set loss_type to one of {', '.join(map(repr, CLIPPED_LOSSES))}, or trust_region='ratio_clip'.",
    )
    if threshold is None:
        config.trust_region_threshold = threshold = region.threshold
    require(
        threshold > 0 and (region.largest is None or threshold < region.largest),
        f"trust_region_threshold={threshold} must be above 0"
        + (f" and below {region.largest:g}, the largest divergence of {name!r}" if region.largest is not None else "")
        + f". A usual value is {region.threshold}.",
    )
    config.epsilon = config.epsilon_high = None  # so that nothing says that there is a clip
