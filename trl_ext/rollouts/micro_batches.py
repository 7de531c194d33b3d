"""
The micro-batches in which selected rollouts enter the loss.

TRL pads every micro-batch to the longest prompt and completion of the whole generation batch, and computes rows that
can't move the policy. Here the rows of one optimizer step are sorted by length and dealt again over its micro-batches
and over the processes, so that all micro-batches have about the same number of tokens. Each micro-batch is cut to its
own longest row, rows that contribute nothing are left out, and copies within a step become weights. The gradient is
TRL's: a row never leaves the optimizer step to which TRL dealt it, and nothing is done that is not exact for the loss
([`exact_savings`]).
"""

import inspect
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from .exactness import ROW_MEAN_LOSSES, ExactSavings
from .packing import FEWEST_COLUMNS, FILLER, RowSizes, Width, deal, pack
from .prefix_trees import WORTH
from .shared_pass import Sharing
from .tree_packing import TreeSizes, deal_trees


MicroBatch = dict[str, Any]

# Keys of a micro-batch: its [`Fit`], and for each row the number of the row that it is a copy of
FIT, SOURCE_ROW = "fit", "source_row"
# For [`prompt_keys`]: an odd number without structure
KEY_BASE = 0x5851F42D4C957F2D
# Values that make a filler of a row: no token is in the loss. Ratios become 1 because the filler's prompt may be cut:
# an infinite ratio times a mask of 0 would not be 0.
NEUTRAL = {
    "completion_mask": 0,
    "old_per_token_logps": 0,
    "sampling_per_token_logps": 0,
    "importance_sampling_ratio": 1,
}


# Rows and their tensors


class RowSummary(NamedTuple):
    """
    What of each row decides to which micro-batch it is dealt.

    Args:
        prompt, completion (`torch.Tensor` of shape `(N,)`):
            Columns that the row needs.
        tokens (`torch.Tensor` of shape `(N,)`):
            Number of its tokens in the loss.
        contributes (`torch.Tensor` of shape `(N,)`):
            1 if the row can move the policy.
        source (`torch.Tensor` of shape `(N,)`):
            The same number for all copies of a row; −1 if nothing was copied.
        prompt_key (`torch.Tensor` of shape `(N,)`):
            The same number for the same prompt ([`prompt_keys`]).
    """

    prompt: torch.Tensor
    completion: torch.Tensor
    tokens: torch.Tensor
    contributes: torch.Tensor
    source: torch.Tensor
    prompt_key: torch.Tensor


