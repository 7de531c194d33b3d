"""
What the user passes to [`PPOTrainer`]: models and data sets that are refused before a model is loaded, and the rest in
the form in which TRL's trainer takes it.
"""

from typing import Any

from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ..errors import require, require_type
from ..rewards.models import RewardModelOnIds
from ..roles.critic import CRITICS, ModelCritic
from ..rollouts.prompts import with_tokenized_prompts
from .argument_checks import check_dataset_type
from .arguments import model_name
from .ppo_config import PPOConfig
from .tokenizer_checks import vocabulary_of


def resolved_config(config: PPOConfig, value_model: Any) -> PPOConfig:
    """
    The configuration to train with: as in TRL 1.12, a `value_model` makes the critic a model. `config` isn't changed.

    Raises:
        ValueError: for settings that have no effect with a `value_model`.
    """
    if value_model is None:
        return config
    for name in sorted({name for kind in CRITICS.values() for name in kind.settings}):
        value = getattr(config, name)
        require(value is None, f"{name}={value!r} has no effect with a value_model. Leave one of them out.")
    return config.with_critic(ModelCritic.kind)


def check_models(config: PPOConfig, policy: Any, ref_model: Any, value_model: Any, reward_model: Any) -> None:
    """
    Raises `ValueError` for models that can't be trained together. Each is a model, a name or, but for the policy,
    `None`.

    Raises:
        TypeError: for what is no model and no name.
    """
    models = {"ref_model": ref_model, "value_model": value_model, "reward_model": reward_model}
    for name, model in models.items():
        if model is not None:
            require_type(name, model, str | nn.Module, "Pass a model, or its id or folder as text.")
    require(
        value_model is None or value_model is not reward_model or isinstance(value_model, str),
        "`reward_model` and `value_model` are the same object, so that the reward would be trained. Load it twice, or "
        "leave out value_model and set critic='model', critic_init='reward'.",
    )
    require(
        config.critic_init != "reward" or reward_model is not None,
        "critic_init='reward' needs a reward_model to copy. Pass one, or set critic_init='policy'.",
    )
    vocabulary = _vocabulary(policy, config.trust_remote_code)
    for other, name in ((value_model, "value_model"), (ref_model, "ref_model")):
        size = None if other is None else _vocabulary(other, config.trust_remote_code)
        require(
            size is None or vocabulary is None or size == vocabulary,
            f"The policy has a vocabulary of {vocabulary} tokens, {name} one of {size}: they can't read the same "
            "token ids. Use a model with the policy's tokenizer.",
        )
    outputs = getattr(getattr(value_model, "config", None), "num_labels", 1)
    require(outputs == 1, f"value_model has {outputs} outputs. Load it with num_labels=1: a value is one number.")


def _vocabulary(model: Any, trust_remote_code: bool) -> int | None:
    """Size of the vocabulary of a model or of the model by that name; `None` if it can't be known before loading."""
    if not isinstance(model, str):
        return vocabulary_of(model)
    try:
        config: Any = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # whoever loads it will say so
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def check_ptx(config: PPOConfig, dataset: Any) -> None:
    """Raises `ValueError` unless there is text exactly if the language-modelling term has a weight."""
    require(
        (config.ptx_coef > 0) == (dataset is not None),
        f"ptx_coef={config.ptx_coef} {'without a' if dataset is None else 'with a'} ptx_dataset: the "
        "language-modelling term needs both. Set both, or neither.",
    )
    check_dataset_type("ptx_dataset", dataset)
    if isinstance(dataset, Dataset):
        columns = set(dataset.column_names)
        require(
            any(needed <= columns for needed in ({"text"}, {"input_ids"}, {"messages"}, {"prompt", "completion"})),
            f"ptx_dataset has only the columns {sorted(columns)}. It needs `text`, `input_ids`, `messages`, or "
            "`prompt` and `completion`.",
        )
        require(len(dataset) > 0, "ptx_dataset is empty.")


def tokenizer_of(given: dict[str, Any]) -> Any:
    """The policy's tokenizer; if the user passed none, it is loaded and added to the arguments of the trainer."""
    if given.get("processing_class") is None:
        policy = given["model"]
        given["processing_class"] = AutoTokenizer.from_pretrained(
            policy if isinstance(policy, str) else policy.config.name_or_path,
            trust_remote_code=given["args"].trust_remote_code,
        )
    processor = given["processing_class"]
    return getattr(processor, "tokenizer", processor)


def take_over_token_ids(given: dict[str, Any]) -> bool:
    """
    Give data sets of `input_ids`, as TRL 1.12's trainer took them, a column `prompt`.

    Args:
        given (`dict[str, Any]`):
            Arguments of the trainer; `train_dataset` and `eval_dataset` are replaced in it.

    Returns:
        `bool`: whether the training set is one of `input_ids`.

    Raises:
        ValueError: if only one of two data sets is.
    """
    tokenized: list[str] = []
    for name in ("train_dataset", "eval_dataset"):
        dataset = given.get(name)
        if not isinstance(dataset, Dataset) or "prompt" in dataset.column_names:
            continue
        if "input_ids" not in dataset.column_names:
            continue
        given[name] = with_tokenized_prompts(dataset, tokenizer_of(given).decode)
        tokenized.append(name)
    require(
        len(tokenized) != 1 or given.get("eval_dataset") is None,
        f"{tokenized} has `input_ids`, and the other data set has not. Bring both as ids, or both as `prompt`.",
    )
    return "train_dataset" in tokenized


def add_reward_model(given: dict[str, Any], model: PreTrainedModel | str, on_ids: bool) -> RewardModelOnIds | None:
    """
    Add a reward model to the reward functions of a trainer.

    Args:
        given (`dict[str, Any]`):
            Arguments of the trainer; `reward_funcs` and `reward_processing_classes` are replaced in it.
        model ([`~transformers.PreTrainedModel`] or `str`):
            A sequence classification model with one output.
        on_ids (`bool`):
            Whether it reads the token ids of the policy instead of text.

    Returns:
        [`~trl_ext.rewards.models.RewardModelOnIds`] or `None`: the reward function, if it reads ids.
    """
    funcs = given.get("reward_funcs")
    funcs = [] if funcs is None else list(funcs) if isinstance(funcs, list) else [funcs]
    classes = given.get("reward_processing_classes")
    classes = classes if isinstance(classes, list) else [classes] * len(funcs)
    tokenizer, reader = tokenizer_of(given), None
    if on_ids:
        if isinstance(model, str):
            model = AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=1, trust_remote_code=given["args"].trust_remote_code
            )
        size = vocabulary_of(model)
        ids = vocabulary_of(given["model"]) or len(tokenizer)  # a policy writes no others
        require(
            size is None or size >= ids,
            f"reward_model has {size} embeddings and would read the policy's token ids, of which there are {ids}. Use "
            "one with the policy's tokenizer, or pass prompts as text, in a column `prompt`.",
        )
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        reader = RewardModelOnIds(model, model_name(model), pad, given["args"].per_device_train_batch_size)
    given["reward_funcs"] = [*funcs, reader or model]
    given["reward_processing_classes"] = [*classes, None if isinstance(model, str) else tokenizer]
    return reader
