"""
Checks of reward functions, reward models, and what belongs to them, before a model is loaded.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import trl.rewards
from peft import PeftModel
from torch import nn
from transformers import AutoConfig
from trl.trainer.utils import get_callable_name

from ..errors import require, shown
from ..rewards.adapter import AdapterReward
from ..rewards.guard import RewardFunctionError
from ..rewards.models import RewardModelOnIds
from ..roles.reward_adapter import ON_ITS_OWN, check_has_head, is_adapter
from .grpo_config import GRPOConfig
from .tokenizer_checks import check_tokenizer


# What TRL passes to a reward function besides the columns of the data set
PASSED_BY_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that TRL leaves out
LEFT_OUT_BY_TRL = ("prompt", "completion", "completion_ids")
# Columns for which TRL calls a reward function with two arguments of that name
TAKEN_NAMES = ("prompts", "completions")
# Columns that reward functions would be given TRL's own value for
HIDDEN_NAMES = ("trainer_state", "log_extra", "log_metric")

# Ends of the names of classes that are no sequence classifiers
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def as_list(reward_funcs: Any) -> list[Any]:
    """A new list of reward functions, from what a trainer takes: none, one, or several."""
    if reward_funcs is None:
        return []
    return list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]


def is_function(func: Any) -> bool:
    """Whether a reward function is one, and no model or name of a model."""
    return callable(func) and not isinstance(func, nn.Module)


def check_rewards(config: GRPOConfig, given: Mapping[str, Any], columns: Sequence[str] | None) -> None:
    """
    Raises an error for rewards that a run would stop at.

    Args:
        config ([`GRPOConfig`]):
            The trainer's.
        given (`Mapping[str, Any]`):
            Arguments of the trainer, `reward_funcs` as a list.
        columns (`Sequence[str]`, *optional*):
            Columns of the training set that reach reward functions; `None` if they aren't known.

    Raises:
        TypeError: for what is no reward function, model or name of a model.
        ValueError: for anything else.
    """
    funcs = given["reward_funcs"]
    for func in funcs:
        check_kind(func)
    require(
        bool(funcs) or given.get("environment_factory") is not None,
        "reward_funcs is empty, so that there is nothing to learn from. Pass a function, a reward model, or an "
        "environment_factory whose environment has `get_reward`.",
    )
    _check_packages(funcs)
    _check_models(funcs, config.trust_remote_code)
    _check_adapters(config, given)
    _check_counts(config, given)
    if given.get("rollout_func") is None and columns is not None:  # it may add columns
        reads_columns = list(filter(is_function, funcs))
        _check_names(columns, bool(reads_columns) or given.get("environment_factory") is not None)
        extra = [] if given.get("environment_factory") is None else ["environments"]
        for func in reads_columns:
            check_signature(func, config, [*columns, *extra])


def check_kind(func: Any) -> None:
    """Raises an error for what is no reward function, model or name of a model."""
    if isinstance(func, str):
        require(
            not hasattr(trl.rewards, func),
            f"reward_funcs has the name {func!r}, which would be loaded as a model. Pass the function: from "
            f"trl.rewards import {func}.",
        )
        return
    if isinstance(func, type) or not callable(func):
        what = f"Pass an object: {func.__name__}(...)" if isinstance(func, type) else "Pass functions"
        raise TypeError(f"reward_funcs has {shown(func)}. {what}, a model, or the id or folder of one.")


def _check_packages(funcs: Sequence[Any]) -> None:
    """
    Calls TRL's own reward functions on a sample, because some need a package that TRL doesn't install. (Those of a
    user may keep state, or cost something: they are not called.)
    """
    for func in funcs:
        if not is_function(func) or not str(getattr(func, "__module__", "")).startswith(trl.rewards.__name__):
            continue
        try:
            func(
                prompts=["1 + 1 ="],
                completions=[[{"role": "assistant", "content": "2"}]],
                completion_ids=[[0]],
                solution=["2"],
            )
        except ImportError as error:
            raise ValueError(
                f"reward_funcs has trl.rewards' `{get_callable_name(func)}`, which can't be called: {error}. Install "
                "the package it needs, or pass a reward function of your own."
            ) from error


def _check_models(funcs: Sequence[Any], trust_remote_code: bool) -> None:
    """Reward models give one number. `funcs` are functions, models, and ids or folders of models."""
    for func in funcs:
        model = func.model if isinstance(func, RewardModelOnIds) else func
        kinds = _architectures(model, trust_remote_code) if isinstance(model, str) else [type(model).__name__]
        named = f"{model!r} is" if isinstance(model, str) else "is"
        require(
            not kinds or not all(kind.endswith(LANGUAGE_MODELS) for kind in kinds),
            f"The reward model {named} a {' and '.join(kinds)}: as a sequence classifier it would get a head of "
            "random weights. Train one on pairs (recipes/reward.py), or name a sequence classification model.",
        )
        if isinstance(model, nn.Module):
            outputs = getattr(getattr(model, "config", None), "num_labels", 1)
            require(
                outputs == 1,
                f"The reward model {type(model).__name__} has {outputs} outputs, and the first would be the reward. "
                "Load it with num_labels=1, or write a reward function that makes one number of its outputs.",
            )


def _check_adapters(config: GRPOConfig, given: Mapping[str, Any]) -> None:
    """Reward models that are adapters: on the policy's base, and loaded as models of their own."""
    policy: Any = given.get("model")  # if it is missing, TRL says so
    funcs = given["reward_funcs"]
    for func in funcs:
        if isinstance(func, str) and is_adapter(func):
            check_has_head(func)
    shared = [func for func in funcs if isinstance(func, AdapterReward)]
    if not shared:
        return
    first = shared[0]
    require(
        isinstance(policy, PeftModel) or given.get("peft_config") is not None,
        f"The reward adapter in {first.folder} relies on the base {first.files.base!r} as it is, and without a "
        f"peft_config the whole policy is trained. Pass a peft_config (recipes: --use_peft true), or {ON_ITS_OWN}.",
    )
    names = [func.adapter for func in shared]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(
        twice is None,
        f"Two reward adapters, {' and '.join(f.folder for f in shared if f.adapter == twice)}, would both be "
        f"{twice!r} in the policy. Pass AdapterReward(..., adapter='another name') for one of them.",
    )
    require(
        config.rewards_in_flight is None and config.reward_timeout is None,
        f"rewards_in_flight={config.rewards_in_flight} and reward_timeout={config.reward_timeout} call reward "
        f"functions from other threads, and the reward adapter in {first.folder} switches the adapters of the policy, "
        f"which is in use then. Leave both at None, or {ON_ITS_OWN}.",
    )
    name = policy if isinstance(policy, str) else policy.config.name_or_path
    try:
        is_name = isinstance(policy, str)
        of_policy = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code) if is_name else None
    except (OSError, ValueError):  # whoever loads it will say so
        return
    for func in shared:
        func.files.check_base(of_policy or policy.config, name, func.check_base_name)


