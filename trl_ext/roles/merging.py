"""
Saved models in one piece: an adapter merged into its base, parts of several processes put together.

Merging adds an adapter's update to the weights in the type in which they are written. What this costs is measured
([`lost_to_rounding`]) and said. An adapter that was trained on a 4-bit base has learned to make up for the rounding of
that base, so that it is merged into the rounded weights, which are written in the type that is asked for; merged into
weights of full precision (`full_precision`), the model is not quite the one that was trained.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import create_model_from_path

from ..errors import require, require_one_of, require_type
from .quantized import QUANTIZATION_FILE, loading_of_quantized
from .saved import ADAPTER, ADAPTER_CONFIG, MODEL_CONFIG, SHARDED, consolidated_weights, form_of, load_weights
from .trunk import load_adapter


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ExportSettings:
    """
    How a role is exported.

    Args:
        merge (`bool`, *optional*, defaults to `False`):
            Whether the role's adapter is merged into its base. If not, an adapter stays an adapter.
        base (`str`, *optional*):
            Folder or Hub id of the base model, in place of the one that the adapter names.
        dtype (`str`, *optional*):
            Type of the weights, one of `"float32"`, `"bfloat16"` and `"float16"`. By default what is kept as it is
            keeps its type, and what is merged has the type of the base's files.
        full_precision (`bool`, *optional*, defaults to `False`):
            Whether an adapter that was trained on a quantized base is merged into the base's files as they are, and
            not into the quantized weights that it was trained on.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether models may run code of their own.
    """

    merge: bool = False
    base: str | None = None
    dtype: str | None = None
    full_precision: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_one_of("dtype", self.dtype, (None, *DTYPES))
        if self.base is not None:
            require_type("base", self.base, str, "Pass the folder or the Hub id of a model.")


@dataclass
class WholeModel:
    """
    A model in one piece.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        form (`str`):
            How it came about, such as `"merged into Qwen/Qwen2.5-0.5B"`.
        base (`str`, *optional*):
            Folder or Hub id of the model that it was made from.
        notes (`list[str]`):
            What a reader has to know, a sentence each.
    """

    model: Any
    form: str
    base: str | None = None
    notes: list[str] = field(default_factory=list)


def _loading(settings: ExportSettings) -> dict[str, Any]:
    return {
        "dtype": settings.dtype or "auto",
        "trust_remote_code": settings.trust_remote_code,
        "device_map": None,
    }


def whole_model(
    folder: Path,
    settings: ExportSettings,
    architecture: Any = None,
    loading: dict[str, Any] | None = None,
    run: Path | None = None,
) -> WholeModel:
    """
    The model of a folder in one piece, its adapter merged.

    Args:
        folder (`Path`):
            A folder with a model in any of the forms of [`form_of`].
        settings ([`ExportSettings`]):
            How it is exported.
        architecture (`type`, *optional*):
            The class of the model; that of its configuration by default.
        loading (`dict`, *optional*):
            Further arguments of `from_pretrained`.
        run (`Path`, *optional*):
            Where the run says how its base was quantized, for an adapter in a folder of its own.

    Raises:
        ValueError: if there is nothing to merge, or the base can't be loaded or is of another shape.
    """
    form = form_of(folder)
    if form == ADAPTER:
        return _merged(folder, settings, architecture, loading or {}, run or folder)
    require(
        not settings.merge,
        f"There is nothing to merge in '{folder}': the run trained without an adapter, and its weights are whole "
        "already. Leave merge out.",
    )
    require(
        settings.base is None or form == SHARDED,
        f"base is {settings.base!r}, but '{folder}' has whole weights, which need no base. Leave it out.",
    )
    if form == SHARDED:
        return _from_parts(folder, settings)
    model = create_model_from_path(str(folder), architecture, **_loading(settings))
    return WholeModel(model, "whole")


def _from_parts(folder: Path, settings: ExportSettings) -> WholeModel:
    """A policy whose weights processes wrote in parts. FSDP writes no configuration with them: the base's is taken."""
    source = str(folder) if (folder / MODEL_CONFIG).is_file() else settings.base
    require(
        source is not None,
        f"The weights in {folder} are in parts, one a process, and FSDP has written no configuration with them. Pass "
        "as base the model that the run began with, or resume the run with fsdp_state_dict_type: FULL_STATE_DICT, "
        "which writes whole files with the next checkpoint.",
    )
    assert source is not None
    config = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    model = model_with(config, consolidated_weights(folder), f"The checkpoint {folder}")
    model.to(dtype_of(settings.dtype or config.dtype))
    return WholeModel(model, "whole, put together from the parts of its processes", source)


def model_with(config: Any, weights: dict[str, torch.Tensor], where: str) -> Any:
    """The model of a configuration with given weights, in float32. `where` names the weights, for error messages."""
    known = getattr(transformers, (config.architectures or [""])[0], None)
    model = AutoModelForCausalLM.from_config(config) if known is None else known(config)
    model.float()
    load_weights(model, weights, where)
    return model


