"""
The micro-batches in which selected rollouts travel to the loss.

TRL pads every micro-batch to the longest prompt and completion of the whole generation batch, and computes rows that
can't move the policy. Here the rows of one optimizer step are sorted by length and dealt again, over its micro-batches
and over the processes, so that all carry about equally many tokens; each micro-batch is cut to its own longest row;
rows that contribute nothing are left out, and copies inside a step become weights. The gradient stays TRL's: a row
never leaves the optimizer step that TRL dealt it to, and what is not exact for a loss is not done ([`exact_savings`]).
"""

import inspect
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from .exactness import ROW_MEAN_LOSSES, ExactSavings
from .packing import FEWEST_COLUMNS, FILLER, RowSizes, Width, deal, pack


MicroBatch = dict[str, Any]

# Under which a micro-batch carries its [`Fit`], and rows the number of the row they are a copy of
FIT, SOURCE_ROW = "fit", "source_row"
# A row without weight has no token in the loss. Its prompt may be cut, so that its ratios are made 1: an infinite one
# times a mask of 0 would not be 0
NEUTRAL = {"completion_mask": 0, "old_per_token_logps": 0, "importance_sampling_ratio": 1}


# Rows and their tensors


class Rows(NamedTuple):
    """
    What the deal depends on, by row.

    Args:
        prompt, completion (`torch.Tensor` of shape `(N,)`):
            Columns that the row needs.
        tokens (`torch.Tensor` of shape `(N,)`):
            Tokens in the loss.
        contributes (`torch.Tensor` of shape `(N,)`):
            1 where the row can move the policy.
        source (`torch.Tensor` of shape `(N,)`):
            Equal for copies of one row, −1 where there are none.
    """

    prompt: torch.Tensor
    completion: torch.Tensor
    tokens: torch.Tensor
    contributes: torch.Tensor
    source: torch.Tensor


