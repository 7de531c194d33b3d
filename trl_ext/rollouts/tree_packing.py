"""
Deals rows to micro-batches and processes so that rows with the same prompt meet, because a pass computes what they
share once. Works on integers: no tensors, no collectives.

A *tree* is a prompt and some of the rows that have it. A micro-batch may hold several. Filling few micro-batches
computes fewest tokens; the cap keeps the largest no larger than without sharing.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .packing import FILLER, RowSizes
from .prefix_trees import WORTH, Cost


@dataclass
class TreeSizes:
    """
    Lengths of rows, and which of them have the same prompt.

    Args:
        rows ([`RowSizes`]):
            Lengths of the rows.
        prompts (`list[int]`):
            For each row a number, the same for the same prompt.
        cost ([`~trl_ext.rollouts.prefix_trees.Cost`]):
            Of computing.
    """

    rows: RowSizes
    prompts: list[int]
    cost: Cost

    def trees(self, rows: Iterable[int]) -> list[list[int]]:
        """The rows by their prompt, the longest first."""
        found: dict[int, list[int]] = defaultdict(list)
        for row in sorted(rows, key=lambda row: -self.rows.completion[row]):
            found[self.prompts[row]].append(row)
        return list(found.values())

    def tokens(self, tree: list[int]) -> int:
        """Tokens of a tree whose prompt is computed once. Each completion repeats the prompt's last token."""
        return max(self.rows.prompt[row] for row in tree) + sum(self.rows.completion[row] + 1 for row in tree)

    def shared(self, rows: list[int]) -> tuple[float, int]:
        """Cost and tokens of a pass over these rows, where what is cheaper decides how many share a prompt."""
        cost, tokens = 0.0, 0
        for tree in self.trees(rows):
            best = (float("inf"), 0)
            parts = 1
            while parts <= len(tree):
                split = [self.tokens(tree[part::parts]) for part in range(parts)]
                best = min(best, (sum(self.cost.of(1, size) for size in split), sum(split)))
                parts *= 2
            cost, tokens = cost + best[0], tokens + best[1]
        return cost, tokens

    def unshared(self, rows: list[int]) -> float:
        """Cost of a pass over these rows as one padded batch."""
        return self.cost.of(len(rows), self.rows.width(rows).total)


def _units(sizes: TreeSizes, rows: list[int], cap: int) -> list[list[int]]:
    """Trees of at most `cap` tokens, or of one row."""
    units = []
    for tree in sizes.trees(rows):
        parts = 1
        while parts < len(tree) and any(sizes.tokens(tree[part::parts]) > cap for part in range(parts)):
            parts += 1
        units += [tree[part::parts] for part in range(parts)]
    return sorted(units, key=lambda unit: -sizes.tokens(unit))


def _filled(sizes: TreeSizes, units: list[list[int]], count: int, cap: int) -> list[list[int]] | None:
    """Rows of `count` bins of at most `cap` tokens, the fullest first. `None` if the units don't fit."""
    loads, filled = [0] * count, [[] for _ in range(count)]  # type: tuple[list[int], list[list[int]]]
    for unit in units:
        emptiest = min(range(count), key=lambda i: loads[i])
        loads[emptiest] += sizes.tokens(unit)
        filled[emptiest] += unit
    if max(loads) > cap and any(len(unit) > 1 for unit in units):
        return None
    order = sorted(range(count), key=lambda i: -loads[i])
    return [filled[i] for i in order]


def fewest_bins(
    sizes: TreeSizes, rows: list[int], cap: int, at_most: int, multiple: int = 1
) -> list[list[int]] | None:
    """
    Deal rows to few bins of at most `cap` tokens.

    Args:
        sizes ([`TreeSizes`]):
            Lengths of all rows.
        rows (`list[int]`):
            The rows to deal.
        cap (`int`):
            Most tokens of a bin. A row that is longer has one of its own.
        at_most (`int`):
            Most bins.
        multiple (`int`):
            The number of bins is a multiple of this.

    Returns:
        `list[list[int]]`: rows of each bin, the fullest first; some may be empty. `None` if they don't fit.
    """
    units = _units(sizes, rows, cap)
    total = sum(map(sizes.tokens, units))
    count = max(1, -(-total // (cap * multiple))) * multiple
    while count <= at_most:
        filled = _filled(sizes, units, count, cap)
        if filled is not None:
            return filled
        count += multiple
    return None


def deal_trees(
    sizes: TreeSizes, rows: list[int], ranks: int, micro_batches: int, dealt: list[list[list[int]]]
) -> list[list[list[int]]] | None:
    """
    Deal rows to ranks and micro-batches so that rows with the same prompt meet. As in
    [`~trl_ext.rollouts.packing.deal`], all ranks have the same number of rows in a micro-batch, some of them fillers.

    Args:
        sizes ([`TreeSizes`]):
            Lengths of all rows.
        rows (`list[int]`):
            The rows to deal.
        ranks, micro_batches (`int`):
            Number of ranks, and of micro-batches on each.
        dealt (`list[list[list[int]]]`):
            How `deal` deals them. No micro-batch gets more tokens than the largest of these.

    Returns:
        `list[list[list[int]]]`: rows by rank and micro-batch. `None` if `dealt` is as cheap.
    """
    real = [[[row for row in batch if row != FILLER] for batch in of_rank] for of_rank in dealt]
    filled = [batch for of_rank in real for batch in of_rank if batch]
    cap = max(map(sizes.rows.tokens, filled))
    bins = fewest_bins(sizes, rows, cap, ranks * micro_batches, ranks)
    if bins is None:
        return None
    shared = sum(sizes.shared(batch)[0] for batch in bins if batch)
    if shared > WORTH * sum(min(sizes.unshared(batch), sizes.shared(batch)[0]) for batch in filled):
        return None
    result: list[list[list[int]]] = [[] for _ in range(ranks)]
    for i in range(micro_batches):
        wave = bins[i * ranks : (i + 1) * ranks] or [[] for _ in range(ranks)]
        most = max(1, *map(len, wave)) if ranks > 1 else max(1, len(wave[0]))
        for rank in range(ranks):
            result[rank].append(wave[rank] + [FILLER] * (most - len(wave[rank])))
    return result
