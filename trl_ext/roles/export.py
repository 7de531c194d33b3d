"""
A role of a run as files that plain `transformers` and `peft` load: the policy, the critic, the reward model or the
reference, merged into weights of its own or kept apart as an adapter.

[`EXPORTS`] has a function for each role. It writes into a folder aside, which is moved to its place when all is
written: an export is whole or not there.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import TaskType, load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.trainer_utils import align_special_tokens

from ..errors import require, require_one_of
from .adapter_critic import ADAPTER_FOLDER
from .critic import CONFIG_FILE, CRITIC, WEIGHTS_FILE
from .merging import ExportSettings, WholeModel, dtype_name, dtype_of, model_with, whole_model
from .quantized import QUANTIZATION_FILE
from .reward_adapter import HEADS
from .saved import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    CRITIC_ROLE,
    MODEL_CONFIG,
    POLICY,
    REFERENCE,
    REFERENCE_FILE,
    REWARD,
    SHARDED,
    form_of,
    load_weights,
    read_json,
    read_plain,
    roles_of,
)
from .trunk import REFERENCE_ADAPTER


# Files of tokenizers and processors: they are copied, not read and written anew
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*processor_config.json",
)
TEMPLATES = "additional_chat_templates"
EVERY_STATE = "logits[:, t, 0] is the value of the state after token t."


@dataclass
class Export:
    """
    What was exported.

    Args:
        form (`str`):
            What it is, such as `"the policy, merged into Qwen/Qwen2.5-0.5B, in bfloat16"`.
        load (`str`):
            The Python that loads it.
        notes (`list[str]`):
            What a reader has to know, a sentence each.
        folder (`Path`, *optional*):
            Where it is.
    """

    form: str
    load: str
    notes: list[str] = field(default_factory=list)
    folder: Path = Path()


def export_folder(
    source: Path, output: Path, role: str = POLICY, settings: ExportSettings | None = None, overwrite: bool = False
) -> Export:
    """
    Write one role of a saved model as files that plain `transformers` and `peft` load.

    Args:
        source (`Path`):
            The folder of a run or of a checkpoint.
        output (`Path`):
            The new folder.
        role (`str`, *optional*, defaults to `"policy"`):
            `"policy"`, `"critic"`, `"reward"` or `"reference"`.
        settings ([`ExportSettings`], *optional*):
            How it is exported.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether `output` is replaced if it has files in it.

    Returns:
        [`Export`]: what it is, and how it is loaded.

    Raises:
        ValueError: if the folder has no such role, there is nothing to merge, or the base can't be loaded or is of
            another shape.
        FileExistsError: if `output` isn't empty and is not to be replaced.
    """
    require_one_of("role", role, EXPORTS)
    settings = settings or ExportSettings()
    _require_role(source, role)
    full = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if full and not (overwrite and output.is_dir()):
        raise FileExistsError(f"output is '{output}', which is not empty. Choose a new folder, or pass overwrite.")
    require(
        not source.resolve().is_relative_to(output.resolve()),
        f"output is '{output}', which holds what is exported. Choose another folder.",
    )
    aside = output.with_name(f"_{output.name}_in_the_making")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        export = EXPORTS[role](source, aside, settings)
        for path in aside.rglob("*"):
            _flush(path)
        _put(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    export.folder = output
    export.load = export.load.replace("{folder}", str(output))
    return export


def _flush(path: Path) -> None:
    """Have a file that was written on the disk."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _put(aside: Path, output: Path) -> None:
    """Move a folder to its place. One that is there is replaced as a whole."""
    replaced = output.with_name(f"_{output.name}_replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        output.rename(replaced)
    aside.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def _require_role(source: Path, role: str) -> None:
    """Raises `ValueError` if a folder doesn't have a role; the message says where such a role would be."""
    found = roles_of(source)
    require(
        bool(found),
        f"Nothing is saved in '{source}': no weights of a model, and no adapter. Pass the output folder of a run that "
        "has saved, or one of its checkpoints.",
    )
    if role in found:
        return
    require(
        form_of(source) != SHARDED,
        f"'{source}' has no {role} that can be exported: of weights that processes wrote in parts only the policy's "
        "are put together. Resume the run with stage3_gather_16bit_weights_on_model_save (DeepSpeed) or "
        "FULL_STATE_DICT (FSDP), with which the next checkpoint is whole.",
    )
    base = read_json(source / ADAPTER_CONFIG).get("base_model_name_or_path") if form_of(source) == ADAPTER else None
    start = f"the base {base!r} without the adapter" if base else "the model that the run began with"
    where = {
        POLICY: "It is a reward model: export that role.",
        CRITIC_ROLE: "Only PPO trains a critic.",
        REWARD: "A reward model is saved by the run that trained it (recipes/reward.py): export that run.",
        REFERENCE: f"Its reference is {start}, or a model that was passed in: neither changes, and neither is saved.",
    }
    require(False, f"'{source}' has no {role}. It has: {', '.join(found)}. {where[role]}")


# Files


def _copy_tokenizer(source: Path, target: Path, base: str | None = None) -> None:
    """Copies tokenizer, chat templates and processor of a run, or of its base where the run has saved none."""
    found = [file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()]
    if not found and base is not None and Path(base).is_dir() and Path(base) != source:
        _copy_tokenizer(Path(base), target)
    elif not found and base is not None and Path(base) != source:
        AutoTokenizer.from_pretrained(base).save_pretrained(target)
    for file in found:
        shutil.copy2(file, target)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)


