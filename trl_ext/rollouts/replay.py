"""
Replay: rows of earlier generation batches come back beside the new ones. They keep the log-probabilities that they
were sampled with, so that the importance ratio, and its clip, correct for how far the policy has moved.
"""

from typing import Any

import torch

from .micro_batches import SOURCE_ROW, MicroBatch, padded
from .packing import Width


class ReplayBuffer:
    """
    Rows of the last generation batches of this process.

    Args:
        capacity (`int`):
            Generation batches that are kept.
        seed (`int`):
            Of the draws.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.generator = torch.Generator().manual_seed(seed)
        self.batches: list[MicroBatch] = []

    def __len__(self) -> int:
        return sum(len(batch["completion_ids"]) for batch in self.batches)

    def add(self, micro_batches: list[MicroBatch]) -> None:
        """Take in a generation batch; the oldest leaves."""
        rows = {
            name: torch.cat([batch[name] for batch in micro_batches]).detach()
            for name, value in micro_batches[0].items()
            if isinstance(value, torch.Tensor) and value.dim() and name != SOURCE_ROW  # of another batch
        }
        self.batches = [*self.batches, rows][-self.capacity :]

    def draw(self, count: int) -> list[MicroBatch]:
        """`count` different rows, each as a batch of one."""
        sizes = [len(batch["completion_ids"]) for batch in self.batches]
        places = [(b, row) for b, size in enumerate(sizes) for row in range(size)]
        chosen = torch.randperm(len(places), generator=self.generator)[:count].tolist()
        return [
            {name: value[places[i][1]].unsqueeze(0) for name, value in self.batches[places[i][0]].items()}
            for i in chosen
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of this process must hold."""
        return {"batches": self.batches, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        self.batches = state["batches"]
        self.generator.set_state(state["generator"].cpu())


def _of(part: MicroBatch, name: str) -> torch.Tensor:
    """A tensor of a micro-batch; what not every generation batch has is filled in."""
    mask = part["completion_mask"]
    if name == "tool_mask" and name not in part:
        return torch.ones_like(mask)  # all tokens are the policy's
    if name == SOURCE_ROW and name not in part:
        return mask.new_full((len(mask),), -1)  # no copies
    tensor: torch.Tensor = part[name]
    return tensor


def append_rows(batch: MicroBatch, rows: list[MicroBatch]) -> MicroBatch:
    """A micro-batch with further rows; all are padded to the widest prompt and completion among them."""
    parts = [batch, *rows]
    widths = [Width(part["prompt_ids"].size(1), part["completion_ids"].size(1)) for part in parts]
    widest = Width(max(width.prompt for width in widths), max(width.completion for width in widths))
    joined, device = dict(batch), batch["completion_ids"].device
    names = (name for part in parts for name, value in part.items() if isinstance(value, torch.Tensor) and value.dim())
    for name in dict.fromkeys(names):
        together = [padded(name, _of(part, name), width, widest) for part, width in zip(parts, widths, strict=True)]
        joined[name] = torch.cat([tensor.to(device) for tensor in together])
    return joined
