"""
Checks of data sets, curricula and names of reward functions before a model is loaded. If a check fails, it raises
`ValueError` or `TypeError` with a message that says what to change.
"""

from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoConfig

from ..errors import require
from ..rollouts.choosers import PromptChooser
from ..rollouts.selection import SELECTIONS
from ..rollouts.stream import can_be_read_twice
from .grpo_config import GRPOConfig


def check_data(config: GRPOConfig, dataset: Any, environment_factory: Any) -> None:
    """Whether the data set has prompts, in sufficient number, and can be used as `config` says."""
    columns = getattr(dataset, "column_names", None)
    if columns is None and isinstance(dataset, IterableDataset):
        columns = list(next(iter(dataset), {})) or None  # not declared, but its first row has them
    _check_similar_prompts_columns(config, columns)
    refills = SELECTIONS[config.rollout_selection].draws_prompts
    if environment_factory is None:
        require(dataset is not None, "train_dataset=None: pass a data set with a `prompt` column.")
        require(
            columns is None or "prompt" in columns,
            f"train_dataset has no column `prompt`, only {columns}. Rename the column that holds the prompts.",
        )
    elif refills:
        require(
            dataset is not None,
            "rollout_selection='refill' draws new prompts from train_dataset, but here the environment owns the data. "
            "Set rollout_selection='duplicate' (DUPO), or pass a data set.",
        )
        require(
            columns is None or bool({*columns} - {"environment"}),
            "rollout_selection='refill' draws prompts that aren't in the batch yet, and by the column `environment` "
            "alone, nobody can tell which rows those are. Set rollout_selection='duplicate' (DUPO), or add a column "
            "from which the environment's `reset` makes the prompt, such as a seed.",
        )
    if isinstance(dataset, Dataset):
        assert config.generation_batch_size and config.num_generations  # TRL has set and checked both
        prompts = config.generation_batch_size // config.num_generations
        require(
            len(dataset) >= prompts,
            f"train_dataset has {len(dataset)} prompts, fewer than the {prompts} of one generation batch "
            f"(generation_batch_size={config.generation_batch_size} / num_generations={config.num_generations}). "
            "Lower per_device_train_batch_size, gradient_accumulation_steps or updates_per_generation.",
        )
    elif isinstance(dataset, IterableDataset) and refills:
        require(
            can_be_read_twice(dataset),
            "rollout_selection='refill' reads train_dataset independently of the training loop, but this iterable "
            "data set can't be read twice: a second pass doesn't start where the first did. Build it from a function "
            "that opens the source for each pass, or set rollout_selection='duplicate'.",
        )


def _check_similar_prompts_columns(config: GRPOConfig, columns: list[str] | None) -> None:
    for column in config.similar_prompts_columns or []:
        require(
            columns is None or column in columns,
            f"similar_prompts_columns names {column!r}, but train_dataset has only {columns}. Name some of these.",
        )
        require(
            not config.remove_unused_columns,
            f"similar_prompts_columns={config.similar_prompts_columns} are dropped by remove_unused_columns=True. "
            "Set remove_unused_columns=False.",
        )


def check_curriculum(config: GRPOConfig, curriculum: Any, given: dict[str, Any]) -> None:
    """Whether a curriculum can be used with the trainer's arguments `given` and with `config`."""
    if curriculum is None:
        return
    if not isinstance(curriculum, PromptChooser):
        raise TypeError(f"curriculum={curriculum!r} is not a prompt chooser. Pass a DifficultyCurriculum(...).")
    dataset: Any = given.get("train_dataset")
    longest = config.max_completion_length or 0
    require(
        isinstance(dataset, Dataset) and given.get("environment_factory") is None,
        "curriculum chooses among the rows of train_dataset, which must be a datasets.Dataset, neither streamed nor "
        "owned by an environment. Load it without streaming, or leave curriculum out.",
    )
    require(
        config.refill_draws != "informed",
        "curriculum and refill_draws='informed' would both choose the prompts. Leave one of them out.",
    )
    require(
        not given.get("tools") or curriculum.completion_length(longest, 0.0) == longest,
        "start_completion_length can't be used with tools, because TRL limits a tool's tokens by "
        "max_completion_length. Leave start_completion_length out.",
    )


def check_images(config: GRPOConfig, dataset: Any, rollout_func: Any) -> None:
    """Whether selection can tell which images belong to which completion."""
    columns = getattr(dataset, "column_names", None) or []
    require(
        config.rollout_selection == "all" or rollout_func is None or not {"image", "images"} & set(columns),
        f"rollout_selection={config.rollout_selection!r} can't tell which images belong to which completion if a "
        "rollout_func generates. Set rollout_selection='all', or leave rollout_func out.",
    )


def check_reward_models(funcs: list[Any], trust_remote_code: bool) -> None:
    """Reward models give one number. `funcs` are functions, models, and ids or folders of models."""
    for func in funcs:
        model = getattr(func, "model", func)
        if isinstance(model, str):
            kinds = _architectures(model, trust_remote_code)
            require(
                not kinds or not all(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds),
                f"The reward model {model!r} is a {' and '.join(kinds)}: as a sequence classifier it would get a head "
                "of random weights. Train one on pairs (recipes/reward.py), or name a sequence classification model.",
            )
        elif isinstance(model, nn.Module):
            outputs = getattr(getattr(model, "config", None), "num_labels", 1)
            require(
                outputs == 1,
                f"The reward model {type(model).__name__} has {outputs} outputs, and the first would be the reward. "
                "Load it with num_labels=1, or write a reward function that makes one number of its outputs.",
            )


def _architectures(model: str, trust_remote_code: bool) -> list[str]:
    """The classes that a model's configuration names; empty if it can't be read before the model is loaded."""
    try:
        return list(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).architectures or [])
    except (OSError, ValueError):  # whoever loads it will say so
        return []


def check_outcome_names(config: GRPOConfig, names: list[str]) -> None:
    """Whether `outcome_reward_funcs` names reward functions of the trainer, whose names are `names`."""
    for name in config.outcome_reward_funcs or []:
        require(
            name in names,
            f"outcome_reward_funcs names {name!r}, but the reward functions are {', '.join(names)}. Name some of "
            "these.",
        )