def _copy_adapter(folder: Path, target: Path, settings: ExportSettings) -> str:
    """Copies an adapter as PEFT saved it, and returns the name of its base."""
    config = read_json(folder / ADAPTER_CONFIG)
    if settings.base is not None:
        config["base_model_name_or_path"] = settings.base
    (target / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if settings.dtype is None and (folder / ADAPTER_FILES[0]).is_file():
        shutil.copy2(folder / ADAPTER_FILES[0], target)
    else:
        weights = load_peft_weights(str(folder), device="cpu")
        cast = {name: weight.to(dtype_of(settings.dtype or weight.dtype)) for name, weight in weights.items()}
        save_file(cast, target / ADAPTER_FILES[0], metadata={"format": "pt"})
    return str(config.get("base_model_name_or_path"))


# Roles


# The classes that load what is written
CAUSAL = "AutoModelForCausalLM"
SEQUENCE = "AutoModelForSequenceClassification"
TOKEN = "AutoModelForTokenClassification"


def _save_whole(whole: WholeModel, source: Path, target: Path, name: str, loader: str) -> Export:
    """Writes a model with the tokenizer of its run, whose special tokens it takes over, as in training."""
    _copy_tokenizer(source, target, whole.base)
    if (target / "tokenizer_config.json").is_file():
        align_special_tokens(whole.model, AutoTokenizer.from_pretrained(target))
    whole.model.save_pretrained(target)
    form = f"the {name}, {whole.form}, in {dtype_name(whole.model)}"
    return Export(form, f"{loader}.from_pretrained('{{folder}}')", whole.notes)


def _save_apart(
    folder: Path, source: Path, target: Path, settings: ExportSettings, name: str, loader: str, labels: str = ""
) -> Export:
    """Writes the adapter of a folder as it is, with the tokenizer of its run."""
    base = _copy_adapter(folder, target, settings)
    _copy_tokenizer(source, target)
    export = Export(
        f"the {name}, an adapter on {base}",
        f"PeftModel.from_pretrained({loader}.from_pretrained({base!r}{labels}), '{{folder}}')",
    )
    if (source / QUANTIZATION_FILE).is_file():
        shutil.copy2(source / QUANTIZATION_FILE, target)
        export.notes.append(
            f"The adapter was trained on a quantized base. Loaded with the arguments in {QUANTIZATION_FILE}, the base "
            "has the weights that it had in training."
        )
    return export


def _policy(source: Path, target: Path, settings: ExportSettings) -> Export:
    if form_of(source) == ADAPTER and not settings.merge:
        return _save_apart(source, source, target, settings, POLICY, CAUSAL)
    return _save_whole(whole_model(source, settings), source, target, POLICY, CAUSAL)


def _reward(source: Path, target: Path, settings: ExportSettings) -> Export:
    name, loading = "reward model", {}
    if form_of(source) == ADAPTER:
        weights = load_peft_weights(str(source), device="cpu")
        heads = [weight for key, weight in weights.items() if set(HEADS) & set(key.split(".")) and weight.dim() == 2]
        require(
            bool(heads),
            f"The adapter in {source} has no head, and scores nothing. Train it with lora_task_type: SEQ_CLS, which "
            "saves the head with the adapter.",
        )
        loading = {"num_labels": heads[0].size(0)}
        if not settings.merge:
            labels = f", num_labels={loading['num_labels']}"
            return _save_apart(source, source, target, settings, name, SEQUENCE, labels)
    whole = whole_model(source, settings, AutoModelForSequenceClassification, loading)
    return _save_whole(whole, source, target, name, SEQUENCE)


def _reference(source: Path, target: Path, settings: ExportSettings) -> Export:
    folder = source / REFERENCE_ADAPTER
    if form_of(folder) == ADAPTER:
        if not settings.merge:
            return _save_apart(folder, source, target, settings, REFERENCE, CAUSAL)
        return _save_whole(whole_model(folder, settings, run=source), source, target, REFERENCE, CAUSAL)
    require(not settings.merge, f"There is nothing to merge: the reference in {source} is whole. Leave merge out.")
    base = str(source) if (source / MODEL_CONFIG).is_file() else settings.base
    require(
        base is not None,
        f"The reference in {source} has weights of its own, and no configuration. Pass as base the model that the run "
        "began with.",
    )
    assert base is not None
    weights = read_plain(source / REFERENCE_FILE)
    config = AutoConfig.from_pretrained(base, trust_remote_code=settings.trust_remote_code)
    model = model_with(config, weights, f"The reference in {source}")
    model.to(dtype_of(settings.dtype or next(iter(weights.values())).dtype))
    return _save_whole(WholeModel(model, "whole", base), source, target, REFERENCE, CAUSAL)


def _critic(source: Path, target: Path, settings: ExportSettings) -> Export:
    description = read_json(source / CRITIC / CONFIG_FILE)
    kind = description["critic"]
    if kind == "model":
        return _model_critic(source, target, settings, description)
    # The trunk that the head reads: the policy's, or the policy's base with an adapter of the critic's own
    own = source / CRITIC / ADAPTER_FOLDER
    trunk, name = (own, "critic") if form_of(own) == ADAPTER else (source, "critic (a head on the policy's trunk)")
    adapted = form_of(trunk) == ADAPTER
    linear = description.get("head") == "linear"
    if linear and adapted and not settings.merge and _has_token_classifier(trunk, settings):
        return _head_apart(trunk, source, target, settings, name)
    if linear and (settings.merge or not adapted):
        whole = whole_model(trunk, settings, run=source)
        classifier = _token_classifier(whole.model, source)
        if classifier is not None:
            whole.model = classifier
            whole.notes.append(EVERY_STATE)
            if classifier.dtype != torch.float32:
                whole.notes.append(f"In training the head computes in float32, here in {dtype_name(classifier)}.")
            return _save_whole(whole, source, target, name, TOKEN)
    require(
        trunk == source or not settings.merge,
        f"The critic in {source} is an adapter with a head that transformers has no class for. Leave merge out: "
        "load_critic puts it on the policy with its adapter.",
    )
    export = _policy(source, target, settings)
    shutil.copytree(source / CRITIC, target / CRITIC)
    export.form = f"the critic ({kind}), beside {export.form}"
    export.notes.append(
        "transformers has no class for this form of a critic: load_critic of trl_ext puts it on the policy, and "
        "logps_and_values of trl_ext.roles.critic reads it."
    )
    export.load = f"load_critic('{{folder}}/{CRITIC}', {export.load})"
    return export


def _has_token_classifier(adapter: Path, settings: ExportSettings) -> bool:
    """Whether an adapter leaves the language model's head alone, and transformers classifies tokens with its base."""
    weights = load_peft_weights(str(adapter), device="cpu")
    base = settings.base or read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    try:
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError):
        return False
    empty = _empty_classifier(config)
    return empty is not None and all(
        name.startswith(f"base_model.model.{empty[0].base_model_prefix}.") for name in weights
    )