def prompt_keys(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    A number `(N,)` for each prompt, from ids and mask `(N, P)` with padding on the left: the same for the same tokens,
    however wide the padding is. Different prompts have different numbers, but for an accident in 2⁶⁴.
    """
    # A polynomial in the ids, modulo 2⁶⁴, read from the right end, where all prompts end
    powers = torch.full((ids.size(1),), KEY_BASE, device=ids.device).cumprod(dim=0).flip(0)
    return ((ids + 1) * mask * powers).sum(dim=1)


def _needed(mask: torch.Tensor) -> torch.Tensor:
    """Columns `(N,)` up to the last 1 of each row of a mask `(N, T)`."""
    return (mask.bool() * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(dim=1)


def describe(batch: MicroBatch, skip_dead: bool) -> RowSummary:
    """
    Sizes of the rows of a micro-batch, and which of them the loss needs: those with a token in the loss and, if
    `skip_dead`, with an advantage that is not exactly zero.
    """
    mask = batch["completion_mask"]
    loss_mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask
    contributes = loss_mask.any(dim=1)
    if skip_dead:
        advantages = batch["advantages"]
        per_token = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
        contributes = ((per_token != 0) & (loss_mask != 0)).any(dim=1)
    source = batch.get(SOURCE_ROW)
    return RowSummary(
        prompt=_needed(batch["prompt_mask"].flip(1)),
        completion=_needed(mask),
        tokens=loss_mask.sum(dim=1),
        contributes=contributes,
        source=torch.full_like(contributes, -1, dtype=torch.long) if source is None else source,
        prompt_key=prompt_keys(batch["prompt_ids"], batch["prompt_mask"]),
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
    """The tensor `name` of a micro-batch of `width`, padded to the columns of a micro-batch of width `widest`."""
    is_prompt = name.startswith("prompt_")
    if not is_prompt and not (rows.dim() == 2 and rows.size(1) == width.completion):
        return rows
    missing = widest.prompt - width.prompt if is_prompt else widest.completion - width.completion
    # In padding, TRL's ratios are 1
    value = 1 if name == "importance_sampling_ratio" else 0
    return nn.functional.pad(rows, (missing, 0) if is_prompt else (0, missing), value=value)


def _joined(batches: list[MicroBatch], accelerator: Accelerator, widest: Width) -> MicroBatch:
    """The rows of several micro-batches of all ranks, in one micro-batch."""
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
    What a fitted micro-batch stands for, counted over all ranks. [`restate_loss_metrics`] needs it.

    Args:
        scale (`float`):
            Factor on a loss that is a mean over rows: rows of this micro-batch over rows of TRL's.
        tokens, rows, fillers (`int`):
            Of this micro-batch: tokens in the loss, rows, and rows that are only there to keep collectives alive.
        computed_tokens, computed_rows (`int`):
            Of all micro-batches that were dealt together: tokens in the loss, and rows, of what is computed.
        all_tokens, all_rows (`int`):
            The same including rows that were left out and all copies.
        micro_batches (`int`):
            Number of micro-batches that were dealt together, on each rank.
        first (`bool`):
            Whether this is the first of them.
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
    first: bool = True


@dataclass
class SavedCompute:
    """
    How much less is computed than by TRL, in totals over all processes.

    A *token slot* is a place in a micro-batch, rows × columns, whether it holds a token or padding.

    Args:
        token_slots, token_slots_trl (`int`):
            Token slots that the forward and backward passes of the loss compute: here, and in TRL's micro-batches.
        useful_tokens (`int`):
            Token slots of TRL's that hold tokens of rows which the loss needs.
        dead_slots (`int`):
            Token slots of TRL's that belong to the other rows, including padding.
        rows (`int`):
            Rows of the generation batches.
        shared_slots (`int`):
            Token slots that are not computed because rows share their prompt.
        repeated_prompts (`int`):
            Token slots of TRL's that hold a prompt of a row which the loss needs, where another such row of the same
            optimizer step has the same prompt. They are among the useful tokens.
        skipped_rows, merged_rows, regrouped_rows (`int`):
            How many of them were left out, were replaced by a copy with a weight, and were computed in a different
            micro-batch than TRL's.
    """

    token_slots: int = 0
    token_slots_trl: int = 0
    useful_tokens: int = 0
    dead_slots: int = 0
    rows: int = 0
    skipped_rows: int = 0
    merged_rows: int = 0
    regrouped_rows: int = 0
    shared_slots: int = 0
    repeated_prompts: int = 0

    def __add__(self, other: "SavedCompute") -> "SavedCompute":
        return SavedCompute(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def share(self) -> float:
        """Share of TRL's token slots that are not computed."""
        return 1 - self.token_slots / max(self.token_slots_trl, 1)

    @property
    def shares(self) -> dict[str, float]:
        """The parts of [`share`]: rows that can't move the policy, prompts that rows share, and what is left."""
        whole = max(self.token_slots_trl, 1)
        rows, prompts = (self.dead_slots if self.skipped_rows else 0) / whole, self.shared_slots / whole
        return {"by_dead_rows": rows, "by_shared_prompts": prompts, "by_padding": self.share - rows - prompts}


def _merge_copies(joined: MicroBatch, rows: RowSummary) -> list[int]:
    """
    The rows to compute, one of each set of copies. Its advantage is multiplied by the number of copies, in place: the
    policy terms of all losses of TRL are homogeneous in a positive factor on the advantage.
    """
    contributing = rows.contributes.nonzero().flatten().tolist()
    copies: dict[tuple[int, int, int], list[int]] = {}
    for row in contributing:
        source = int(rows.source[row])
        # If padding changes the model's outputs, rows are copies of each other only if they have the same padding
        columns = int(rows.prompt[row]), int(rows.completion[row])
        copies.setdefault((source if source >= 0 else -2 - row, *columns), []).append(row)
    for same in copies.values():
        if len(same) > 1:
            joined["advantages"][same[0]] *= len(same)
    return [same[0] for same in copies.values()]


def _take(joined: MicroBatch, rows: list[int]) -> MicroBatch:
    """
    Some of the rows. In place of a `FILLER` stands a row without a token in the loss, so that a rank that has no row
    left still takes part in every collective.
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


# One optimizer step


@dataclass(frozen=True)
class _StepRows:
    """
    The rows of one optimizer step on all ranks. They are numbered in TRL's order: by rank, then by micro-batch.

    Args:
        summary ([`RowSummary`]):
            Of all rows.
        columns (`torch.Tensor` of shape `(N, 2)`):
            For each row, the columns of prompts and completions in the tensors of its rank.
        ranks, micro_batches (`int`):
            Number of ranks, and of micro-batches on each.
    """

    summary: RowSummary
    columns: torch.Tensor
    ranks: int
    micro_batches: int

    @classmethod
    def gathered(cls, batches: list[MicroBatch], skip_dead: bool, accelerator: Accelerator) -> "_StepRows":
        """From the micro-batches of this rank. Called on every rank."""
        described = [describe(batch, skip_dead) for batch in batches]
        local = torch.stack([torch.cat(column).long() for column in zip(*described, strict=True)], dim=1)  # (n, 6)
        local = nn.functional.pad(local, (0, 2))
        local[:, -2], local[:, -1] = _width(batches[0])
        gathered = accelerator.gather(local).cpu()
        summary = RowSummary(*gathered[:, :-2].unbind(dim=1))
        return cls(summary, gathered[:, -2:], accelerator.num_processes, len(batches))

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def widest(self) -> Width:
        """Columns that hold the rows of all ranks."""
        return Width(int(self.columns[:, 0].amax()), int(self.columns[:, 1].amax()))

    @property
    def rows_per_rank(self) -> int:
        return len(self) // self.ranks

    @property
    def rows_per_batch(self) -> int:
        """Rows of one of TRL's micro-batches."""
        return self.rows_per_rank // self.micro_batches

    def place(self, row: int) -> tuple[int, int]:
        """The rank and the micro-batch to which TRL dealt a row."""
        return row // self.rows_per_rank, row % self.rows_per_rank // self.rows_per_batch

    def count_trls(self, saved: SavedCompute) -> None:
        """Add to `saved` what TRL computes."""
        slots, needed = self.columns.sum(dim=1), self.summary.contributes.bool()
        saved.rows += len(self)
        saved.token_slots_trl += int(slots.sum())
        saved.useful_tokens += int((self.summary.prompt + self.summary.completion)[needed].sum())
        saved.dead_slots += int(slots[~needed].sum())
        prompts, keys = self.summary.prompt[needed], self.summary.prompt_key[needed]
        once = dict(zip(keys.tolist(), prompts.tolist(), strict=True))
        saved.repeated_prompts += int(prompts.sum()) - sum(once.values())

    def count_ours(
        self,
        i: int,
        rows_by_rank: list[list[int]],
        widths: list[Width],
        saved: SavedCompute,
        trees: TreeSizes | None,
    ) -> None:
        """Add to `saved` what is computed in micro-batch `i`, which has these rows and widths on the ranks."""
        for rank, (rows, width) in enumerate(zip(rows_by_rank, widths, strict=True)):
            slots = len(rows) * width.total
            saved.token_slots += slots
            real = [row for row in rows if row != FILLER]
            if trees is not None and real:
                cost, tokens = trees.shared(real)
                if cost <= WORTH * trees.unshared(real):
                    saved.token_slots -= slots - tokens
                    saved.shared_slots += slots - tokens
            saved.regrouped_rows += sum(self.place(row) != (rank, i) for row in rows if row != FILLER)

    def fit(self, i: int, rows_by_rank: list[list[int]], computed: list[int], loss_type: str) -> Fit:
        """
        The [`Fit`] of micro-batch `i`, which has these rows on the ranks, where `computed` are the rows that are
        computed in all micro-batches of the step.
        """
        real = [row for rows in rows_by_rank for row in rows if row != FILLER]
        size, tokens = len(rows_by_rank[0]), self.summary.tokens
        return Fit(
            scale=size / self.rows_per_batch if loss_type in ROW_MEAN_LOSSES else 1.0,
            tokens=int(tokens[real].sum()),
            rows=len(real),
            fillers=self.ranks * size - len(real),
            computed_tokens=int(tokens[computed].sum()),
            computed_rows=len(computed),
            all_tokens=int(tokens.sum()),
            all_rows=len(self),
            micro_batches=self.micro_batches,
            first=i == 0,
        )


def fit_step(
    batches: list[MicroBatch],
    savings: ExactSavings,
    accelerator: Accelerator,
    loss_type: str,
    multiple: int,
    saved: SavedCompute,
    sharing: Sharing | None = None,
) -> list[MicroBatch]:
    """
    Deal the rows of one optimizer step again. Must be called on every rank, with the same number of micro-batches.

    Args:
        batches (`list[dict]`):
            TRL's micro-batches, all padded to the same columns.
        savings ([`ExactSavings`]):
            The savings that may be used.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
        loss_type (`str`):
            TRL's `loss_type`.
        multiple (`int`):
            Prompts and completions are padded to a multiple of this.
        saved ([`SavedCompute`]):
            What was saved is added to it, in place.
        sharing ([`~trl_ext.rollouts.shared_pass.Sharing`], *optional*):
            What passes share. Rows with the same prompt then meet in a micro-batch where that is cheaper.

    Returns:
        `list[dict]`: the same number of micro-batches. Their rows have TRL's tensors. If rows were dealt again, the
        [`Fit`] of a micro-batch is under `"fit"`.
    """
    # Images stand in tensors and lists of their own, without one row for each completion. Some ranks may have none.
    lists = sum(isinstance(value, list) for value in batches[0].values())
    has_images = bool(accelerator.gather(torch.tensor([lists], device=accelerator.device)).any())
    regroup = savings.regroup and not has_images
    step = _StepRows.gathered(batches, savings.skip_dead and regroup, accelerator)
    step.count_trls(saved)
    savings = savings.for_width(step.widest.total)
    trim_prompts = savings.trim_prompts and not has_images
    kept = {"prompt": not trim_prompts, "completion": not savings.trim_completions}
    for i, name in enumerate(kept):
        if kept[name]:
            step = replace(step, summary=step.summary._replace(**{name: step.columns[:, i]}))
    sizes = RowSizes(step.summary.prompt.tolist(), step.summary.completion.tolist(), multiple, step.widest)
    if not regroup:
        return _cut_in_place(batches, step, sizes, accelerator, saved)

    joined = _joined(batches, accelerator, step.widest)
    contributing = step.summary.contributes.nonzero().flatten().tolist()
    computed = _merge_copies(joined, step.summary) if savings.weigh_copies else contributing
    saved.skipped_rows += len(step) - len(contributing)
    saved.merged_rows += len(contributing) - len(computed)
    # Where padding changes the model's outputs and ranks have different padding, rows must stay on their rank
    padding = step.columns[:, list(kept.values())]  # (N, 0) to (N, 2)
    same_padding = bool((padding == padding[0]).all())
    homes = None if same_padding else [step.place(row)[0] for row in range(len(step))]
    dealt = deal(sizes, computed, step.ranks, step.micro_batches, homes)
    trees = None if sharing is None else TreeSizes.of(sizes, step.summary.prompt_key.tolist(), sharing)
    if trees is not None and computed and not any(kept.values()):
        dealt = deal_trees(trees, computed, step.ranks, step.micro_batches, dealt) or dealt
    only_fillers = Width(
        step.widest.prompt if kept["prompt"] else 1,
        step.widest.completion if kept["completion"] else min(FEWEST_COLUMNS, step.widest.completion),
    )
    fewest_rows = min(savings.fewest_rows, step.rows_per_batch)
    here, fitted = accelerator.process_index, []
    for i in range(step.micro_batches):
        rows_by_rank = [of_rank[i] + [FILLER] * (fewest_rows - len(of_rank[i])) for of_rank in dealt]
        real = [[row for row in rows if row != FILLER] for rows in rows_by_rank]
        widths = [sizes.width(rows) if rows else only_fillers for rows in real]
        step.count_ours(i, rows_by_rank, widths, saved, trees)
        batch = cut(_take(joined, rows_by_rank[here]), step.widest, widths[here])
        batch[FIT] = step.fit(i, rows_by_rank, computed, loss_type)
        fitted.append(batch)
    return fitted


def _cut_in_place(
    batches: list[MicroBatch], step: _StepRows, sizes: RowSizes, accelerator: Accelerator, saved: SavedCompute
) -> list[MicroBatch]:
    """Every micro-batch keeps its rows and loses its padding."""
    fitted, size = [], step.rows_per_batch
    for i, batch in enumerate(batches):
        for rank in range(step.ranks):
            start = rank * step.rows_per_rank + i * size
            width = sizes.width(list(range(start, start + size)))
            saved.token_slots += size * width.total
            if rank == accelerator.process_index:
                # A rank's own tensors may have fewer columns than the widest
                fitted.append(cut(batch, _width(batch), Width(*map(min, width, _width(batch)))))
    return fitted


# Passes without gradient


def _tree_chunks(trees: TreeSizes, chunks: list[list[int]]) -> list[list[int]]:
    """The rows of `chunks`, with those of a prompt together where that is cheaper. No chunk is larger than before."""
    rows = [row for chunk in chunks for row in chunk]
    dealt = deal_trees(trees, rows, 1, len(chunks), [chunks])
    if dealt is None:
        return chunks
    return [chunk for chunk in dealt[0] if chunk != [FILLER]]


def fitted_pass(
    forward: Callable[..., Any],
    savings: ExactSavings,
    multiple: int,
    *args: Any,
    sharing: Sharing | None = None,
    **kwargs: Any,
) -> Any:
    """
    TRL's pass over a whole generation batch (of the old policy or the reference), in the same number of batches as
    TRL's, but each of rows of similar length and cut to its longest row.

    Args:
        forward (`Callable`):
            TRL's `_get_per_token_logps_and_entropies`, bound to a trainer; `args` and `kwargs` are its arguments.
        savings ([`ExactSavings`]):
            Says which padding may be cut.
        multiple (`int`):
            Prompts and completions are padded to a multiple of this.
        sharing ([`~trl_ext.rollouts.shared_pass.Sharing`], *optional*):
            What passes share, if their number needn't be the same on all ranks.

    Returns:
        What `forward` returns, with 0 in padding as TRL has it. With images, if an auxiliary loss is asked for, or if
        padding is kept on both sides, `forward` is called unchanged. Any tensors after TRL's three have shape
        `(N, T + 1)`, one column for each state.
    """
    given = {k: v for k, v in inspect.signature(forward).bind(*args, **kwargs).arguments.items() if v is not None}
    by_row = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    known = {*by_row, "model", "logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss"}
    ids, batch_size = given["input_ids"], given.get("batch_size")
    if not batch_size or given.keys() - known or given.get("compute_aux_loss"):
        return forward(*args, **kwargs)
    old = Width(ids.size(1) - given["logits_to_keep"], given["logits_to_keep"])
    savings = savings.for_width(old.total)
    if not savings.trim_completions:
        return forward(*args, **kwargs)
    mask = given["attention_mask"]
    prompt = _needed(mask[:, : old.prompt].flip(1)).tolist() if savings.trim_prompts else [old.prompt] * len(ids)
    sizes = RowSizes(prompt, _needed(mask[:, old.prompt :]).tolist(), multiple, old)
    chunks = pack(sizes, list(range(len(ids))), -(-len(ids) // batch_size))
    if sharing is not None:
        keys = prompt_keys(ids[:, : old.prompt], mask[:, : old.prompt]).tolist()
        chunks = _tree_chunks(TreeSizes.of(sizes, keys, sharing), chunks)
    # Log-probabilities, entropies, auxiliary loss (`None` here), and any further tensors
    whole: list[torch.Tensor | None] = []
    for chunk in chunks:
        # Twice the same row, where one is too few
        rows = chunk * 2 if len(chunk) < min(savings.fewest_rows, batch_size) else chunk
        width, index = sizes.width(rows), torch.tensor(rows, device=ids.device)
        columns = slice(old.prompt - width.prompt, old.prompt + width.completion)
        cut_inputs = {name: given[name][index][:, columns] for name in by_row if name in given}
        others = {name: given[name] for name in ("model", "compute_entropy") if name in given}
        result = forward(**others, **cut_inputs, logits_to_keep=width.completion)
        if not whole:
            cut_off = old.completion - width.completion
            whole = [None if part is None else part.new_zeros(len(ids), part.size(1) + cut_off) for part in result]
        for target, values in zip(whole, result, strict=True):
            if target is not None:
                target[index, : values.size(1)] = values
    return tuple(whole)
