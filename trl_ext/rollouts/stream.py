"""
The stream from which refilling draws its prompts. It is independent of the loader's order, so that an epoch is what
the loader's sampler says, and a resumed run draws what the uninterrupted one would have drawn.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher


# Added to the seed. TRL's loader shuffles by the same seed: without this, the stream would draw what it deals next.
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
    A key that is the same for rows with the same prompt: a hash of what the policy sees (prompt and images), or of the
    whole row if an environment writes the prompt.
    """
    if _is_text(row.get("prompt")) and not {"image", "images"} & row.keys():
        return _text_key(repr(row["prompt"]))
    seen = {name: row[name] for name in ("prompt", "image", "images") if name in row}
    return str(Hasher.hash(seen or row))


def can_be_read_twice(dataset: IterableDataset) -> bool:
    """Whether a second pass over an iterable data set starts where the first did. (With a generator it doesn't.)"""
    first, second = (list(islice(iter(dataset), 3)) for _ in range(2))
    return bool(first) and Hasher.hash(first) == Hasher.hash(second)


class PromptStream:
    """
    The rows of a data set, in pass after pass. Each pass has its own order, which depends on the seed alone.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data set. An iterable one is shuffled with its buffered shuffle.
        seed (`int`):
            Seed of the orders. They differ from the loader's with the same seed. The seed must be the same on every
            rank, so that all ranks draw the same rows.
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
            rest.set_epoch(self.epoch)  # after `skip`, which starts from epoch 0
            return iter(rest)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)[self.position :].numpy()  # 8 bytes a row
        return (self.dataset[int(index)] for index in order)

    def _next(self) -> dict[str, Any] | None:
        """The next row. At the end of each pass, `None` once."""
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
        The next rows of the stream whose prompts are not in `exclude`, or `count` of them that `choose` selects.

        Args:
            count (`int`):
                Number of rows to draw.
            exclude (`set[str]`):
                Keys ([`prompt_key`]) that must not be drawn. The keys of the drawn rows are added to it, in place.
            choose (`Callable`, *optional*):
                Gets the next rows, up to `lookahead * count`, and returns the positions of `count` of them. It is not
                called if there are only `count` rows or fewer. Rows that it passes over return in the next pass.
            lookahead (`int`, *optional*, defaults to `4`):
                Number of rows to choose from for each row drawn.

        Returns:
            `list[dict]`: fewer than `count` rows if the data set has no further prompts.
        """
        candidates: dict[str, dict[str, Any]] = {}
        wanted = count if choose is None else lookahead * count
        passes_ended = 0
        # At the second end of a pass, this call has read every row of the data set
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
        """The next `count` rows, whatever their prompts. Rows may repeat if a pass ends."""
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            row = self._next()
            if row is not None:
                rows.append(row)
        return rows

    def state_dict(self) -> dict[str, int]:
        """Where in the stream it is."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The reverse of [`state_dict`]."""
        self.epoch, self.position, self._rows = state["epoch"], state["position"], None
