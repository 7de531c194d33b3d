"""
What the folder of a run, or one of its checkpoints, holds: which roles, and in which form their weights are.

- whole: weights in the files of `transformers`;
- adapter: PEFT's files, which need a base model;
- sharded: each process wrote its part (DeepSpeed ZeRO without `stage3_gather_16bit_weights_on_model_save`, FSDP with
  `SHARDED_STATE_DICT`). [`consolidated_weights`] puts the parts together by means of DeepSpeed and Accelerate.
"""

import io
import json
import os
import pickle
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import peft.utils
import torch
import transformers.utils
from safetensors.torch import load_file
from torch import nn

from ..errors import require
from .critic import CONFIG_FILE, CRITIC
from .trunk import REFERENCE_ADAPTER


# Weights of a reference that moves during training, beside those of a policy (`sync_ref_model`)
REFERENCE_FILE = "trl_ext_reference.pt"

MODEL_CONFIG = transformers.utils.CONFIG_NAME
ADAPTER_CONFIG = peft.utils.CONFIG_NAME
ADAPTER_FILES = (peft.utils.SAFETENSORS_WEIGHTS_NAME, peft.utils.WEIGHTS_NAME)
MODEL_FILES = (
    transformers.utils.SAFE_WEIGHTS_NAME,
    transformers.utils.SAFE_WEIGHTS_INDEX_NAME,
    transformers.utils.WEIGHTS_NAME,
    transformers.utils.WEIGHTS_INDEX_NAME,
)
# Of DeepSpeed, and of Accelerate for FSDP
ZERO_SHARDS, FSDP_SHARDS = "latest", "pytorch_model_fsdp_0"

POLICY, CRITIC_ROLE, REWARD, REFERENCE = "policy", "critic", "reward", "reference"
WHOLE, ADAPTER, SHARDED = "whole", "adapter", "sharded"


def read_plain(file: str | os.PathLike[str], types: Sequence[Any] = ()) -> Any:
    """
    Read a file that `torch.save` wrote, without running code that somebody may have put into it.

    Args:
        file (`str` or `Path`):
            The file.
        types (`list`, *optional*):
            What it may hold beside tensors and plain values.

    Raises:
        ValueError: if it holds anything else, or is not complete.
    """
    # On the CPU first: torch takes no `cpu:0`, which is what the device of a process is called there
    try:
        with torch.serialization.safe_globals(list(types)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds something that trl_ext does not write. It is not loaded, because loading it could run code "
            f"({str(error).splitlines()[0]}). Resume from a different checkpoint, or start from this one's weights."
        ) from error


def form_of(folder: Path) -> str | None:
    """`"adapter"`, `"whole"` or `"sharded"`: the form in which a folder has a model; `None` if it has none."""
    if (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in ADAPTER_FILES):
        return ADAPTER
    if (folder / MODEL_CONFIG).is_file() and any((folder / name).is_file() for name in MODEL_FILES):
        return WHOLE
    if (folder / ZERO_SHARDS).is_file() or (folder / FSDP_SHARDS).is_dir():
        return SHARDED
    return None


def roles_of(folder: Path) -> list[str]:
    """The roles of which a folder has weights of their own: the policy or the reward model first."""
    form = form_of(folder)
    if form is None:
        return []
    roles = [REWARD if _scores(folder, form) else POLICY]
    if (folder / CRITIC / CONFIG_FILE).is_file():
        roles.append(CRITIC_ROLE)
    if form_of(folder / REFERENCE_ADAPTER) == ADAPTER or (folder / REFERENCE_FILE).is_file():
        roles.append(REFERENCE)
    return roles


def _scores(folder: Path, form: str) -> bool:
    """Whether the model of a folder is a reward model: one that scores sequences."""
    if form == ADAPTER:
        return read_json(folder / ADAPTER_CONFIG).get("task_type") == peft.TaskType.SEQ_CLS
    if not (folder / MODEL_CONFIG).is_file():
        return False
    names = read_json(folder / MODEL_CONFIG).get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file that is a mapping."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def consolidated_weights(folder: Path) -> dict[str, torch.Tensor]:
    """
    The weights of a policy that several processes wrote in parts, without those of a critic beside them.

    Args:
        folder (`Path`):
            A checkpoint of DeepSpeed ZeRO or of FSDP with `SHARDED_STATE_DICT`. DeepSpeed's parts are pickles, which
            are loaded as DeepSpeed does: only from a run that you trust.

    Raises:
        ValueError: if they are parts of an adapter, or what puts them together is not installed.
    """
    if (folder / ZERO_SHARDS).is_file():
        try:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        except ImportError as error:
            raise ValueError(
                f"The weights in {folder} are in parts, one a process, which DeepSpeed puts together. Install "
                "deepspeed where they are exported."
            ) from error
        with redirect_stdout(io.StringIO()):
            weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    else:
        from accelerate.utils import merge_fsdp_weights

        with tempfile.TemporaryDirectory() as aside:
            merge_fsdp_weights(str(folder / FSDP_SHARDS), aside)
            weights = load_file(Path(aside) / transformers.utils.SAFE_WEIGHTS_NAME)
    own = {name: weight for name, weight in weights.items() if CRITIC not in name.split(".")}
    adapted = next((name for name in own if name.startswith("base_model.model.")), None)
    require(
        adapted is None,
        f"The weights in {folder} are those of an adapter ({adapted!r}) in parts, one a process, without PEFT's "
        "description of it. Resume the run with fsdp_state_dict_type: FULL_STATE_DICT, which writes PEFT's files with "
        "the next checkpoint.",
    )
    return own


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    """
    Load weights that are known by the names of a model's modules; tied ones may be there once.

    Raises:
        ValueError: if one is missing, unknown or of another shape.
    """
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    unknown = [name for name in weights if name not in shapes]
    missing = [name for name, _ in model.named_parameters() if name not in weights]
    others = [name for name in weights if name in shapes and weights[name].shape != shapes[name]]
    require(
        not (unknown or missing or others),
        f"{where} has not the weights of {type(model).__name__}: {len(missing)} are missing, {len(unknown)} unknown, "
        f"{len(others)} of another shape, such as {(missing + unknown + others or [''])[0]!r}. Pass as base the model "
        "that the run began with.",
    )
    model.load_state_dict(weights, strict=False)
