"""
The prompts that refilling draws: a stream of its own beside the epoch's, so that an epoch stays what the main sampler
says and a resumed run draws what the interrupted one would have drawn.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher


# TRL's loader shuffles by the same seed: without this, the stream would draw what the loader deals next
APART_FROM_LOADER = 1_000_003


@lru_cache(maxsize=100_000)
def _text_key(text: str) -> str:
    return str(Hasher.hash(text))


def _is_text(prompt: Any) -> bool:
    if not isinstance(prompt, list):
        return isinstance(prompt, str)
    return all(isinstance(message, dict) and all(isinstance(v, str) for v in message.values()) for message in prompt)


def prompt_key(row: dict[str, Any]) -> str:
    """
    Identity of a prompt, by content: what the policy sees of a row (its prompt and images), or the whole row where an
    environment writes the prompt.
    """
    if _is_text(row.get("prompt")) and not {"image", "images"} & row.keys():
        return _text_key(repr(row["prompt"]))
    seen = {name: row[name] for name in ("prompt", "image", "images") if name in row}
    return str(Hasher.hash(seen or row))


def can_be_read_twice(dataset: IterableDataset) -> bool:
    """Whether a second pass over an iterable data set starts where the first did (a generator object does not)."""
    first, second = (list(islice(iter(dataset), 3)) for _ in range(2))
    return bool(first) and Hasher.hash(first) == Hasher.hash(second)


class PromptStream:
    """
    Rows of a data set, pass after pass, each pass in an order of its own that only the seed decides.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Where prompts come from. An iterable one is shuffled with its buffered shuffle.
        seed (`int`):
            Seed of the orders, which are others than the loader's by the same seed. Equal on every rank: all draw the
            same rows.
    """

    def __init__(self, dataset: Dataset | IterableDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed + APART_FROM_LOADER
        self.epoch = 0
        self.position = 0
        self._rows: Iterator[dict[str, Any]] | None = None

    def _open(self) -> Iterator[dict[str, Any]]:
        if isinstance(self.dataset, IterableDataset):
            rest = self.dataset.shuffle(seed=self.seed).skip(self.position)
            rest.set_epoch(self.epoch)  # last: `skip` starts from epoch 0
            return iter(rest)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)[self.position :].tolist()
        return (self.dataset[index] for index in order)

    def _next(self) -> dict[str, Any] | None:
        """The next row, or `None` once at the end of each pass."""
        if self._rows is None:
            self._rows = self._open()
        row = next(self._rows, None)
        if row is None:
            self.epoch, self.position, self._rows = self.epoch + 1, 0, None
        else:
            self.position += 1
        return row

    def draw(
        self,
        count: int,
        exclude: set[str],
        choose: Callable[[list[dict[str, Any]]], list[int]] | None = None,
        lookahead: int = 4,
    ) -> list[dict[str, Any]]:
        """
        The next rows of the stream whose prompts are not in `exclude`, or a choice among more of them.

        Args:
            count (`int`):
                How many.
            exclude (`set[str]`):
                Keys ([`prompt_key`]) that must not be drawn. The keys of what is drawn are added to it.
            choose (`Callable`, *optional*):
                Gets up to `lookahead * count` next rows and returns the positions of `count` of them. Not asked where
                `count` rows or fewer are left. The rows passed over come again in the next pass.
            lookahead (`int`, *optional*, defaults to `4`):
                Rows to choose from for every row drawn.

        Returns:
            `list[dict]`: fewer than `count` rows if the data set holds no other prompts.
        """
        candidates: dict[str, dict[str, Any]] = {}
        wanted = count if choose is None else lookahead * count
        passes_ended = 0
        # From the second end on, every row of the data set has been looked at since the call began.
        while len(candidates) < wanted and passes_ended < 2:
            row = self._next()
            if row is None:
                passes_ended += 1
                continue
            key = prompt_key(row)
            if key not in exclude:
                candidates.setdefault(key, row)
        keys, rows = list(candidates), list(candidates.values())
        chosen = range(len(rows)) if choose is None or len(rows) <= count else choose(rows)
        exclude.update(keys[i] for i in chosen)
        return [rows[i] for i in chosen]

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next `count` rows, whatever they hold; rows may repeat where the data set ends."""
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            row = self._next()
            if row is not None:
                rows.append(row)
        return rows

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position, self._rows = state["epoch"], state["position"], None
