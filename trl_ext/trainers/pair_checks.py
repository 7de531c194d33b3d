"""
Checks of preference pairs, before a model is loaded.
"""

import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin

from ..errors import require, require_type, shown
from ..rollouts.prompt_forms import TEXT, fault_of, form_of
from .argument_checks import check_dataset_type, evaluation_sets
from .samples import sample_of
from .tokenizer_checks import check_chat_template, check_vocabulary


SIDES = ("chosen", "rejected")
IMAGES = {"image", "images"}
TEMPLATE_ARGUMENTS = "chat_template_kwargs"  # a column with arguments of the chat template for each row


def check_all_pairs(given: Mapping[str, Any]) -> list[Any]:
    """
    Raises an error for data sets of a trainer on pairs that it would stop at.

    Args:
        given (`Mapping[str, Any]`):
            Arguments of [`~trl.DPOTrainer`].

    Returns:
        `list`: some prompts of the training set, or what stands for them where the sides hold the prompt.

    Raises:
        TypeError: for data sets of a type that TRL can't use.
        ValueError: for rows that are no pairs.
    """
    train_dataset = given.get("train_dataset")
    require(train_dataset is not None, "train_dataset=None: pass a data set with the columns `chosen` and `rejected`.")
    own_collator = given.get("data_collator") is not None
    prompts = check_pairs("train_dataset", train_dataset, given.get("processing_class"), own_collator)
    for name, dataset in evaluation_sets(given.get("eval_dataset")).items():
        check_dataset_type(name, dataset)
        check_pairs(name, dataset, given.get("processing_class"), own_collator)
    return prompts


def check_pairs(name: str, dataset: Any, tokenizer: Any = None, own_collator: bool = False) -> list[Any]:
    """
    Raises `ValueError` for a data set that holds no pairs, or pairs that TRL's DPO can't read. Of a stream, one row is
    read.

    Args:
        name (`str`):
            The data set's name as an argument.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data set.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The tokenizer, if it is known.
        own_collator (`bool`, *optional*, defaults to `False`):
            Whether a collator of the user's reads the rows. TRL hands it pairs with images as they are.

    Returns:
        `list`: some prompts, or what stands for them.
    """
    sample = sample_of(name, dataset, ["prompt", *SIDES, TEMPLATE_ARGUMENTS], read_streams=True)
    columns = sample.columns or []
    has_images = bool(IMAGES & set(columns))
    if has_images and own_collator:
        return []
    needed = ("prompt", *SIDES) if has_images else SIDES
    missing = [column for column in needed if column not in columns]
    require(
        not missing,
        f"{name} has no column {missing and missing[0]!r}, only {columns or 'none'}. DPO takes pairs: `chosen` and "
        "`rejected`, as text or messages, and `prompt` unless both begin with it. Rename the columns that hold them.",
    )
    require(bool(sample.rows), f"{name} has no rows. Pass at least one pair.")
    require(
        not has_images or tokenizer is None or isinstance(tokenizer, ProcessorMixin),
        f"{name} has images, and processing_class is {shown(tokenizer)}, which reads only text. Pass a "
        "vision-language model and its processor (AutoProcessor), or remove the images.",
    )
    for number, row in enumerate(sample.rows):
        _check_pair(f"{name}: ", number, row, needed)
    first = sample.rows[0]
    prompts = [row["prompt"] if "prompt" in row else row["chosen"] for row in sample.rows]
    check_chat_template("processing_class", tokenizer, prompts)
    if tokenizer is not None and form_of(first["chosen"]) == TEXT:
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        require(
            inner.eos_token is not None,
            f"processing_class is {shown(inner)} without an end-of-sequence token, which ends each side of a pair of "
            "text. Set its eos_token.",
        )
    return prompts


def _check_pair(start: str, number: int, row: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    forms = {}
    for column in ("prompt", *SIDES):
        if column not in row and column not in needed:
            continue
        fault = fault_of(row[column], needs_content=False)
        require(fault is None, f"{start}`{column}` of row {number} {fault}")
        forms[column] = form_of(row[column])
    require(
        len(set(forms.values())) == 1,
        f"{start}row {number} has {' and '.join(f'{form} in `{column}`' for column, form in forms.items())}. Write "
        f"all of them as text, or all as messages: [{{'role': 'assistant', 'content': ...}}].",
    )
    require(
        "prompt" in row or all(row[side] for side in SIDES),
        f"{start}row {number} has an empty side and no `prompt`, which TRL would take from what both sides begin "
        "with. Add the column `prompt`, or drop the row.",
    )
    extra = row.get(TEMPLATE_ARGUMENTS, {})
    require_type(f"{start}`{TEMPLATE_ARGUMENTS}` of row {number}", extra, dict, "Write a dict, or drop the column.")


def check_loaded_pairs(trainer: Any, prompts: list[Any]) -> None:
    """
    Raises `ValueError` if nothing of a data set is left once it is tokenized, or if the tokenizer doesn't fit the
    model or the pairs.
    """
    check_chat_template("processing_class", trainer.processing_class, prompts)
    check_vocabulary("model", trainer.model, "processing_class", trainer.processing_class, prompts)
    left = {"train_dataset": trainer.train_dataset, **evaluation_sets(trainer.eval_dataset)}
    for name, dataset in left.items():
        require(
            not isinstance(dataset, Dataset) or len(dataset) > 0,
            f"max_length={trainer.args.max_length} leaves nothing of {name}: in every row the prompt alone is that "
            "long. Raise max_length, or set truncation_mode='keep_end'.",
        )


def check_weights(config: Any, curriculum: Any, dataset: Any) -> None:
    """Raises `ValueError` unless a data set is one that `weight_column` and `group_by_prompt` can be used on."""
    for name in ("weight_column", "group_by_prompt"):
        require(
            not getattr(config, name) or isinstance(dataset, Dataset),
            f"{name} needs the rows of train_dataset, which must be a datasets.Dataset, not {type(dataset).__name__}. "
            f"Load it without streaming, or leave {name} out.",
        )
    require(
        not config.group_by_prompt or curriculum is None,
        "curriculum and group_by_prompt both set the order of the rows. Leave one of them out.",
    )
    column = config.weight_column
    if column is None:
        return
    require(
        column in dataset.column_names,
        f"weight_column={column!r}, and train_dataset has {dataset.column_names}. Name a column of weights.",
    )
    numbers = [value for value in dataset[column] if isinstance(value, int | float) and 0 <= value < math.inf]
    require(
        len(numbers) == len(dataset) and any(numbers),
        f"weight_column={column!r} must hold a number of at least 0 in each row, and not 0 in all of them.",
    )
