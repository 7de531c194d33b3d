"""
One trunk for several trainers. A trainer changes the model that it is given: TRL patches forwards and adds an adapter
for the reference, a critic adds hooks and a head, wrappers stay. So each gets modules of its own, around the same
weights, and what it did to them goes when it goes.
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
    A copy of a model's modules around the same parameters and buffers: training the one trains the other, and takes no
    memory for weights.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for several processes.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights whole on every process inside, where ZeRO-3 has spread them and no engine gathers them."""
    spread = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread):
        yield


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Writes the adapter `default`, as PEFT does, without the subfolder that adapters of other names get."""
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)


def load_adapter(model: PeftModel, folder: str | Path, adapter: str = ADAPTER) -> None:
    """
    Puts saved weights into an adapter that is there.

    Args:
        model ([`~peft.PeftModel`]):
            With an adapter of this name.
        folder (`str` or `Path`):
            Where PEFT saved one of the same shape.
        adapter (`str`, *optional*, defaults to `"default"`):
            Its name in the model.

    Raises:
        ValueError: if the file lacks some of its weights, or has others.
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
    """Bytes of the memory behind tensors, by its address: what two of them share is there once."""
    held = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in held}
