"""
How rows of different lengths are dealt to micro-batches and processes. Integers only: no tensors, no collectives.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, pairwise, zip_longest
from typing import NamedTuple


# TRL takes a completion of one column for one value per sequence
FEWEST_COLUMNS = 2
# Stands for a row without weight
FILLER = -1


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
    Lengths of rows, which may all be computed together.

    Args:
        prompt, completion (`list[int]`):
            Columns that each row needs.
        multiple (`int`):
            Prompts and completions are padded to a multiple of this.
        widest (`Width`):
            Columns that there are.
    """

    prompt: list[int]
    completion: list[int]
    multiple: int
    widest: Width

    def rounded(self, prompt: int, completion: int) -> Width:
        """Columns of a micro-batch whose longest prompt and completion these are."""
        needed = (max(prompt, 1), max(completion, FEWEST_COLUMNS))
        padded = (-(-columns // self.multiple) * self.multiple for columns in needed)
        return Width(*map(min, padded, self.widest))

    def width(self, rows: list[int]) -> Width:
        """Columns of a micro-batch of these rows."""
        return self.rounded(max(self.prompt[row] for row in rows), max(self.completion[row] for row in rows))

    def tokens(self, rows: list[int]) -> int:
        """Tokens of a micro-batch of these rows, padding included."""
        return len(rows) * self.width(rows).total

    def growing(self, rows: Iterable[int]) -> Iterator[int]:
        """Tokens of the first 1, 2, 3, … of `rows` together, padding included."""
        prompt = completion = 0
        for size, row in enumerate(rows, start=1):
            prompt, completion = max(prompt, self.prompt[row]), max(completion, self.completion[row])
            yield size * self.rounded(prompt, completion).total


Stretch = list[int]


def _filled(sizes: RowSizes, order: list[int], cap: int, at_most: int) -> list[Stretch] | None:
    """Cut `order` into stretches of at most `cap` tokens; `None` if that takes more than `at_most` of them."""
    stretches: list[Stretch] = []
    start = 0
    while start < len(order):
        taken = 0
        for tokens in sizes.growing(order[i] for i in range(start, len(order))):
            if tokens > cap:
                break
            taken += 1
        if taken == 0 or len(stretches) == at_most:
            return None
        stretches.append(order[start : start + taken])
        start += taken
    return stretches


def _best_cut(sizes: RowSizes, rows: Stretch) -> tuple[int, int]:
    """Tokens that cutting a stretch in two saves, and where; among equals the cut nearest to the middle."""
    front, back = list(sizes.growing(rows)), list(sizes.growing(reversed(rows)))[::-1]
    saved, _, cut_at = max(
        (front[-1] - front[i - 1] - back[i], -abs(i - len(rows) / 2), i) for i in range(1, len(rows))
    )
    return saved, cut_at


def _packed(sizes: RowSizes, order: list[int], micro_batches: int) -> list[Stretch]:
    low, high = 1, sizes.tokens(order)
    while low < high:
        cap = (low + high) // 2
        low, high = (low, cap) if _filled(sizes, order, cap, micro_batches) else (cap + 1, high)
    stretches = _filled(sizes, order, high, micro_batches)
    assert stretches is not None
    whole = [stretch for stretch in stretches if len(stretch) == 1]
    # By what a cut saves, then by rows; the counter only breaks ties
    queue: list[tuple[int, int, int, Stretch, int]] = []
    counter = count()

    def push(stretch: Stretch) -> None:
        if len(stretch) == 1:
            whole.append(stretch)
            return
        saved, cut_at = _best_cut(sizes, stretch)
        heapq.heappush(queue, (-saved, -len(stretch), next(counter), stretch, cut_at))

    for stretch in stretches:
        if len(stretch) > 1:
            push(stretch)
    while queue and len(queue) + len(whole) < micro_batches:
        *_, stretch, cut_at = heapq.heappop(queue)
        push(stretch[:cut_at])
        push(stretch[cut_at:])
    return sorted(whole + [entry[3] for entry in queue], key=lambda stretch: -sizes.tokens(stretch))


def pack(sizes: RowSizes, rows: list[int], micro_batches: int) -> list[list[int]]:
    """
    Deal rows to micro-batches: none is larger (in tokens, padding included) than an even deal of rows sorted by length
    needs, and all together are small.

    Sorted rows are cut into stretches. The smallest possible largest stretch is found by bisection; what micro-batches
    are left over then go where one more saves most. Done for rows sorted by completion and by whole length: the deal
    with fewer tokens is taken.

    Args:
        sizes ([`RowSizes`]):
            Lengths of all rows.
        rows (`list[int]`):
            Which rows.
        micro_batches (`int`):
            How many micro-batches there are.

    Returns:
        `list[list[int]]`: the largest first; fewer than `micro_batches` only if there are fewer rows.
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
    Give each rank its micro-batches. TRL gathers metrics by row, so that at any time all ranks must work on equally
    many rows: neighbours in length go to different ranks, in turn, and what is left over is filled up with rows
    without weight.

    Args:
        sizes ([`RowSizes`]):
            Lengths of all rows.
        rows (`list[int]`):
            Which rows.
        ranks (`int`):
            Processes.
        micro_batches (`int`):
            Micro-batches of each rank.
        homes (`list[int]`, *optional*):
            Ranks that rows must not leave, by row.

    Returns:
        `list[list[list[int]]]`: rows by rank and micro-batch, at least one in each; `FILLER` for a row without weight.
    """
    order = sorted(rows, key=lambda row: (-sizes.completion[row], -sizes.prompt[row]))
    if homes is None:
        teams = [order[start : start + ranks] for start in range(0, len(order), ranks)]  # a row for each rank
    else:
        by_rank = [[row for row in order if homes[row] == rank] for rank in range(ranks)]
        teams = [list(team) for team in zip_longest(*by_rank, fillvalue=FILLER)]
    of_teams = RowSizes(
        [max(sizes.prompt[row] for row in team if row != FILLER) for team in teams],
        [max(sizes.completion[row] for row in team if row != FILLER) for team in teams],
        sizes.multiple,
        sizes.widest,
    )
    packed = pack(of_teams, list(range(len(teams))), micro_batches)
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
    Stretches of a generation batch's micro-batches whose optimizer step is the same each time they are used.

    Args:
        length (`int`):
            Micro-batches of a generation batch.
        step (`int`):
            Micro-steps since training began, at the first use of the batch.
        until_update (`int`):
            Micro-steps until the next optimizer step ends.
        accumulation (`int`):
            Micro-steps of every optimizer step after that.
        iterations (`int`):
            How often the batch is used.
    """
    start = step - step % (length * iterations)
    ends = range(step + until_update, start + length * iterations, accumulation)
    cuts = sorted({0, length, *((end - start) % length for end in ends)})
    return list(pairwise(cuts))
