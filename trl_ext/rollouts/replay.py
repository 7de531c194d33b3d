"""
Replay: rows of earlier generation batches are trained on again, together with new ones. They keep the
log-probabilities with which they were sampled, so that the importance ratio and its clipping correct for the change of
the policy since then.
"""

from typing import Any

import torch

from .micro_batches import SOURCE_ROW, MicroBatch, padded
from .packing import Width


class ReplayBuffer:
    """
    The rows of this process's last generation batches.

    Args:
        capacity (`int`):
            Number of generation batches that are kept.
        seed (`int`):
            Seed of the draws.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.generator = torch.Generator().manual_seed(seed)
        self.batches: list[MicroBatch] = []

    def __len__(self) -> int:
        return sum(len(batch["completion_ids"]) for batch in self.batches)

    def add(self, micro_batches: list[MicroBatch]) -> None:
        """Add a generation batch. If there are more than `capacity`, the oldest is dropped."""
        rows = {
            name: torch.cat([batch[name] for batch in micro_batches]).detach()
            for name, value in micro_batches[0].items()
            # Numbers of source rows mean nothing in a different batch
            if isinstance(value, torch.Tensor) and value.dim() and name != SOURCE_ROW
        }
        self.batches = [*self.batches, rows][-self.capacity :]

    def draw(self, count: int) -> list[MicroBatch]:
        """`count` different rows at random, each as a batch of one row. Fewer if the buffer holds fewer."""
        sizes = [len(batch["completion_ids"]) for batch in self.batches]
        places = [(batch, row) for batch, size in zip(self.batches, sizes, strict=True) for row in range(size)]
        chosen = torch.randperm(len(places), generator=self.generator)[:count].tolist()
        return [
            {name: value[row].unsqueeze(0) for name, value in batch.items()}
            for batch, row in (places[i] for i in chosen)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint must hold for this process."""
        return {"batches": self.batches, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        self.batches = state["batches"]
        self.generator.set_state(state["generator"].cpu())

    def load_share(self, states: list[dict[str, Any]], index: int, processes: int) -> None:
        """
        Take over this process's share of the rows that a different number of processes kept. Every process gets the
        same number of rows of each generation batch, so that all of them go on to draw at the same steps; up to
        `processes` − 1 rows of a batch are dropped.

        Args:
            states (`list[dict]`):
                What [`state_dict`] returned on each of the processes that kept them.
            index, processes (`int`):
                This process, and the number of processes now.
        """
        self.batches = []
        for parts in zip(*(state["batches"] for state in states), strict=True):
            rows = append_rows(parts[0], list(parts[1:]))
            each = len(rows["completion_ids"]) // processes
            if each:
                share = slice(index * each, (index + 1) * each)
                self.batches.append({name: value[share].clone() for name, value in rows.items()})
        self.generator.set_state(states[0]["generator"].cpu())  # all processes draw the same places


def _tensor(batch: MicroBatch, name: str) -> torch.Tensor:
    """A tensor of a micro-batch, with a default for those that not every generation batch has."""
    mask = batch["completion_mask"]
    if name == "tool_mask" and name not in batch:
        return torch.ones_like(mask)  # the policy wrote all tokens
    if name == SOURCE_ROW and name not in batch:
        return mask.new_full((len(mask),), -1)  # nothing was copied
    tensor: torch.Tensor = batch[name]
    return tensor


def append_rows(batch: MicroBatch, rows: list[MicroBatch]) -> MicroBatch:
    """A micro-batch with further rows, all padded to the longest prompt and the longest completion among them."""
    parts = [batch, *rows]
    widths = [Width(part["prompt_ids"].size(1), part["completion_ids"].size(1)) for part in parts]
    widest = Width(max(width.prompt for width in widths), max(width.completion for width in widths))
    joined, device = dict(batch), batch["completion_ids"].device
    names = (name for part in parts for name, value in part.items() if isinstance(value, torch.Tensor) and value.dim())
    for name in dict.fromkeys(names):
        together = [
            padded(name, _tensor(part, name), width, widest) for part, width in zip(parts, widths, strict=True)
        ]
        joined[name] = torch.cat([tensor.to(device) for tensor in together])
    return joined
