"""Checks of the settings of a [`~trl_ext.GRPOConfig`] that say what is generated."""

from typing import Any

from ..errors import require
from ..objectives.advantages import ESTIMATORS


def check_generation(config: Any) -> None:
    """What TRL finds out when it generates."""
    require(
        config.num_generations is None or config.num_generations >= 2 or config._has_critic,
        f"num_generations={config.num_generations}: advantages compare at least 2 generations per prompt. Set "
        "num_generations=2 or more, or use PPOTrainer, whose critic needs only one.",
    )
    for name in ("max_completion_length", "num_generations_eval"):
        value = getattr(config, name)
        require(value is None or value >= 1, f"{name}={value} must be at least 1.")
    require(
        config.temperature > 0,
        f"temperature={config.temperature} must be above 0, because log-probabilities are divided by it. Set it to "
        "1.0, or to 0.6 for less random completions.",
    )


def check_group_sizes(config: Any) -> None:
    """Groups whose sizes differ by prompt, see [`trl_ext.rollouts.groups`]."""
    most, size = config.max_num_generations, config.num_generations
    if most is None:
        return
    given = f"max_num_generations={most}"
    require(
        most > size and most % size == 0,
        f"{given} must be a multiple of num_generations={size}, at least {2 * size}: a prompt gets num_generations "
        "completions once or several times.",
    )
    require(
        config.refill_draws == "informed",
        f"{given} has no effect with refill_draws={config.refill_draws!r}: nothing predicts how many completions a "
        "prompt needs. Set rollout_selection='refill' and refill_draws='informed', or leave max_num_generations out.",
    )
    require(
        config.refill_value == "live",
        f"{given} and refill_value={config.refill_value!r} don't go together: that value of a group doesn't depend on "
        "its size. Leave one of them out.",
    )
    computed_by = ESTIMATORS[config.advantage_estimator].computed_by
    require(
        computed_by != "critic",
        f"{given} is for advantages that compare the completions of a prompt, but those of a critic don't. Leave "
        "max_num_generations out.",
    )
    require(
        computed_by != "trl" or config.multi_objective_aggregation != "normalize_then_sum",
        f"{given} can't be used with multi_objective_aggregation='normalize_then_sum' and advantage_estimator="
        f"{config.advantage_estimator!r}, which normalise over the batch. Set advantage_estimator='leave_one_out', or "
        "multi_objective_aggregation='sum_then_normalize'.",
    )
    require(
        not getattr(config, "normalize_advantages", False),
        f"{given} weighs the completions of a prompt, which normalize_advantages=True would undo. Leave one of them "
        "out.",
    )