def _needed(mask: torch.Tensor) -> torch.Tensor:
    """Columns `(N,)` up to the last 1 of each row of a mask `(N, T)`."""
    return (mask.bool() * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(dim=1)


def describe(batch: MicroBatch, skip_dead: bool) -> Rows:
    """
    Sizes of the rows of a micro-batch, and which of them the loss needs: those with a token in the loss and, if
    `skip_dead`, an advantage that is not exactly zero.
    """
    mask = batch["completion_mask"]
    loss_mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask
    contributes = loss_mask.any(dim=1)
    if skip_dead:
        advantages = batch["advantages"]
        live = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
        contributes = ((live != 0) & (loss_mask != 0)).any(dim=1)
    source = batch.get(SOURCE_ROW)
    return Rows(
        prompt=_needed(batch["prompt_mask"].flip(1)),
        completion=_needed(mask),
        tokens=loss_mask.sum(dim=1),
        contributes=contributes,
        source=torch.full_like(contributes, -1, dtype=torch.long) if source is None else source,
    )


def cut(batch: MicroBatch, old: Width, new: Width) -> MicroBatch:
    """Cut left padding of prompts and right padding of completions off every tensor of a micro-batch."""

    def narrowed(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        if name.startswith("prompt_"):
            return value[:, old.prompt - new.prompt :]
        if name.endswith("token_type_ids"):  # over prompt and completion
            return value[:, old.prompt - new.prompt : old.prompt + new.completion]
        if name.startswith(("pixel_", "image_", "spatial_")):
            return value
        return value[:, : new.completion] if value.size(1) == old.completion else value

    return {name: narrowed(name, value) for name, value in batch.items()}


def _width(batch: MicroBatch) -> Width:
    return Width(batch["prompt_ids"].size(1), batch["completion_ids"].size(1))


def padded(name: str, rows: torch.Tensor, width: Width, widest: Width) -> torch.Tensor:
    """A tensor of rows of a micro-batch of `width`, as it is in one of `widest`."""
    is_prompt = name.startswith("prompt_")
    if not is_prompt and not (rows.dim() == 2 and rows.size(1) == width.completion):
        return rows
    missing = widest.prompt - width.prompt if is_prompt else widest.completion - width.completion
    # A ratio of 1 is what TRL has in padding
    filler = 1 if name == "importance_sampling_ratio" else 0
    return nn.functional.pad(rows, (missing, 0) if is_prompt else (0, missing), value=filler)


def _joined(batches: list[MicroBatch], accelerator: Accelerator, widest: Width) -> MicroBatch:
    """The rows of several micro-batches, and of all ranks, in one."""
    first, width = batches[0], _width(batches[0])
    joined: MicroBatch = {}
    for name, value in first.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            joined[name] = value
            continue
        rows = torch.cat([batch[name] for batch in batches])
        if accelerator.num_processes > 1:
            rows = accelerator.gather(padded(name, rows, width, widest).contiguous())
        joined[name] = rows
    return joined


@dataclass(frozen=True)
class Fit:
    """
    What a micro-batch stands for, over all ranks.

    Args:
        scale (`float`):
            Factor on a loss that is a mean over rows: rows here over rows of TRL's micro-batch.
        tokens, rows, fillers (`int`):
            Loss tokens, rows, and rows that only keep collectives alive.
        computed_tokens, computed_rows, all_tokens, all_rows (`int`):
            Of the micro-batches it was dealt with, without and with the rows that were left out; copies count there.
        micro_batches (`int`):
            How many those are.
    """

    scale: float
    tokens: int
    rows: int
    fillers: int
    computed_tokens: int
    computed_rows: int
    all_tokens: int
    all_rows: int
    micro_batches: int


@dataclass
class SavedCompute:
    """
    What fitting changed, in totals over all processes.

    Args:
        token_slots, token_slots_trl (`int`):
            Tokens that forward and backward pass of the loss compute, padding included: here, and in TRL's
            micro-batches.
        useful_tokens, dead_slots (`int`):
            Of TRL's slots: tokens of rows that the loss needs, without padding; and slots of the other rows.
        rows, skipped_rows, merged_rows, regrouped_rows (`int`):
            Rows of the generation batches, and how many of them were left out, weighed as copies, and computed in
            another micro-batch than TRL's.
    """

    token_slots: int = 0
    token_slots_trl: int = 0
    useful_tokens: int = 0
    dead_slots: int = 0
    rows: int = 0
    skipped_rows: int = 0
    merged_rows: int = 0
    regrouped_rows: int = 0

    def __add__(self, other: "SavedCompute") -> "SavedCompute":
        return SavedCompute(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def share(self) -> float:
        """Share of TRL's token slots that are not computed."""
        return 1 - self.token_slots / max(self.token_slots_trl, 1)


def _merge_copies(joined: MicroBatch, rows: Rows) -> list[int]:
    """
    Rows to compute, each set of copies once with the sum of their advantages as its advantage: the policy terms of
    every loss of TRL's are homogeneous in a positive factor on the advantage.
    """
    contributing = rows.contributes.nonzero().flatten().tolist()
    copies: dict[tuple[int, int], list[int]] = {}
    for row in contributing:
        source = int(rows.source[row])
        # Where padding counts, copies are only equal if they have as much of it
        copies.setdefault((source if source >= 0 else -2 - row, int(rows.prompt[row])), []).append(row)
    for same in copies.values():
        if len(same) > 1:
            joined["advantages"][same[0]] *= len(same)
    return [same[0] for same in copies.values()]


def _take(joined: MicroBatch, rows: list[int]) -> MicroBatch:
    """
    Some of the rows. A `FILLER` is one without a token in the loss: a rank that has nothing left still takes part in
    every collective.
    """
    index = torch.tensor([max(row, 0) for row in rows], device=joined["completion_ids"].device)
    taken = {
        name: value[index] if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in joined.items()
    }
    fillers = torch.tensor([row == FILLER for row in rows], device=index.device)
    for name, value in NEUTRAL.items():
        if name in taken:
            taken[name][fillers] = value
    return taken


def fit_step(
    batches: list[MicroBatch],
    savings: ExactSavings,
    accelerator: Accelerator,
    loss_type: str,
    multiple: int,
    saved: SavedCompute,
) -> list[MicroBatch]:
    """
    Deal the micro-batches of one optimizer step anew. Called on every rank, with equally many micro-batches.

    Args:
        batches (`list[dict]`):
            TRL's micro-batches, all padded alike.
        savings ([`ExactSavings`]):
            What may be done.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
        loss_type (`str`):
            TRL's.
        multiple (`int`):
            Prompts and completions are padded to a multiple of this.
        saved ([`SavedCompute`]):
            Counts what was saved; changed in place.

    Returns:
        `list[dict]`: equally many micro-batches. Their rows carry TRL's tensors; [`Fit`] is under `"fit"`.
    """
    # Images stand in tensors and lists of their own, not one row a completion; some ranks may have none
    lists = sum(isinstance(value, list) for value in batches[0].values())
    has_images = bool(accelerator.gather(torch.tensor([lists], device=accelerator.device)).any())
    regroup = savings.regroup and not has_images
    trim_prompts = savings.trim_prompts and not has_images
    described = [describe(batch, skip_dead=savings.skip_dead and regroup) for batch in batches]
    local = torch.stack([torch.cat(column).long() for column in zip(*described, strict=True)], dim=1)  # (n, 5)
    local = nn.functional.pad(local, (0, 2))
    local[:, 5], local[:, 6] = _width(batches[0])
    gathered = accelerator.gather(local).cpu()
    rows = Rows(*gathered[:, :5].unbind(dim=1))
    widest = Width(int(gathered[:, 5].amax()), int(gathered[:, 6].amax()))
    saved.rows += len(gathered)
    slots, needed = gathered[:, 5] + gathered[:, 6], rows.contributes.bool()
    saved.token_slots_trl += int(slots.sum())
    saved.useful_tokens += int((rows.prompt + rows.completion)[needed].sum())
    saved.dead_slots += int(slots[~needed].sum())
    if not trim_prompts:
        rows = rows._replace(prompt=gathered[:, 5])
    sizes = RowSizes(rows.prompt.tolist(), rows.completion.tolist(), multiple, widest)
    ranks, per_rank = accelerator.num_processes, len(batches)
    per_batch = len(local) // per_rank  # rows of TRL's micro-batch
    if not regroup:
        return _cut_in_place(batches, sizes, per_batch, accelerator, saved)

    joined = _joined(batches, accelerator, widest)
    keep = _merge_copies(joined, rows) if savings.weigh_copies else rows.contributes.nonzero().flatten().tolist()
    saved.skipped_rows += len(gathered) - int(rows.contributes.sum())
    saved.merged_rows += int(rows.contributes.sum()) - len(keep)
    # Absolute positions count from the first column of the padding that a row's own rank has
    same_padding = trim_prompts or len(set(gathered[:, 5].tolist())) == 1
    homes = None if same_padding else [row // len(local) for row in range(len(gathered))]
    dealt = deal(sizes, keep, ranks, per_rank, homes)
    least = Width(1 if trim_prompts else widest.prompt, min(FEWEST_COLUMNS, widest.completion))
    fitted = []
    for i in range(per_rank):
        turn = [dealt[rank][i] for rank in range(ranks)]
        real = [[row for row in rank_rows if row != FILLER] for rank_rows in turn]
        columns = [sizes.width(rank_rows) if rank_rows else least for rank_rows in real]
        here = accelerator.process_index
        batch = cut(_take(joined, turn[here]), widest, columns[here])
        together = [row for rank_rows in real for row in rank_rows]
        saved.token_slots += sum(len(turn[0]) * width.total for width in columns)
        for rank, rank_rows in enumerate(real):
            saved.regrouped_rows += sum(
                (row // len(local), row % len(local) // per_batch) != (rank, i) for row in rank_rows
            )
        batch[FIT] = Fit(
            scale=len(turn[0]) / per_batch if loss_type in ROW_MEAN_LOSSES else 1.0,
            tokens=int(rows.tokens[together].sum()),
            rows=len(together),
            fillers=ranks * len(turn[0]) - len(together),
            computed_tokens=int(rows.tokens[keep].sum()),
            computed_rows=len(keep),
            all_tokens=int(rows.tokens.sum()),
            all_rows=len(gathered),
            micro_batches=per_rank,
        )
        fitted.append(batch)
    return fitted


def _cut_in_place(
    batches: list[MicroBatch], sizes: RowSizes, per_batch: int, accelerator: Accelerator, saved: SavedCompute
) -> list[MicroBatch]:
    """Every micro-batch keeps its rows and loses its padding."""
    fitted, per_rank = [], per_batch * len(batches)
    for i, batch in enumerate(batches):
        for rank in range(accelerator.num_processes):
            start = rank * per_rank + i * per_batch
            # The widest of a rank is what its own tensors have
            width = sizes.width(list(range(start, start + per_batch)))
            saved.token_slots += per_batch * width.total
            if rank == accelerator.process_index:
                fitted.append(cut(batch, _width(batch), Width(*map(min, width, _width(batch)))))
    return fitted


# Passes without gradient


def fitted_pass(forward: Callable[..., Any], trim_prompts: bool, multiple: int, *args: Any, **kwargs: Any) -> Any:
    """
    TRL's pass over a whole generation batch (old policy, reference), in as many batches as TRL makes, each of rows of
    like length and cut to its longest.

    Args:
        forward (`Callable`):
            TRL's `_get_per_token_logps_and_entropies`, bound to a trainer; `args` and `kwargs` are its arguments.
        trim_prompts (`bool`):
            Whether left padding may be cut.
        multiple (`int`):
            Prompts and completions are padded to a multiple of this.

    Returns:
        What `forward` returns, with 0 in padding as there. Where it is given images or is asked for an auxiliary loss,
        it runs as it is. Further entries after TRL's three are tensors `(N, T + 1)`, one column for each state.
    """
    given = {k: v for k, v in inspect.signature(forward).bind(*args, **kwargs).arguments.items() if v is not None}
    by_row = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    known = {*by_row, "model", "logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss"}
    ids, batch_size = given["input_ids"], given.get("batch_size")
    if not batch_size or given.keys() - known or given.get("compute_aux_loss"):
        return forward(*args, **kwargs)
    old = Width(ids.size(1) - given["logits_to_keep"], given["logits_to_keep"])
    mask = given["attention_mask"]
    prompt = _needed(mask[:, : old.prompt].flip(1)).tolist() if trim_prompts else [old.prompt] * len(ids)
    sizes = RowSizes(prompt, _needed(mask[:, old.prompt :]).tolist(), multiple, old)
    chunks = pack(sizes, list(range(len(ids))), -(-len(ids) // batch_size))
    found: list[torch.Tensor | None] = []  # log-probabilities, entropies, auxiliary loss (none here), and the others
    for rows in chunks:
        width, index = sizes.width(rows), torch.tensor(rows, device=ids.device)
        columns = slice(old.prompt - width.prompt, old.prompt + width.completion)
        cut_inputs = {name: given[name][index][:, columns] for name in by_row if name in given}
        others = {name: given[name] for name in ("model", "compute_entropy") if name in given}
        result = forward(**others, **cut_inputs, logits_to_keep=width.completion)
        if not found:
            cut_off = old.completion - width.completion
            found = [None if part is None else part.new_zeros(len(ids), part.size(1) + cut_off) for part in result]
        for whole, values in zip(found, result, strict=True):
            if whole is not None:
                whole[index, : values.size(1)] = values
    return tuple(found)
