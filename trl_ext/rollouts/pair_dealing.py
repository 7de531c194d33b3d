"""
Deals the preference pairs of an optimizer step to its micro-batches anew, so that pairs with the same prompt meet in a
pass, which computes the prompt once, and pairs of about the same length, which need little padding.

Every micro-batch keeps its number of pairs, and all must have equally many: the mean over the micro-batches of means
over their pairs is then the mean over the pairs of the step, whoever is in which. Nothing crosses processes.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from .prefix_trees import WORTH, packed_rows
from .shared_pass import Sharing


# Losses of TRL's DPO that are a mean over the pairs of a micro-batch, of numbers that depend on one pair each
PAIR_MEAN_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("discopop", "sigmoid_norm"),
)
# Those that sort the log-ratios of a micro-batch
SORTING_LOSSES = ("aot", "aot_unpaired")
# Those that depend on which pairs are together in a micro-batch: one more divides by its tokens
WHOLE_BATCH_LOSSES = (*SORTING_LOSSES, "sft")
# Tensors of a micro-batch of B pairs: `(2B, T)`, all chosen before all rejected, and `(B,)`. The last one is ours.
ROW_KEYS = ("input_ids", "attention_mask", "completion_mask")
WEIGHTS = "pair_weights"
PAIR_KEYS = ("ref_chosen_logps", "ref_rejected_logps", WEIGHTS)


def deal_pairs(
    prompts: Sequence[Hashable], prompt_sizes: Sequence[int], sizes: Sequence[int], count: int
) -> list[list[int]]:
    """
    Deal pairs to micro-batches of `count`.

    Args:
        prompts (`Sequence[Hashable]`):
            For each pair its prompt.
        prompt_sizes, sizes (`Sequence[int]`):
            Tokens of each pair's prompt, and of both of its completions.
        count (`int`):
            Pairs of a micro-batch. The number of pairs is a multiple of it.

    Returns:
        `list[list[int]]`: the pairs of each micro-batch, the longest first.
    """
    by_prompt: dict[Hashable, list[int]] = defaultdict(list)
    for pair in sorted(range(len(prompts)), key=lambda pair: -sizes[pair]):
        by_prompt[prompts[pair]].append(pair)

    def tokens(unit: list[int]) -> int:
        return prompt_sizes[unit[0]] + sum(sizes[pair] for pair in unit)

    whole = by_prompt.values()
    units = [unit[start : start + count] for unit in whole for start in range(0, len(unit), count)]
    dealt = []
    while units:
        units.sort(key=lambda unit: -tokens(unit))
        batch: list[int] = []
        while len(batch) < count:
            room = count - len(batch)
            fitting = next((i for i, unit in enumerate(units) if len(unit) <= room), None)
            if fitting is not None:
                batch += units.pop(fitting)
            else:  # all that is left is larger
                smallest = min(range(len(units)), key=lambda i: len(units[i]))
                batch, units[smallest] = batch + units[smallest][:room], units[smallest][room:]
        dealt.append(sorted(batch))
    return dealt


class _Step:
    """
    The micro-batches of an optimizer step as one, padded alike.

    Args:
        batches (`list[dict[str, torch.Tensor]]`):
            TRL's, which [`can_be_dealt`].
    """

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self.count = len(batches[0]["input_ids"]) // 2
        self.columns = max(batch["input_ids"].size(1) for batch in batches)
        self.pairs = {name: torch.cat([batch[name] for batch in batches]) for name in PAIR_KEYS if name in batches[0]}
        self.rows = {}  # (2, pairs, T), chosen and rejected
        for name in ROW_KEYS:
            padded = [self._padded(batch[name]).unflatten(0, (2, -1)) for batch in batches]
            self.rows[name] = torch.cat(padded, dim=1)
        mask, answers = self.rows["attention_mask"].cpu(), self.rows["completion_mask"].cpu()
        self.sizes = mask.sum(dim=2)  # (2, pairs)
        self.prompt_sizes = ((mask == 1) & (answers == 0)).sum(dim=2)[0].tolist()
        self.texts = self.rows["input_ids"].cpu()

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        # With token 0, which nothing sees
        return nn.functional.pad(rows, (0, self.columns - rows.size(1)))

    def texts_of(self, pairs: list[int]) -> list[torch.Tensor]:
        """The rows of these pairs without padding."""
        return [self.texts[half, pair, : self.sizes[half, pair]] for half in (0, 1) for pair in pairs]

    def columns_of(self, pairs: list[int], multiple: int) -> int:
        """Columns of a micro-batch of these pairs."""
        longest = int(self.sizes[:, pairs].max())
        return min(-(-longest // multiple) * multiple, self.columns)

    def batch(self, pairs: list[int], multiple: int) -> dict[str, torch.Tensor]:
        """A micro-batch of these pairs."""
        columns = self.columns_of(pairs, multiple)
        index = torch.tensor(pairs, device=self.rows["input_ids"].device)
        rows = {name: values[:, index, :columns].flatten(0, 1) for name, values in self.rows.items()}
        return rows | {name: values[index] for name, values in self.pairs.items()}

    def cost(self, pairs: list[int], columns: int, sharing: Sharing) -> float:
        """Of a pass over these pairs in this many columns, or packed, if that costs less."""
        rows = self.texts_of(pairs)
        packed = packed_rows(rows, sharing.cost, sharing.fewest, sharing.multiple)
        return min(sharing.cost.of(len(rows), columns), sharing.cost.of(len(packed.segments), packed.width))


def can_be_dealt(batches: Sequence[dict[str, Any]], full_width_from: int | None) -> bool:
    """
    Whether the micro-batches of an optimizer step may exchange pairs: several, of equally many pairs each, with no
    tensors but those named here, and padding on the right only, whose width no output depends on.
    """
    if len(batches) < 2 or any(batch.keys() != batches[0].keys() for batch in batches):
        return False
    if not set(ROW_KEYS) <= batches[0].keys() <= {*ROW_KEYS, *PAIR_KEYS}:
        return False
    masks = [batch["attention_mask"] for batch in batches]
    if len({len(mask) for mask in masks}) > 1 or len(masks[0]) < 4:
        return False
    if full_width_from is not None and max(mask.size(1) for mask in masks) >= full_width_from:
        return False
    return all(bool((mask[:, 1:] <= mask[:, :-1]).all() and mask[:, :1].all()) for mask in masks)


def dealt_anew(batches: list[dict[str, Any]], sharing: Sharing) -> list[dict[str, Any]]:
    """
    The micro-batches of an optimizer step with their pairs dealt anew, if that is exact (for a loss in
    `PAIR_MEAN_LOSSES`) and cheaper; otherwise these.

    Args:
        batches (`list[dict[str, torch.Tensor]]`):
            TRL's.
        sharing ([`~trl_ext.rollouts.shared_pass.Sharing`]):
            What passes share; it counts what was dealt.
    """
    if not can_be_dealt(batches, sharing.full_width_from):
        return batches
    step = _Step(batches)
    count, pairs = step.count, range(len(batches) * step.count)
    prompts = [tuple(step.texts[0, pair, : step.prompt_sizes[pair]].tolist()) for pair in pairs]
    answers = [int(step.sizes[:, pair].sum()) - 2 * step.prompt_sizes[pair] for pair in pairs]
    dealt = deal_pairs(prompts, step.prompt_sizes, answers, count)
    given = [list(pairs[i : i + count]) for i in pairs[::count]]
    before = sum(step.cost(of, batch["input_ids"].size(1), sharing) for of, batch in zip(given, batches, strict=True))
    after = sum(step.cost(of, step.columns_of(of, sharing.multiple), sharing) for of in dealt)
    if after > (1 if sharing.always else WORTH) * before:
        return batches
    sharing.dealt_steps += 1
    sharing.met_pairs += sum(len(of) - len({prompts[pair] for pair in of}) for of in dealt)
    return [step.batch(of, sharing.multiple) for of in dealt]
