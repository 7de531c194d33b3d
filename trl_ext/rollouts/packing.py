"""
Deals rows of different lengths to micro-batches and processes. Works on integers: no tensors, no collectives.

A *row* is one completion with its prompt, and is given by its number.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise, zip_longest
from typing import NamedTuple, TypeVar


# TRL takes a tensor of one column for one value per sequence, so completions keep at least two
FEWEST_COLUMNS = 2
# Stands in place of a row's number for a filler: a row without a token in the loss
FILLER = -1

T = TypeVar("T")


class Width(NamedTuple):
    """Columns of a micro-batch."""

    prompt: int
    completion: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass
class RowSizes:
    """
    Lengths of the rows, and how micro-batches of them are padded.

    Args:
        prompt, completion (`list[int]`):
            Columns that each row needs.
        multiple (`int`):
            Prompts and completions are padded to a multiple of this.
        widest (`Width`):
            Columns of the tensors that hold the rows. No micro-batch has more.
    """

    prompt: list[int]
    completion: list[int]
    multiple: int
    widest: Width

    def rounded(self, prompt: int, completion: int) -> Width:
        """Columns of a micro-batch with this longest prompt and this longest completion."""
        needed = (max(prompt, 1), max(completion, FEWEST_COLUMNS))
        padded = (-(-columns // self.multiple) * self.multiple for columns in needed)
        return Width(*map(min, padded, self.widest))

    def width(self, rows: list[int]) -> Width:
        """Columns of a micro-batch of these rows."""
        return self.rounded(max(self.prompt[row] for row in rows), max(self.completion[row] for row in rows))

    def tokens(self, rows: list[int]) -> int:
        """Tokens of a micro-batch of these rows, including padding."""
        return len(rows) * self.width(rows).total

    def cumulative_tokens(self, rows: Iterable[int]) -> Iterator[int]:
        """Tokens of a micro-batch of the first row, of the first two, of the first three, …, including padding."""
        prompt = completion = 0
        for size, row in enumerate(rows, start=1):
            prompt, completion = max(prompt, self.prompt[row]), max(completion, self.completion[row])
            yield size * self.rounded(prompt, completion).total


def evenly(items: Sequence[T], sizes: Sequence[int], count: int) -> list[list[T]]:
    """Items in `count` bins of about the same size: each goes to the emptiest bin, in turn. Give the largest first."""
    emptiest = [(0, i) for i in range(count)]
    bins: list[list[T]] = [[] for _ in range(count)]
    for item, size in zip(items, sizes, strict=True):
        load, i = emptiest[0]
        bins[i].append(item)
        heapq.heapreplace(emptiest, (load + size, i))
    return bins


# Neighbours in a list of sorted rows
Stretch = list[int]


def _cut_by_size(sizes: RowSizes, order: list[int], cap: int, at_most: int) -> list[Stretch] | None:
    """Cut `order` into stretches of at most `cap` tokens. `None` if that takes more than `at_most` stretches."""
    stretches: list[Stretch] = []
    start = 0
    while start < len(order):
        taken = 0
        for tokens in sizes.cumulative_tokens(order[i] for i in range(start, len(order))):
            if tokens > cap:
                break
            taken += 1
        if taken == 0 or len(stretches) == at_most:
            return None
        stretches.append(order[start : start + taken])
        start += taken
    return stretches


def _best_cut(sizes: RowSizes, rows: Stretch) -> tuple[int, int]:
    """
    Where to cut a stretch in two so that it saves most tokens: the tokens and the place. Of equally good cuts it is
    the one nearest to the middle.
    """
    front = list(sizes.cumulative_tokens(rows))
    back = list(sizes.cumulative_tokens(reversed(rows)))[::-1]
    saved, _, cut_at = max(
        (front[-1] - front[i - 1] - back[i], -abs(i - len(rows) / 2), i) for i in range(1, len(rows))
    )
    return saved, cut_at


def _smallest_largest(sizes: RowSizes, order: list[int], micro_batches: int) -> list[Stretch]:
    """Cut `order` into at most `micro_batches` stretches, so that the largest is as small as possible."""
    low, high = 1, sizes.tokens(order)
    while low < high:
        cap = (low + high) // 2
        low, high = (low, cap) if _cut_by_size(sizes, order, cap, micro_batches) else (cap + 1, high)
    stretches = _cut_by_size(sizes, order, high, micro_batches)
    assert stretches is not None
    return stretches


def _packed(sizes: RowSizes, order: list[int], micro_batches: int) -> list[Stretch]:
    """Cut `order` into stretches for [`pack`]."""
    stretches = _smallest_largest(sizes, order, micro_batches)
    single_rows = [stretch for stretch in stretches if len(stretch) == 1]
    # Sorted by the tokens that a cut saves, then by the number of rows. The counter breaks ties.
    queue: list[tuple[int, int, int, Stretch, int]] = []
    counter = count()

    def push(stretch: Stretch) -> None:
        if len(stretch) == 1:
            single_rows.append(stretch)
            return
        saved, cut_at = _best_cut(sizes, stretch)
        heapq.heappush(queue, (-saved, -len(stretch), next(counter), stretch, cut_at))

    for stretch in stretches:
        if len(stretch) > 1:
            push(stretch)
    while queue and len(queue) + len(single_rows) < micro_batches:
        *_, stretch, cut_at = heapq.heappop(queue)
        push(stretch[:cut_at])
        push(stretch[cut_at:])
    return sorted(single_rows + [entry[3] for entry in queue], key=lambda stretch: -sizes.tokens(stretch))


def pack(sizes: RowSizes, rows: list[int], micro_batches: int) -> list[list[int]]:
    """
    Deal rows to micro-batches, so that the largest micro-batch is as small as possible (in tokens, including padding),
    and the total is small.

    The rows are sorted by length and cut into stretches. Bisection finds the smallest possible largest stretch. If
    that takes fewer stretches than there are micro-batches, further cuts are made where each saves most tokens. This
    is done for rows sorted by completion and for rows sorted by whole length, and the result with fewer tokens is
    returned.

    Args:
        sizes ([`RowSizes`]):
            Lengths of all rows.
        rows (`list[int]`):
            The rows to deal.
        micro_batches (`int`):
            Number of micro-batches.

    Returns:
        `list[list[int]]`: rows of each micro-batch, the largest first. There are fewer than `micro_batches` only if
        there are fewer rows.
    """
    if not rows:
        return []
    orders = [
        sorted(rows, key=lambda row: (-sizes.completion[row], -sizes.prompt[row])),
        sorted(rows, key=lambda row: -sizes.completion[row] - sizes.prompt[row]),
    ]
    deals = [_packed(sizes, order, micro_batches) for order in (orders if orders[0] != orders[1] else orders[:1])]
    return min(deals, key=lambda deal: sum(map(sizes.tokens, deal)))


def deal(
    sizes: RowSizes, rows: list[int], ranks: int, micro_batches: int, homes: list[int] | None = None
) -> list[list[list[int]]]:
    """
    Deal rows to ranks and micro-batches. TRL gathers metrics by row, so that all ranks must work on the same number of
    rows at a time: of rows next to each other in length every rank gets one, in turn, and where rows are missing there
    are fillers.

    Args:
        sizes ([`RowSizes`]):
            Lengths of all rows.
        rows (`list[int]`):
            The rows to deal.
        ranks (`int`):
            Number of ranks.
        micro_batches (`int`):
            Number of micro-batches of each rank.
        homes (`list[int]`, *optional*):
            By row, the rank that it must not leave. `None`: rows may go to any rank.

    Returns:
        `list[list[list[int]]]`: rows by rank and micro-batch, at least one in each. `FILLER` stands for a filler.
    """
    order = sorted(rows, key=lambda row: (-sizes.completion[row], -sizes.prompt[row]))
    # A team is the rows that all ranks compute at the same time, one on each
    if homes is None:
        teams = [order[start : start + ranks] for start in range(0, len(order), ranks)]
    else:
        by_rank = [[row for row in order if homes[row] == rank] for rank in range(ranks)]
        teams = [list(team) for team in zip_longest(*by_rank, fillvalue=FILLER)]
    team_sizes = RowSizes(
        [max(sizes.prompt[row] for row in team if row != FILLER) for team in teams],
        [max(sizes.completion[row] for row in team if row != FILLER) for team in teams],
        sizes.multiple,
        sizes.widest,
    )
    packed = pack(team_sizes, list(range(len(teams))), micro_batches)
    packed += [[] for _ in range(micro_batches - len(packed))]
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for batch in packed:
        members = [teams[i] + [FILLER] * (ranks - len(teams[i])) for i in batch] or [[FILLER] * ranks]
        for rank in range(ranks):
            dealt[rank].append([team[rank if homes else (rank + turn) % ranks] for turn, team in enumerate(members)])
    return dealt


def step_slices(
    length: int, step: int, until_update: int, accumulation: int, iterations: int
) -> list[tuple[int, int]]:
    """
    Parts of a generation batch whose micro-batches share an optimizer step every time they are used. Rows may move
    within such a part.

    Args:
        length (`int`):
            Number of micro-batches in the generation batch.
        step (`int`):
            Micro-batches trained on since training began, when the batch is first used.
        until_update (`int`):
            Micro-batches until the current optimizer step ends.
        accumulation (`int`):
            Micro-batches of each optimizer step after that.
        iterations (`int`):
            How often the batch is used.

    Returns:
        `list[tuple[int, int]]`: first micro-batch of each part, and the one after its last.
    """
    start = step - step % (length * iterations)
    ends = range(step + until_update, start + length * iterations, accumulation)
    cuts = sorted({0, length, *((end - start) % length for end in ends)})
    return list(pairwise(cuts))
