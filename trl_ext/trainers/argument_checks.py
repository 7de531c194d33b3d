"""
Arguments that every trainer takes, TRL's or ours. What is wrong with them is said before a model is loaded, where TRL
would fail later, or in a place that doesn't name the argument.
"""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from trl.trainer.utils import get_config_model_id

from ..errors import require, require_type, shown
from .tokenizer_checks import check_tokenizer


def check_arguments(given: Mapping[str, Any]) -> None:
    """
    Raises an error for arguments of a trainer that can't be used.

    Args:
        given (`Mapping[str, Any]`):
            The arguments by TRL's names; its configuration is under `args`.

    Raises:
        TypeError: for an argument of a type that TRL can't use.
        ValueError: for arguments that contradict each other.
    """
    _check_processing_class(given["model"], given.get("processing_class"))
    _check_adapter(given.get("model"), given.get("peft_config"))
    _check_callbacks(given.get("callbacks"))
    _check_optimizers(given.get("optimizers"))
    check_dataset_type("train_dataset", given.get("train_dataset"))
    _check_lengths(given["args"], given.get("train_dataset"), given.get("eval_dataset"))


def check_policy(model: Any) -> None:
    """Whether a model is a name, or a language model that can be trained as a policy."""
    if isinstance(model, str):
        return
    is_model = isinstance(model, nn.Module) and hasattr(model, "config")
    if not is_model:
        raise TypeError(
            f"model is {shown(model)}. Pass a model's id or folder, or a loaded AutoModelForCausalLM or PeftModel."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    require(
        hasattr(base, "generation_config"),
        f"model is {shown(base)}, which can't write text. Pass a causal language model (AutoModelForCausalLM).",
    )


def _check_processing_class(model: Any, processing_class: Any) -> None:
    check_tokenizer("processing_class", processing_class)
    require(
        processing_class is not None or isinstance(model, str) or bool(get_config_model_id(model.config)),
        f"processing_class=None, and the model, {shown(model)}, was not loaded by a name that a tokenizer could be "
        "loaded by. Pass its tokenizer.",
    )


def _check_adapter(model: Any, peft_config: Any) -> None:
    if peft_config is None:
        return
    require_type("peft_config", peft_config, PeftConfig, "Pass a configuration such as peft.LoraConfig(r=16).")
    require(
        not isinstance(model, PeftModel),
        "`peft_config` was passed with a model that already has an adapter. Leave peft_config out to train that "
        "adapter, or pass the model without it.",
    )


def _check_callbacks(callbacks: Any) -> None:
    if callbacks is None:
        return
    require_type("callbacks", callbacks, list, "Pass a list of callbacks, also for a single one.")
    for callback in callbacks:
        known = isinstance(callback, type) and issubclass(callback, TrainerCallback)
        if not known and not hasattr(callback, "on_train_begin"):
            raise TypeError(f"callbacks has {shown(callback)}. Pass objects that derive from TrainerCallback.")


def _check_optimizers(optimizers: Any) -> None:
    if optimizers is None:
        return
    remedy = "Pass a pair of an optimizer and a schedule, of which either may be None: (optimizer, None)."
    require_type("optimizers", optimizers, tuple | list, remedy)
    require(len(optimizers) == 2, f"optimizers has {len(optimizers)} elements. {remedy}")


def check_dataset_type(name: str, dataset: Any) -> None:
    """Whether a data set is one of `datasets`; `None` stands for no data set."""
    if dataset is None or isinstance(dataset, Dataset | IterableDataset):
        return
    if isinstance(dataset, dict) and dataset and all(map(_is_dataset, dataset.values())):
        raise TypeError(
            f"{name} is a {type(dataset).__name__} of the data sets {list(dataset)}. Pass one of them, as in "
            f"{name}=data[{next(iter(dataset))!r}]."
        )
    remedy = "Pass a datasets.Dataset or datasets.IterableDataset"
    if isinstance(dataset, str):
        remedy += ", such as load_dataset(..., split='train')"
    elif isinstance(dataset, list | tuple):
        remedy += ", such as Dataset.from_list(rows)"
    raise TypeError(f"{name} is {shown(dataset)}. {remedy}.")


def _is_dataset(value: Any) -> bool:
    return isinstance(value, Dataset | IterableDataset)


def evaluation_sets(eval_dataset: Any) -> dict[str, Any]:
    """The data sets for evaluation by their names in messages: one, or those of a dict."""
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def _check_lengths(args: Any, train_dataset: Any, eval_dataset: Any) -> None:
    require(
        args.eval_strategy == "no" or eval_dataset is not None,
        f"eval_strategy={str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r} needs an eval_dataset. Pass "
        "one, or set eval_strategy='no'.",
    )
    require(
        train_dataset is None or has_length(train_dataset) or args.max_steps > 0,
        f"max_steps={args.max_steps} with a streamed train_dataset, whose length isn't known. Set max_steps to the "
        "number of optimizer steps.",
    )
