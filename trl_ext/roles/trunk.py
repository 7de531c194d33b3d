"""
One trunk for several trainers. A trainer changes the model that it gets: TRL patches forward methods and adds an
adapter for the reference, a critic adds hooks and a head, and wrappers remain. So each trainer gets modules of its own
around the same weights, and its changes disappear with it.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn


ADAPTER = "default"  # the one that is trained, as in TRL
REFERENCE_ADAPTER = "ref"  # TRL's name for its copy of an adapter that a policy came with


def sharing_weights(model: nn.Module) -> Any:
    """
    A copy of a model's modules around the same parameters and buffers. Training the copy trains the model, and takes
    no memory for a second set of weights.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for several processes.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within this context, every process holds all weights that ZeRO-3 has spread and that no engine gathers."""
    spread = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread):
        yield


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter `default` as PEFT does, into the folder itself."""
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)


def load_adapter(model: PeftModel, folder: str | Path, adapter: str = ADAPTER) -> None:
    """
    Load saved weights into an adapter of a model.

    Args:
        model ([`~peft.PeftModel`]):
            A model that has an adapter of this name.
        folder (`str` or `Path`):
            Folder in which PEFT saved an adapter of the same shape.
        adapter (`str`, *optional*, defaults to `"default"`):
            Its name in the model.

    Raises:
        ValueError: if the file lacks some of its weights, or has unknown ones.
    """
    result: Any = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=adapter)
    own = f".{adapter}."
    missing = [name for name in result.missing_keys if own in name]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"The adapter in {folder} is not of this shape: {len(missing)} of its weights are missing, "
            f"{len(result.unexpected_keys)} are unknown (such as {(missing + result.unexpected_keys)[0]!r}). Use the "
            "peft_config that it was made with."
        )


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of the memory behind tensors, by address. Memory that two of them share is counted once."""
    held = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in held}
