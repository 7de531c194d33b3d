"""
Checks of data sets, tools and curricula of trainers with rollouts, before a model is loaded. If a check fails, it
raises `ValueError` or `TypeError` with a message that says what to change.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException
from trl.trainer.utils import get_callable_name

from ..errors import require, require_type, shown
from ..rollouts.choosers import PromptChooser
from ..rollouts.generation_batch import Rows
from ..rollouts.prompt_forms import MESSAGES, TEXT, fault_of, form_of
from ..rollouts.selection import SELECTIONS
from ..rollouts.stream import can_be_read_twice
from .argument_checks import evaluation_sets
from .grpo_config import GRPOConfig
from .reward_checks import as_list, check_rewards, check_signature, is_function
from .samples import Sample, sample_of
from .sampling import further_ends
from .tokenizer_checks import check_chat_template, check_vocabulary


def check_inputs(config: GRPOConfig, given: dict[str, Any], curriculum: Any) -> Sample:
    """
    Raises an error for arguments of a trainer with rollouts that can't be used, alone or together. `reward_funcs` in
    the arguments `given` becomes a list.

    Returns:
        [`~trl_ext.trainers.samples.Sample`]: of the training set, for [`check_loaded`].
    """
    environments, rollout_func = given.get("environment_factory"), given.get("rollout_func")
    sample = check_data(config, given.get("train_dataset"), environments, rollout_func)
    check_images(config, given.get("train_dataset"), rollout_func)
    check_curriculum(config, curriculum, given)
    require(
        config.generation_chunks == 1 or not (given.get("tools") or environments),
        f"generation_chunks={config.generation_chunks} can't be used with tools or environments, because TRL "
        "binds them to the rows of the whole batch. Leave generation_chunks at 1: with rewards_in_flight, groups "
        "are still scored at the same time.",
    )
    _check_tokenizer(config, given.get("processing_class"), sample, rollout_func)
    _check_tools(given.get("tools"), sample)
    given["reward_funcs"] = as_list(given.get("reward_funcs"))
    check_rewards(config, given, _seen_by_rewards(config, sample.columns))
    _check_evaluation(config, given)
    return sample


def check_loaded(trainer: Any, sample: Sample) -> None:
    """Raises `ValueError` for models and tokenizers of a trainer that can't be used together, or with its data."""
    _check_tokenizer(trainer.args, trainer.processing_class, sample, trainer.rollout_func)
    if trainer.rollout_func is not None:
        return
    prompts = [row["prompt"] for row in sample.rows if "prompt" in row]
    if trainer.tools:  # those of environments, too
        check_prompts_for_tools("tools and environments", prompts)
    check_vocabulary("model", trainer.model, "processing_class", trainer.processing_class, prompts)
    names, tokenizers = trainer.reward_func_names, trainer.reward_processing_classes
    for func, name, tokenizer in zip(trainer.reward_funcs, names, tokenizers, strict=True):
        if isinstance(func, nn.Module):
            check_chat_template(f"the tokenizer of the reward model `{name}`", tokenizer, prompts)
            check_vocabulary(f"reward model `{name}`", func, "reward_processing_classes", tokenizer, prompts)


def check_data(config: GRPOConfig, dataset: Any, environment_factory: Any, rollout_func: Any = None) -> Sample:
    """Whether the data set has prompts, in sufficient number, and can be used as `config` says."""
    refills = SELECTIONS[config.rollout_selection].draws_prompts
    sample = Sample(None, []) if dataset is None else sample_of("train_dataset", dataset, ["prompt"])
    columns = sample.columns
    _check_similar_prompts_columns(config, columns)
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
    if rollout_func is None:  # it may take prompts of any form
        check_prompts("train_dataset", sample.rows)
    return sample


def check_prompts(name: str, rows: Sequence[Mapping[str, Any]], may_lack_them: bool = False) -> None:
    """
    Raises `ValueError` for rows whose prompts TRL can't tokenize together.

    Args:
        name (`str`):
            What the rows are, at the start of a message.
        rows (`Sequence[Mapping[str, Any]]`):
            Data set rows.
        may_lack_them (`bool`, *optional*, defaults to `False`):
            Whether an environment writes the prompts of rows without one.
    """
    forms: dict[str, int] = {}
    for number, row in enumerate(rows):
        if "prompt" not in row:
            require(may_lack_them, f"{name}: row {number} has no `prompt`, only {sorted(row)}. Add one.")
            continue
        fault = fault_of(row["prompt"])
        require(fault is None, f"{name}: `prompt` of row {number} {fault}")
        forms.setdefault(form_of(row["prompt"]), number)
    require(
        len(forms) < 2,
        f"{name}: some prompts are text (row {forms.get(TEXT)}), others are messages (row {forms.get(MESSAGES)}). "
        "Write all of them in one form.",
    )


