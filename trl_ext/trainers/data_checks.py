"""
What the engine refuses of data sets, curricula and names of rewards before a model is loaded. Each function raises
`ValueError` or `TypeError` with what to change.
"""

from typing import Any

from datasets import Dataset, IterableDataset

from ..errors import require
from ..rollouts.choosers import PromptChooser
from ..rollouts.selection import SELECTIONS
from ..rollouts.stream import can_be_read_twice
from .grpo_config import GRPOConfig


def check_data(config: GRPOConfig, dataset: Any, environment_factory: Any) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is None and isinstance(dataset, IterableDataset):
        columns = list(next(iter(dataset), {})) or None  # not declared: its first row tells
    refills = SELECTIONS[config.rollout_selection].draws_prompts
    for column in config.similar_prompts_columns or []:
        require(
            columns is None or column in columns,
            f"similar_prompts_columns names {column!r}, but train_dataset has only {columns}.",
        )
        require(
            not config.remove_unused_columns,
            f"similar_prompts_columns={config.similar_prompts_columns} are dropped by remove_unused_columns=True. "
            "Set remove_unused_columns=False.",
        )
    if environment_factory is None:
        require(dataset is not None, "train_dataset=None: pass a data set with a `prompt` column.")
        require(
            columns is None or "prompt" in columns,
            f"train_dataset has no column `prompt`, only {columns}. Rename the column that holds the prompts.",
        )
    elif refills:
        require(
            dataset is not None and (columns is None or "prompt" in columns),
            "rollout_selection='refill' draws new prompts from train_dataset, but here the environment owns the "
            "data. Set rollout_selection='duplicate' (DUPO), or pass a data set with a `prompt` column.",
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
            "rollout_selection='refill' reads train_dataset beside the training loop, but this iterable data set "
            "can't be read twice (a second pass doesn't start where the first did). Build it from a function that "
            "opens the source anew, or set rollout_selection='duplicate'.",
        )


def check_curriculum(config: GRPOConfig, curriculum: Any, given: dict[str, Any]) -> None:
    """What a curriculum needs of the data set and the settings."""
    if curriculum is None:
        return
    if not isinstance(curriculum, PromptChooser):
        raise TypeError(f"curriculum={curriculum!r} is not a prompt chooser. Pass a DifficultyCurriculum(...).")
    dataset: Any = given.get("train_dataset")
    longest = config.max_completion_length or 0
    require(
        isinstance(dataset, Dataset) and given.get("environment_factory") is None,
        "curriculum chooses among the rows of train_dataset, which must be a datasets.Dataset: not streamed, not an "
        "environment's. Load it without streaming, or leave curriculum out.",
    )
    require(
        config.refill_draws != "informed",
        "curriculum and refill_draws='informed' both choose the prompts. Leave one of them out.",
    )
    require(
        not given.get("tools") or curriculum.completion_length(longest, 0.0) == longest,
        "start_completion_length with tools: TRL counts a tool's tokens by max_completion_length. Leave it out.",
    )


def check_images(config: GRPOConfig, dataset: Any, rollout_func: Any) -> None:
    columns = getattr(dataset, "column_names", None) or []
    require(
        config.rollout_selection == "all" or rollout_func is None or not {"image", "images"} & set(columns),
        f"rollout_selection={config.rollout_selection!r} can't tell whose image is whose when a rollout_func "
        "generates. Set rollout_selection='all', or generate without rollout_func.",
    )


def check_outcome_names(config: GRPOConfig, names: list[str]) -> None:
    for name in config.outcome_reward_funcs or []:
        require(
            name in names, f"outcome_reward_funcs names {name!r}, but the reward functions are {', '.join(names)}."
        )