def dtype_name(model: Any) -> str:
    """The name of the type of a model's weights."""
    return str(model.dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    """A type that is given by name, or as it is; float32 for `None`."""
    found = getattr(torch, name) if isinstance(name, str) else name
    return found if isinstance(found, torch.dtype) else torch.float32


def _merged(
    folder: Path, settings: ExportSettings, architecture: Any, loading: dict[str, Any], run: Path
) -> WholeModel:
    """The base of an adapter, with the adapter merged into it."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    kind = getattr(config.peft_type, "value", config.peft_type)
    cannot = f"The adapter in {folder} is of the type {kind}, which can't be merged into weights. Leave merge out."
    require(not config.is_prompt_learning, cannot)
    base, name, notes = _base_of(folder, config, settings, architecture, loading, run)
    model = with_adapter(base, folder, name)
    require(hasattr(model, "merge_and_unload"), cannot)
    lost = lost_to_rounding(model)
    if lost > 0:
        notes.append(
            f"Rounding to {dtype_name(base)} changes the adapter's update by {lost:.1%} (norm of the error / norm of "
            "the update). float32 keeps all of it."
        )
    tied = _untie(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged: Any = model.merge_and_unload(safe_merge=True)
    merged.to(base.dtype)  # modules that were saved whole come in the adapter's type
    if tied:
        _tie_if_equal(merged)
    return WholeModel(merged, f"merged into {name}", name, notes)


def _base_of(
    folder: Path, config: Any, settings: ExportSettings, architecture: Any, loading: dict[str, Any], run: Path
) -> tuple[Any, str, list[str]]:
    """The base model of an adapter, not quantized, its name, and what there is to say about it."""
    name = settings.base or config.base_model_name_or_path
    remedy = "Pass the folder or the Hub id of the model that the adapter was trained on as base."
    require(bool(name), f"The adapter in {folder} doesn't say on which base it was trained. {remedy}")
    require(
        not (Path(name) / ADAPTER_CONFIG).is_file(),
        f"The base {name!r} of the adapter in {folder} is an adapter itself. Merge that one first, and pass the "
        "merged model as base.",
    )
    quantized = {} if settings.full_precision else loading_of_quantized(run)
    revision = {} if settings.base or config.revision is None else {"revision": config.revision}
    arguments = {**_loading(settings), **revision, **loading, **quantized}
    try:
        with _quiet_loading() if loading else nullcontext():
            base = create_model_from_path(name, architecture, **arguments)
    except OSError as error:
        raise ValueError(
            f"The base {name!r} of the adapter in {folder} can't be loaded: {str(error).splitlines()[0]} {remedy}"
        ) from error
    notes = []
    if getattr(base, "is_quantized", False):
        method = base.config.quantization_config
        bits = next((n for n in ("load_in_4bit", "load_in_8bit") if getattr(method, n, False)), "quantized")
        dtype = dtype_of(settings.dtype or base.dtype)
        base = base.dequantize(dtype=dtype).to(dtype)
        notes.append(
            f"The adapter was trained on a quantized base ({bits}). It is merged into the quantized weights, written "
            f"in {dtype_name(base)}: the model that was trained, to rounding. Quantizing it again is not exact."
        )
    elif (run / QUANTIZATION_FILE).is_file():
        notes.append(
            "The adapter was trained on a quantized base, and is merged into weights of full precision: not quite the "
            "model that was trained."
        )
    return base, str(name), notes


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Within this context, transformers doesn't report that a base has no head, which comes with the adapter."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def with_adapter(base: Any, folder: Path, name: str) -> PeftModel:
    """
    A base model with the adapter of a folder.

    Raises:
        ValueError: if the adapter was trained on a base of another shape, or lacks weights.
    """
    try:
        model: PeftModel = PeftModel.from_pretrained(base, str(folder))
        load_adapter(model, folder)  # PEFT only warns of weights that are missing
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"The adapter in {folder} doesn't fit the base {name!r}, which is of another shape: {' '.join(lines[:2])} "
            "Pass the model that the adapter was trained on as base."
        ) from error
    return model


@torch.no_grad()
def lost_to_rounding(model: PeftModel) -> float:
    """
    The share of an adapter's update that is lost where it is added to weights of few bits: the norm of the error over
    the norm of the update. Of plain LoRA; 0 for adapters whose update can't be read by itself, and in float32.
    """
    error = update = 0.0
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or any(layer.use_dora.values()):
            continue
        weights: Any = layer.get_base_layer().weight
        adapters = [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]
        if weights.dtype == torch.float32:
            continue
        for name in adapters:
            delta = layer.get_delta_weight(name).float()  # type: ignore[operator]
            after = (weights + delta.to(weights.dtype)).float()
            error += (after - weights.float() - delta).square().sum().item()
            update += delta.square().sum().item()
    return (error / update) ** 0.5 if update else 0.0


def _plain(module: Any) -> Any:
    """The module of the base model behind an adapter's layer."""
    for name in ("original_module", "base_layer"):
        if isinstance(getattr(module, name, None), nn.Module):
            return _plain(getattr(module, name))
    return module


def _untie(model: PeftModel) -> bool:
    """Give tied embeddings a weight each: an adapter of one would change both. Returns whether they were tied."""
    base: Any = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if None in ends or _plain(ends[0]).weight is not _plain(ends[1]).weight:
        return False
    head = _plain(ends[1])
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def _tie_if_equal(model: Any) -> None:
    """The reverse of [`_untie`], unless the two have become different: then they are saved as two."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(words.weight, head.weight)
    if equal:
        head.weight = words.weight
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = equal
