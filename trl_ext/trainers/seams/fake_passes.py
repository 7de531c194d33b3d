"""
Passes on tensors without numbers: a model computes at its real size, nothing is allocated, and every storage that is
alive is counted.

Fake tensors here are CPU tensors, because torch without CUDA can't make others with gradients. What a GPU would do
differently is put right: TRL's fused head folds tiles of logits with Triton kernels, in place, where a CPU makes
copies of them in float32.

This file reads what torch keeps private, fake tensors and dispatch modes, and TRL's kernels.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import chunked_logprob
from trl.trainer import utils


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """What an operation returns: a tensor, or several."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)


def _name_of(storage: torch.UntypedStorage) -> int:
    """A number that no other living storage has. Fake ones have no address."""
    return int(StorageWeakRef(storage).cdata)


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of the storages that are alive.

    Args:
        known (`Iterable[torch.Tensor]`):
            Tensors that don't count, such as weights.

    Attributes:
        bytes, peak (`int`):
            Bytes alive now, and at most since [`reset_peak`].
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._seen = {_name_of(tensor.untyped_storage()) for tensor in known}
        self.bytes = self.peak = 0

    def reset_peak(self) -> None:
        """Begin a new maximum."""
        self.peak = self.bytes

    def _drop_stored(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                name = _name_of(storage)
                if name not in self._seen:
                    self._seen.add(name)
                    self.bytes += (size := storage.nbytes())
                    weakref.finalize(storage, self._drop_stored, name, size)
        self.peak = max(self.peak, self.bytes)
        return result


def make_fake(model: nn.Module) -> FakeTensorMode:
    """
    Turns the weights of a model on the meta device into fake CPU tensors, in place.

    Returns:
        `FakeTensorMode`: the mode in which it computes.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    done: dict[int, torch.Tensor] = {}  # tied weights stay tied
    held: list[torch.Tensor] = []  # so that no other gets the id of one that is replaced
    for module in model.modules():
        weights = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in [*weights, *module.named_buffers(recurse=False, remove_duplicate=False)]:
            if id(tensor) not in done:
                new = FakeTensor(fake, tensor.detach().to("meta"), torch.device("cpu"))
                is_weight = isinstance(tensor, nn.Parameter)
                done[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_weight else new
                held.append(tensor)
            setattr(module, name, done[id(tensor)])
    return fake


def _forward_tile(tile: Any, stride: Any, targets: Any, running_max: Any, sum_exp: Any, *args: Any, **kw: Any) -> None:
    """What a Triton kernel does with a tile, as far as memory goes. Log-probabilities come out as 0, and finite."""
    running_max.zero_()
    sum_exp.fill_(1.0)


def _backward_tile(tile: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """The same, backward: no gradient."""
    tile.zero_()


def _matrix_product(accumulator: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """cuBLAS adds to float32 without a copy of its inputs."""


@contextmanager
def head_as_on_gpus(picks: bool = False) -> Iterator[None]:
    """
    Within this context, TRL's fused head takes the memory that it takes on GPUs. It computes nothing.

    Args:
        picks (`bool`):
            Whether it also picks the states with a label, as on GPUs. Fake tensors can't: there is no telling how many
            there are.
    """
    head = {"_forward_tile": _forward_tile, "_backward_tile": _backward_tile, "_addmm_fp32": _matrix_product}
    replaced = [(chunked_logprob, name, function) for name, function in head.items()]
    if picks:
        replaced.append((utils, "_use_triton", lambda device: True))
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
