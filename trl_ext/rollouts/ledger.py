"""
Rows of numbers by key, such as what a run knows of each prompt. Keeping a moment to go back to, and saving, cost what
changed since the last time, not what is known.

Rows are spread over shards by the hash of their key. A moment ([`LedgerState`]) shares all shards with its ledger,
which copies one before it changes it. For saving, rows that changed are encoded as one more block, and the last row of
a key counts. When more than half of the changes are out of date, all rows are encoded anew.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate, chain, pairwise
from typing import Any, TypeVar

import numpy as np
import torch


# Text, a number, or a tuple of what JSON has
Key = TypeVar("Key")
Row = TypeVar("Row", bound=tuple[float, ...])

SHARDS = 1024
# Changes of which more than half may be out of date
FEW = 4096


def _sharded(rows: Mapping[Key, Row]) -> list[dict[Key, Row]]:
    shards: list[dict[Key, Row]] = [{} for _ in range(SHARDS)]
    for key, row in rows.items():
        shards[hash(key) % SHARDS][key] = row
    return shards


class _Changes:
    """Keys in the order in which their rows changed, and encoded blocks, each with the number of changes up to it."""

    def __init__(self, keys: Iterable[Any] = (), blocks: Iterable[tuple[int, bytes]] = ()) -> None:
        self.keys = list(keys)
        self.blocks = list(blocks)

    def first(self, count: int) -> "_Changes":
        """A copy of the first changes."""
        return _Changes(self.keys[:count], (block for block in self.blocks if block[0] <= count))


class Ledger(Mapping[Key, Row]):
    """
    Rows of numbers by key. Numbers are kept as they are, bit for bit.

    Args:
        make_row (`Callable`):
            Makes a row of its numbers: `tuple`, or `_make` of a `NamedTuple`.
    """

    def __init__(self, make_row: Callable[[Iterable[float]], Row]) -> None:
        self._make_row = make_row
        self._fill({})

    def _fill(self, rows: Mapping[Key, Row]) -> None:
        self._shards, self._shared = _sharded(rows), bytearray(SHARDS)
        self._count, self._changes = len(rows), _Changes(rows)

    def __getitem__(self, key: Key) -> Row:
        return self._shards[hash(key) % SHARDS][key]

    def get(self, key: Key, default: Any = None) -> Any:
        return self._shards[hash(key) % SHARDS].get(key, default)

    def __setitem__(self, key: Key, row: Row) -> None:
        place = hash(key) % SHARDS
        if self._shared[place]:
            self._shards[place], self._shared[place] = dict(self._shards[place]), 0
        shard = self._shards[place]
        self._count += key not in shard
        shard[key] = row
        self._changes.keys.append(key)

    def __iter__(self) -> Iterator[Key]:
        return (key for shard in self._shards for key in shard)

    def __len__(self) -> int:
        return self._count

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Drop the rows that are not `wanted`."""
        self._fill({key: row for key, row in self.items() if wanted(row)})

    def state(self) -> "LedgerState":
        """What the ledger holds now."""
        if len(self._changes.keys) > 2 * self._count + FEW:
            self._changes = _Changes(self)
        self._shared = bytearray(b"\1") * SHARDS
        return LedgerState(tuple(self._shards), self._count, self._changes)

    def load(self, state: "LedgerState") -> None:
        """Hold what was held at the moment of a state, of this ledger or of one like it."""
        if state.changes is None:
            self._fill({key: self._make_row(row) for key, row in state.items()})
            return
        self._shards, self._shared, self._count = list(state.shards), bytearray(b"\1") * SHARDS, len(state)
        if state.changes is not self._changes or len(self._changes.keys) > state.changed:
            self._changes = state.changes.first(state.changed)


class LedgerState(Mapping[Any, tuple[float, ...]]):
    """
    What a ledger held at a moment. It never changes, so that a deep copy of it is the state itself.

    Args:
        shards (`Sequence[dict]`):
            Rows by key, spread by the hash of the key.
        count (`int`):
            Number of rows.
        changes (*optional*):
            The changes of the ledger up to now. `None`: the state was read from a file.
    """

    def __init__(self, shards: Any, count: int, changes: _Changes | None) -> None:
        self.shards = shards
        self.changes = changes
        self.changed = 0 if changes is None else len(changes.keys)
        self._count = count

    def __getitem__(self, key: Any) -> tuple[float, ...]:
        row: tuple[float, ...] = self.shards[hash(key) % SHARDS][key]
        return row

    def __iter__(self) -> Iterator[Any]:
        return (key for shard in self.shards for key in shard)

    def __len__(self) -> int:
        return self._count

    def __deepcopy__(self, memo: dict[int, Any]) -> "LedgerState":
        return self

    def __reduce__(self) -> Any:
        blocks = self._blocks()
        joined = torch.frombuffer(bytearray(b"".join(blocks) or b"\0"), dtype=torch.uint8)
        return read_ledger, (joined, [len(block) for block in blocks])

    def _blocks(self) -> list[bytes]:
        """All rows, encoded. What is new is encoded now, and kept for the next state."""
        if self.changes is None:
            return [_encoded(dict(self))]
        blocks = [block for block in self.changes.blocks if block[0] <= self.changed]
        done = blocks[-1][0] if blocks else 0
        if done < self.changed:
            new = _encoded({key: self[key] for key in dict.fromkeys(self.changes.keys[done : self.changed])})
            if len(blocks) == len(self.changes.blocks):
                self.changes.blocks.append((self.changed, new))
            blocks.append((self.changed, new))
        return [block for _, block in blocks]


def _encoded(rows: Mapping[Any, tuple[float, ...]]) -> bytes:
    """Keys as JSON in one line, then the numbers column by column: those of a column are alike, and pack well."""
    numbers = np.fromiter(chain.from_iterable(rows.values()), dtype="<f8").reshape(max(len(rows), 1), -1)  # (N, width)
    return zlib.compress(json.dumps(list(rows)).encode() + b"\n" + numbers.T.tobytes(), level=1)


def read_ledger(joined: torch.Tensor, sizes: list[int]) -> LedgerState:
    """
    The reverse of saving a [`LedgerState`], which files of state name as its maker.

    Args:
        joined (`torch.Tensor` of shape `(B,)`):
            The bytes of all blocks.
        sizes (`list[int]`):
            The number of bytes of each block.
    """
    whole = joined.cpu().numpy().tobytes()
    rows: dict[Any, tuple[float, ...]] = {}
    for start, end in pairwise(accumulate(sizes, initial=0)):
        names, _, numbers = zlib.decompress(whole[start:end]).partition(b"\n")
        keys = [tuple(key) if isinstance(key, list) else key for key in json.loads(names)]
        columns = np.frombuffer(numbers, dtype="<f8").reshape(-1, len(keys)).tolist() if keys else []
        rows.update(zip(keys, zip(*columns, strict=True), strict=True))
    return LedgerState(_sharded(rows), len(rows), None)
