"""
Deals rows to micro-batches and processes so that rows with the same prompt meet, because a pass computes what they
share once. Works on integers: no tensors, no collectives.

A *tree* is a prompt and some of the rows that have it. A micro-batch may hold several. Filling few micro-batches
computes fewest tokens; the cap keeps the largest no larger than without sharing, so that a pass takes no more memory.
Where micro-batches have one row, those of a prompt meet that are together no longer than the longest row.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from .packing import FILLER, RowSizes, evenly
from .prefix_trees import FEWEST_SHARED, WORTH, Cost
from .shared_pass import Sharing


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
        fewest (`int`, *optional*, defaults to `FEWEST_SHARED`):
            Tokens of a prompt that are worth sharing.
    """

    rows: RowSizes
    prompts: list[int]
    cost: Cost
    fewest: int = FEWEST_SHARED

    @classmethod
    def of(cls, rows: RowSizes, prompts: list[int], sharing: Sharing) -> Self:
        """For passes that share as `sharing` says."""
        return cls(rows, prompts, sharing.cost, sharing.fewest)

    def trees(self, rows: Iterable[int]) -> list[list[int]]:
        """The rows by their prompt, the longest first."""
        found: dict[int, list[int]] = defaultdict(list)
        for row in sorted(rows, key=lambda row: -self.rows.completion[row]):
            found[self.prompts[row]].append(row)
        return list(found.values())

    def tokens(self, tree: list[int]) -> int:
        """
        Tokens of a tree whose prompt is computed once. If there are several completions, each repeats the prompt's
        last token. A short prompt is computed with each.
        """
        prompt = max(self.rows.prompt[row] for row in tree)
        completions = sum(self.rows.completion[row] for row in tree)
        if len(tree) == 1 or prompt < self.fewest:
            return len(tree) * prompt + completions
        return prompt + completions + len(tree)

    def split(self, tree: list[int]) -> list[list[int]]:
        """Parts of a tree of which each computes the prompt once, at the least cost."""
        powers = [2**i for i in range(len(tree).bit_length())]
        splits = [[tree[part::parts] for part in range(parts)] for parts in powers]
        return min(splits, key=lambda split: sum(self.cost.of(1, self.tokens(part)) for part in split))

    def shared(self, rows: list[int]) -> tuple[float, int]:
        """Cost and tokens of a pass over these rows, where what is cheaper decides how many share a prompt."""
        tokens = [self.tokens(part) for tree in self.trees(rows) for part in self.split(tree)]
        return sum(self.cost.of(1, size) for size in tokens), sum(tokens)

    def unshared(self, rows: list[int]) -> float:
        """Cost of a pass over these rows as one padded batch."""
        return self.cost.of(len(rows), self.rows.width(rows).total)


def _units(sizes: TreeSizes, rows: list[int], cap: int) -> list[list[int]]:
    """Trees of at most `cap` tokens, or of one row."""
    units = []
    for tree in sizes.trees(rows):
        divided = sizes.split(tree)
        while len(divided) < len(tree) and any(sizes.tokens(part) > cap for part in divided):
            divided = evenly(tree, [sizes.rows.completion[row] for row in tree], len(divided) + 1)
        units += divided
    return sorted(units, key=lambda unit: -sizes.tokens(unit))


def _filled(sizes: TreeSizes, units: list[list[int]], count: int, cap: int) -> list[list[int]] | None:
    """Rows of `count` bins of at most `cap` tokens, the fullest first. `None` if the units don't fit."""
    filled = evenly(units, list(map(sizes.tokens, units)), count)
    loads = [sum(map(sizes.tokens, some)) for some in filled]
    if any(load > cap and len(some) > 1 for load, some in zip(loads, filled, strict=True)):
        return None
    rows = [[row for unit in some for row in unit] for some in filled]
    # Where units of a tree meet again, they are split in another way
    if any(len(some) > 1 and sizes.shared(of_bin)[1] > cap for some, of_bin in zip(filled, rows, strict=True)):
        return None
    return [rows[i] for i in sorted(range(count), key=lambda i: -loads[i])]


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