def _head_apart(trunk: Path, source: Path, target: Path, settings: ExportSettings, name: str) -> Export:
    """Writes an adapter and a linear head as PEFT has them: the head is a module that is saved whole."""
    export = _save_apart(trunk, source, target, settings, name, TOKEN, ", num_labels=1")
    config = read_json(target / ADAPTER_CONFIG)
    base = AutoConfig.from_pretrained(config["base_model_name_or_path"], trust_remote_code=settings.trust_remote_code)
    empty = _empty_classifier(base)
    assert empty is not None
    head = empty[1]
    config |= {"task_type": TaskType.TOKEN_CLS.value, "modules_to_save": [*(config["modules_to_save"] or []), head]}
    (target / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = {key: weight.clone() for key, weight in load_file(target / ADAPTER_FILES[0]).items()}
    for key, weight in load_file(source / CRITIC / WEIGHTS_FILE).items():
        weights[f"base_model.model.{head}.{key.rpartition('.')[2]}"] = weight
    save_file(weights, target / ADAPTER_FILES[0], metadata={"format": "pt"})
    export.notes.append(EVERY_STATE)
    return export


def _empty_classifier(config: Any) -> tuple[Any, str] | None:
    """
    A token classifier with one output, without memory for its weights, and the name of its head; `None` if
    transformers has no such class for a configuration.
    """
    config = copy.deepcopy(config)
    config.num_labels, config.classifier_dropout, config.tie_word_embeddings = 1, 0.0, False
    try:
        with torch.device("meta"):
            model: Any = AutoModelForTokenClassification.from_config(config)
    except ValueError:
        return None
    name = next((name for name in HEADS if isinstance(getattr(model, name, None), nn.Linear)), None)
    return None if name is None else (model, name)


def _token_classifier(policy: Any, source: Path) -> Any:
    """A linear head on a policy's backbone as a token classifier with one output; `None` if there is no such class."""
    empty = _empty_classifier(policy.config)
    if empty is None or empty[0].base_model_prefix != policy.base_model_prefix:
        return None
    model, name = empty
    weights = load_file(source / CRITIC / WEIGHTS_FILE)
    head = nn.Linear(policy.config.get_text_config().hidden_size, 1, dtype=policy.dtype)
    with torch.no_grad():
        head.weight.copy_(weights["head.out.weight"])
        head.bias.copy_(weights["head.out.bias"])
    setattr(model, model.base_model_prefix, policy.base_model)
    setattr(model, name, head)
    return model


def _model_critic(source: Path, target: Path, settings: ExportSettings, description: dict[str, Any]) -> Export:
    require(
        not settings.merge,
        f"There is nothing to merge: the critic in {source} is a model with weights of its own. Leave merge out.",
    )
    weights = load_file(source / CRITIC / WEIGHTS_FILE)
    model: Any = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**description["config"]))
    own = {name.replace("backbone.", f"{model.base_model_prefix}.", 1): weight for name, weight in weights.items()}
    load_weights(model, own, f"The critic in {source}")
    model.to(dtype_of(settings.dtype or next(iter(weights.values())).dtype))
    note = (
        f"{TOKEN}.from_pretrained(..., num_labels=1) gives the value of every state: its bias, which the file doesn't "
        "have, starts at zero."
    )
    return _save_whole(WholeModel(model, "a model of its own", notes=[note]), source, target, CRITIC_ROLE, SEQUENCE)


# Every role that can be exported, and the function that writes it into a folder
EXPORTS: dict[str, Callable[[Path, Path, ExportSettings], Export]] = {
    POLICY: _policy,
    CRITIC_ROLE: _critic,
    REWARD: _reward,
    REFERENCE: _reference,
}
