"""
Rows that begin with the same tokens, laid out so that these tokens are computed once. Works on integers: no model.

The rows of a pass are the leaves of a trie. A *segment* is a part of a row's tokens that all rows below it share: the
prompt of a group, or the first turns that some rollouts of it have in common. Several segments lie one after the other
in one *packed row*; a token sees the tokens before it in its own segment and in the segments above. So that every
packed place has one next token, a segment repeats the last token of the segment above (its *head*), and the copy above
is hidden from it.

Rows are sorted, so that those which share most stand side by side. How many of them share a packed row is decided by
cost: a packed row computes shared tokens once, but attention over it grows with the square of its length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

from .packing import evenly


# Shared tokens that are worth a segment of their own; each segment repeats one
FEWEST_SHARED = 8
# Fewest tokens of a segment that leave something to share, because the last one is repeated below it
FEWEST_POSSIBLE = 2
# What a pass may cost, in parts of the cost without sharing, before sharing is worth its own trouble
WORTH = 0.95


class Segment(NamedTuple):
    """
    Tokens `start` to `stop` of a row, and of all rows below it in the trie.

    Args:
        row (`int`):
            A row whose tokens they are.
        start, stop (`int`):
            Places in that row. The packed segment begins with token `start - 1`, its head, if it has a parent.
        parent (`int`):
            Number of the segment above, in the same packed row. −1: none.
    """

    row: int
    start: int
    stop: int
    parent: int

    @property
    def first(self) -> int:
        """Position of its first packed token."""
        return self.start - (self.parent >= 0)

    @property
    def size(self) -> int:
        """Packed tokens."""
        return self.stop - self.first


@dataclass(frozen=True)
class Cost:
    """
    What a pass costs, in the cost of computing one token without attention.

    Args:
        pair (`float`):
            Cost of one token's attention to one other.
    """

    pair: float

    def of(self, rows: int, columns: int, seen: int | None = None) -> float:
        """Cost of `rows` × `columns` tokens that see `seen` places each (`None`: as many as there are columns)."""
        return rows * columns * (1 + self.pair * (columns if seen is None else seen))


def common_prefix(a: torch.Tensor, b: torch.Tensor) -> int:
    """Number of first tokens that two rows have in common."""
    size = min(len(a), len(b))
    different = (a[:size] != b[:size]).nonzero()
    return int(different[0]) if len(different) else size


class SortedRows:
    """
    Rows of tokens in the order in which those that share most stand side by side.

    Args:
        rows (`Sequence[torch.Tensor]`):
            Token ids of each row, without padding.
        fewest (`int`):
            Shared tokens that are worth a segment of their own.

    Attributes:
        order (`list[int]`):
            Numbers of the rows.
        shared (`list[int]`):
            For each place in `order`, the number of first tokens that it has in common with the place before it.
    """

    def __init__(self, rows: Sequence[torch.Tensor], fewest: int = FEWEST_SHARED) -> None:
        self.rows, self.fewest = rows, fewest
        texts = [tuple(row.tolist()) for row in rows]
        self.order = sorted(range(len(rows)), key=texts.__getitem__)
        self.shared = [0, *(common_prefix(rows[a], rows[b]) for a, b in pairwise(self.order))]

    def size(self, place: int) -> int:
        """Tokens of the row at a place."""
        return len(self.rows[self.order[place]])

    def packed_size(self, start: int, stop: int) -> int:
        """Packed tokens of the rows at these places."""
        return sum(segment.size for segment in self.segments(start, stop))

    def segments(self, start: int, stop: int) -> list[Segment]:
        """The segments of one packed row with the rows at these places, parents before their children."""
        found: list[Segment] = []
        self._add(found, start, stop, 0, -1)
        return found

    def _add(self, found: list[Segment], start: int, stop: int, depth: int, parent: int) -> None:
        """Add the segments of the rows at these places, whose first `depth` tokens are in the segments above."""
        if stop - start == 1:
            found.append(Segment(self.order[start], depth, self.size(start), parent))
            return
        common = min(self.shared[start + 1 : stop])
        if common - depth >= self.fewest:
            found.append(Segment(self.order[start], depth, common, parent))
            depth, parent = common, len(found) - 1
        cuts = [start, *(i for i in range(start + 1, stop) if self.shared[i] - depth < self.fewest), stop]
        for first, last in pairwise(cuts):
            self._add(found, first, last, depth, parent)


class PackedRows:
    """
    Rows of a pass, laid out in packed rows.

    Args:
        rows (`Sequence[torch.Tensor]`):
            Token ids of each row, without padding, on the CPU.
        segments (`list[list[Segment]]`):
            The segments of each packed row.
        multiple (`int`):
            Packed rows are padded to a multiple of this.

    Attributes:
        width (`int`):
            Columns of the packed rows.
        input_ids, positions, segment_of (`torch.Tensor` of shape `(R, width)`):
            Tokens (0 in padding), their positions in the row that they are of, and the number of their segment.
            Padding is a segment of its own.
        limits (`torch.Tensor` of shape `(R, S, S)`):
            A token of segment `s` sees the tokens of segment `a` at positions below `limits[:, s, a]`, and at
            positions up to its own.
    """

    def __init__(self, rows: Sequence[torch.Tensor], segments: list[list[Segment]], multiple: int = 1) -> None:
        self.segments = segments
        longest = max(sum(segment.size for segment in packed) for packed in segments)
        count, self.width = len(segments), -(-longest // multiple) * multiple
        most = max(map(len, segments)) + 1
        self.input_ids = torch.zeros(count, self.width, dtype=torch.long)
        self.positions = torch.zeros(count, self.width, dtype=torch.long)
        self.segment_of = torch.full((count, self.width), most - 1)
        self.limits = torch.zeros(count, most, most, dtype=torch.int32)
        self.limits[:, most - 1, most - 1] = self.width
        # For each row: where its tokens are, place by place in the flat packed rows
        self._places: list[torch.Tensor] = [torch.empty(0, dtype=torch.long) for _ in rows]
        for r, packed in enumerate(segments):
            at = 0
            paths: list[torch.Tensor] = []
            for s, segment in enumerate(packed):
                place = slice(at, at + segment.size)
                self.input_ids[r, place] = rows[segment.row][segment.first : segment.stop]
                self.positions[r, place] = torch.arange(segment.first, segment.stop)
                self.segment_of[r, place] = s
                self.limits[r, s, s] = segment.stop
                if segment.parent >= 0:
                    above = self.limits[r, segment.parent].clone()
                    above[segment.parent] = segment.first
                    self.limits[r, s] += above
                own = torch.arange(at, at + segment.size) + r * self.width
                paths.append(torch.cat([paths[segment.parent][: segment.first], own]) if segment.parent >= 0 else own)
                if segment.stop == len(rows[segment.row]):
                    self._places[segment.row] = paths[-1]
                at += segment.size
            self.positions[r, at:] = torch.arange(self.width - at)

    @property
    def tokens(self) -> int:
        """Packed tokens, including padding."""
        return self.input_ids.numel()

    @property
    def shares(self) -> bool:
        """Whether any token is in more than one row."""
        return any(segment.parent >= 0 for packed in self.segments for segment in packed)

    def places(self, row: int) -> torch.Tensor:
        """Where the tokens of a row are, as indices into the flattened packed rows."""
        return self._places[row]

    @cached_property
    def visible(self) -> torch.Tensor:
        """Which places see which: `(R, width, width)`, booleans, the one that looks first."""
        masks = []
        for limits, segments, positions in zip(self.limits, self.segment_of, self.positions, strict=True):
            below = limits.index_select(0, segments).index_select(1, segments)
            masks.append((positions < below) & (positions <= positions.unsqueeze(1)))
        return torch.stack(masks)

    def visible_within(self, window: int) -> torch.Tensor:
        """As `visible`, for layers in which a token sees the last `window` tokens of its row, itself included."""
        return self.visible & (self.positions.unsqueeze(2) - self.positions.unsqueeze(1) < window)


def cut_by_cost(rows: SortedRows, cost: Cost) -> list[tuple[int, int]]:
    """
    Stretches of sorted rows that are cheapest as packed rows.

    Args:
        rows ([`SortedRows`]):
            The rows.
        cost ([`Cost`]):
            Of computing.

    Returns:
        `list[tuple[int, int]]`: the first place of each stretch, and the one after its last.
    """
    count = len(rows.order)
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, count + 1):
        size, options = 0, []
        for start in range(stop - 1, -1, -1):
            # As the stretch grows to the left, the row on its right end stays whole and shares with its neighbour
            shared = rows.shared[start + 1] if start + 1 < stop else 0
            size += rows.size(start) - (shared - 1 if shared >= rows.fewest else 0)
            options.append((best[start][0] + cost.of(1, size), start))
        best.append(min(options))
    stretches = []
    stop = count
    while stop:
        start = best[stop][1]
        stretches.append((start, stop))
        stop = start
    return stretches[::-1]


def bins(sizes: Sequence[int], cost: Cost) -> list[list[int]]:
    """Numbers of the packed rows that lie in one row, so that rows padded to the longest cost least."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    total, longest = sum(sizes), sizes[order[0]]
    best, found = math.inf, []
    for count in range(len(sizes), 0, -1):
        if total * (1 + cost.pair * max(total / count, longest)) >= best:  # even without padding
            continue
        filled = evenly(order, [sizes[i] for i in order], count)
        padded = cost.of(count, max(sum(sizes[i] for i in numbers) for numbers in filled))
        if padded < best:
            best, found = padded, filled
    return found


def packed_rows(
    rows: Sequence[torch.Tensor], cost: Cost, fewest: int = FEWEST_SHARED, multiple: int = 1
) -> PackedRows:
    """
    Lay out rows in packed rows, at the least cost.

    Args:
        rows (`Sequence[torch.Tensor]`):
            Token ids of each row, without padding, on the CPU. Each has at least one.
        cost ([`Cost`]):
            Of computing.
        fewest (`int`):
            Shared tokens that are worth a segment of their own.
        multiple (`int`):
            Packed rows are padded to a multiple of this.
    """
    ordered = SortedRows(rows, fewest)
    trees = [ordered.segments(*stretch) for stretch in cut_by_cost(ordered, cost)]
    sizes = [sum(segment.size for segment in tree) for tree in trees]
    joined = []
    for numbers in bins(sizes, cost):
        packed: list[Segment] = []
        for number in numbers:
            offset = len(packed)
            packed += [s._replace(parent=s.parent + offset if s.parent >= 0 else -1) for s in trees[number]]
        joined.append(packed)
    return PackedRows(rows, joined, multiple)