def rows_of(rows: Any) -> Rows:
    """
    Data set rows as a list, from a list of dicts or a data set.

    Raises:
        TypeError: for anything else.
        ValueError: if there are none.
    """
    remedy = "Pass a list of dicts with a `prompt`, or a datasets.Dataset."
    require_type("rows", rows, list | Dataset, remedy)
    listed: Rows = list(rows)
    require(bool(listed), f"rows is empty. {remedy}")
    for row in listed:
        require_type("a row of rows", row, dict, remedy)
    return listed


def _check_tokenizer(config: GRPOConfig, tokenizer: Any, sample: Sample, rollout_func: Any) -> None:
    """What generation needs of a tokenizer that was passed."""
    if tokenizer is None or rollout_func is not None:
        return
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    ends = [*further_ends(config), getattr(config, "stop_token_id", None)]  # the last is PPO's
    require(
        inner.eos_token_id is not None or any(end is not None for end in ends),
        f"processing_class is {shown(inner)} without an end-of-sequence token, which ends completions. Set its "
        "eos_token.",
    )
    prompts = [row["prompt"] for row in sample.rows if "prompt" in row]
    check_chat_template("processing_class", tokenizer, prompts)
    require(
        not prompts or any(prompts) or bool(inner("")["input_ids"]),
        f"train_dataset: `prompt` is '' in all of the first {len(prompts)} rows, and this tokenizer adds no token to "
        "an empty text, so that there is nothing to continue. Fill the prompts in, or write its bos_token.",
    )


def _check_tools(tools: Any, sample: Sample) -> None:
    if not tools:
        return
    require_type("tools", tools, list | tuple, "Pass a list of functions, also for a single one.")
    for tool in tools:
        if not callable(tool) or isinstance(tool, type) or not hasattr(tool, "__name__"):
            raise TypeError(f"tools has {shown(tool)}. Pass functions with type hints and a docstring.")
        try:
            get_json_schema(tool)
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise ValueError(
                f"The tool `{get_callable_name(tool)}` in tools can't be described to a model: {error} Add type "
                "hints, and a docstring with a line for each argument (Google style)."
            ) from error
    check_prompts_for_tools("tools", [row["prompt"] for row in sample.rows if "prompt" in row])


def check_prompts_for_tools(name: str, prompts: Sequence[Any]) -> None:
    """Raises `ValueError` if prompts are text: tools are called in conversations."""
    require(
        not prompts or form_of(prompts[0]) == MESSAGES,
        f"{name} can only be called in conversations, and `prompt` is text, {shown((prompts or [''])[0])}. Write "
        f"messages: [{{'role': 'user', 'content': ...}}], or leave {name} out.",
    )


def _seen_by_rewards(config: GRPOConfig, columns: list[str] | None) -> list[str] | None:
    """The columns that reach reward functions."""
    kept = ("prompt", "image", "images")  # by TRL's trainer
    return [column for column in columns if column in kept] if config.remove_unused_columns and columns else columns


def _check_evaluation(config: GRPOConfig, given: Mapping[str, Any]) -> None:
    for name, dataset in evaluation_sets(given.get("eval_dataset")).items():
        if not isinstance(dataset, Dataset | IterableDataset):
            continue  # TRL takes whatever its loader can read
        sample = sample_of(name, dataset, ["prompt"])
        columns = sample.columns
        require(
            not isinstance(dataset, Dataset) or len(dataset) > 0,
            f"{name} has 0 rows. Pass some prompts, or leave eval_dataset out and set eval_strategy='no'.",
        )
        owned = given.get("environment_factory") is not None
        require(
            columns is None or "prompt" in columns or owned,
            f"{name} has no column `prompt`, only {columns}. Rename the column that holds the prompts.",
        )
        if given.get("rollout_func") is not None:
            continue
        check_prompts(name, sample.rows, may_lack_them=owned)
        seen = _seen_by_rewards(config, columns)
        for func in given["reward_funcs"]:
            if seen is not None and is_function(func):
                check_signature(func, config, [*seen, *(["environments"] if owned else [])], name)


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
