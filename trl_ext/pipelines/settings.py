"""
The settings of a run as its folder stores them, so that a later process can tell whether it continues the same run.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from ..curriculum.schedule import DifficultyCurriculum


# Arguments of a configuration that may change when a run is continued: where it runs, where it is logged and pushed,
# and which checkpoints are kept
FREE_SETTINGS = re.compile(
    r"^(output_dir|run_name|project|trackio_.*|report_to|log_.*|logging_dir|disable_tqdm|push_to_hub.*|hub_.*|"
    r"save_.*|dataloader_.*|resume_from_checkpoint|local_rank|ddp_.*|deepspeed|fsdp.*|_n_gpu|skip_memory_metrics|"
    r"vllm_server_.*|vllm_gpu_.*|(gradient|activation)_checkpointing.*)$"
)
# Number of rows by which data sets are told apart
ROWS_OF_A_FINGERPRINT = 256


def settings_of(args: Any, prefix: str) -> dict[str, Any]:
    """The arguments of a configuration on which the result depends, under the names `prefix.argument`."""
    return {f"{prefix}.{name}": value for name, value in args.to_dict().items() if not FREE_SETTINGS.match(name)}


def fingerprint(dataset: Dataset | None) -> str | None:
    """A hash of the number of rows, the columns, and some evenly spaced rows; `None` for no data set."""
    if dataset is None:
        return None
    rows = dataset.select(range(0, len(dataset), max(1, len(dataset) // ROWS_OF_A_FINGERPRINT)))
    text = json.dumps([len(dataset), sorted(dataset.column_names), rows.to_list()], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def described(value: Any) -> Any:
    """
    A description of an argument, of types that JSON has and equal in every process. Data sets are described by their
    [`fingerprint`], a curriculum by its `repr`, and functions, classes and all other objects by their name only.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): described(item) for name, item in value.items()}
    if isinstance(value, Dataset):
        return fingerprint(value)
    if isinstance(value, functools.partial):
        return [described(value.func), described(value.args), described(value.keywords)]
    if isinstance(value, DifficultyCurriculum):
        return repr(value)
    return str(getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__name__)


def as_json(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings as they are when they are read back from a file."""
    result: dict[str, dict[str, Any]] = json.loads(json.dumps(settings, default=_plain, sort_keys=True))
    return result


def _plain(value: Any) -> Any:
    # PEFT has names in sets, and the order of a set differs between processes
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