def _architectures(model: str, trust_remote_code: bool) -> list[str]:
    """The classes that a model's configuration names; empty if it can't be read before the model is loaded."""
    try:
        return list(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).architectures or [])
    except (OSError, ValueError):  # whoever loads it will say so
        return []


def _check_counts(config: GRPOConfig, given: Mapping[str, Any]) -> None:
    count = len(given["reward_funcs"])
    weights = config.reward_weights
    require(
        weights is None or len(weights) == count,
        f"reward_weights={shown(weights)} for {count} reward functions. Give one weight for each, in their order.",
    )
    classes = given.get("reward_processing_classes")
    if classes is None:
        return
    classes = classes if isinstance(classes, list) else [classes]
    require(
        len(classes) == count,
        f"reward_processing_classes has {len(classes)} elements for {count} reward functions. Give one for each, None "
        "for functions.",
    )
    for tokenizer in classes:
        check_tokenizer("reward_processing_classes", tokenizer)


def _check_names(columns: Sequence[str], has_functions: bool) -> None:
    if not has_functions:
        return
    for column in columns:
        require(
            column not in (*TAKEN_NAMES, *HIDDEN_NAMES),
            f"train_dataset has a column {column!r}, and reward functions get an argument of that name from TRL. "
            f"Rename the column: train_dataset.rename_column({column!r}, ...), or set remove_unused_columns=True.",
        )


def check_signature(func: Any, config: GRPOConfig, columns: Sequence[str], name: str = "train_dataset") -> None:
    """
    Whether a reward function can be called with what TRL passes, and with those `columns` of the data set `name` that
    reach it. (What a decorator takes counts, not what it wraps.)

    Raises:
        ValueError: naming the function and the argument.
    """
    try:
        parameters = inspect.signature(func, follow_wrapped=False).parameters
    except (TypeError, ValueError):  # it has none that Python can tell
        return
    passed = [*PASSED_BY_TRL, *(column for column in columns if column not in LEFT_OUT_BY_TRL)]
    by_name = {parameter.name: parameter for parameter in parameters.values() if parameter.kind in _BY_NAME}
    missing = [p.name for p in by_name.values() if p.default is p.empty and p.name not in passed]
    dropped = " (remove_unused_columns=True drops others: set it to False.)" if config.remove_unused_columns else ""
    require(
        not missing,
        f"The reward function `{get_callable_name(func)}` needs the argument {missing and missing[0]!r}, and {name} "
        f"has only the columns {list(columns)}. Add a column of that name, or rename one.{dropped}",
    )
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [argument for argument in passed if argument not in by_name]
    require(
        takes_all or not unknown,
        f"The reward function `{get_callable_name(func)}` can't take {unknown and unknown[0]!r}: TRL calls it with "
        f"{passed}, all by name. Add **kwargs to its arguments.",
    )


def check_outcome_names(config: GRPOConfig, names: list[str]) -> None:
    """Whether `outcome_reward_funcs` names reward functions of the trainer, whose names are `names`."""
    for name in config.outcome_reward_funcs or []:
        require(
            name in names,
            f"outcome_reward_funcs names {name!r}, but the reward functions are {', '.join(names)}. Name some of "
            "these.",
        )


def check_not_negative(estimator: str, totals: torch.Tensor, rewards: torch.Tensor, names: list[str]) -> None:
    """
    For an advantage estimator that divides by rewards: raises an error if one of the `totals` `(N,)` is negative.
    `rewards` `(N, F)` are those of the functions, whose names are `names`, and everything is the same on every rank.

    Raises:
        RewardFunctionError: so that what was trained is saved.
    """
    lowest = totals.nan_to_num(nan=0.0).argmin()
    if totals.numel() == 0 or not totals[lowest] < 0:
        return
    parts = [f"`{name}` {value:g}" for name, value in zip(names, rewards[lowest].tolist(), strict=True)]
    raise RewardFunctionError(
        f"advantage_estimator={estimator!r} divides by the mean reward of a group, and a completion has the reward "
        f"{totals[lowest].item():g} ({', '.join(parts)}). Return rewards of 0 and more, such as 0 and 1, and leave "
        "out punishments and negative reward_weights, or choose another advantage_estimator."
    )
