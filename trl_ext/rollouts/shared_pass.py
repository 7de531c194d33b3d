"""
A pass in which rows that begin with the same tokens compute them once. It stands between TRL and the model: TRL calls
it as it would call the model, with padded rows, and gets the log-probabilities of padded rows back.

There are two constructions, and a pass takes the cheapest by [`~trl_ext.rollouts.prefix_trees.Cost`]:

- *packed*: rows lie behind each other in packed rows ([`~trl_ext.rollouts.prefix_trees`]), under a mask. One call of
  the model, as without sharing, so that it works under any engine and with gradient checkpointing.
- *cached*: each prompt is computed once; its keys and values are repeated for its completions, and gradients flow
  through them. No mask, but two calls of the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .kept_states import ActorCriticOutput, KeptStates, picked
from .prefix_exactness import Window, can_repeat_cache
from .prefix_trees import FEWEST_POSSIBLE, FEWEST_SHARED, WORTH, Cost, PackedRows, packed_rows


# Bytes of the masks of a packed pass, in booleans, unless the mask of the padded rows is as large
MASK_BUDGET = 2**28
# What TRL passes to a model that reads text alone
TEXT_INPUTS = {"input_ids", "attention_mask", "labels", "fused_lm_head"}
# Fields of TRL's output with one number for each token
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
IGNORED = -100


@dataclass
class Sharing:
    """
    What may be shared in the passes of a trainer, and what was.

    Args:
        cost ([`~trl_ext.rollouts.prefix_trees.Cost`]):
            Of computing, for the model.
        attention (`str`, *optional*):
            `attn_implementation` of the models.
        pack, cache (`bool`):
            Whether the constructions may be used.
        always (`bool`):
            Share whatever can be shared, at any cost.
        multiple (`int`):
            Packed rows are padded to a multiple of this.
        window ([`~trl_ext.rollouts.prefix_exactness.Window`], *optional*):
            Sliding window of the models. If they can't be given a mask for it, longer rows are not shared.
        full_width_from (`int`, *optional*):
            Columns from which on a model's outputs depend on the width of the batch: wider ones are not shared.

    Attributes:
        passes, packed_passes, cached_passes (`int`):
            Passes of this process with prompts that could be looked at, and how many of them were shared how.
        token_slots, token_slots_unshared (`int`):
            Tokens of these passes including padding, as computed and as without sharing.
        dealt_steps, met_pairs (`int`):
            Optimizer steps whose preference pairs were dealt to micro-batches anew, and the pairs that came into one
            with another pair of their prompt there.
    """

    cost: Cost
    attention: str | None = "sdpa"
    pack: bool = True
    cache: bool = False
    always: bool = False
    multiple: int = 1
    window: Window | None = None
    full_width_from: int | None = None
    passes: int = field(default=0, init=False)
    packed_passes: int = field(default=0, init=False)
    cached_passes: int = field(default=0, init=False)
    token_slots: int = field(default=0, init=False)
    token_slots_unshared: int = field(default=0, init=False)
    dealt_steps: int = field(default=0, init=False)
    met_pairs: int = field(default=0, init=False)

    @property
    def any_length(self) -> bool:
        """Whether passes share the prompts of rows of any length, so that it pays to bring them together."""
        return self.pack and (self.window is None or self.window.masks is not None)

    @property
    def fewest(self) -> int:
        """Shared tokens that are worth a segment of their own."""
        return FEWEST_POSSIBLE if self.always else FEWEST_SHARED

    def window_within(self, longest: int) -> Window | None:
        """The window, if it is shorter than the longest row."""
        return self.window if self.window is not None and self.window.tokens < longest else None

    def may_share(self, sizes: Sequence[int], columns: int) -> bool:
        """Whether rows of these sizes, padded to so many columns, may share what they have in common."""
        window = self.window_within(max(sizes))
        too_long = window is not None and window.masks is None
        too_wide = self.full_width_from is not None and columns >= self.full_width_from
        return not (min(sizes) == 0 or len(sizes) == 1 or too_long or too_wide)

    def packed(self, rows: Sequence[torch.Tensor], columns: int) -> PackedRows | None:
        """
        Rows that [`may_share`] allows, in packed rows; `None` if they may not be packed, or the mask would be too
        large.

        Args:
            rows (`Sequence[torch.Tensor]`):
                Token ids of each row, without padding, on the CPU.
            columns (`int`):
                Of the padded rows.
        """
        if not self.pack:
            return None
        packed = packed_rows(rows, self.cost, self.fewest, self.multiple)
        window = self.window_within(max(map(len, rows)))
        masks = 2 if window is not None and window.masks == "by_layer_type" else 1
        # Never the padded rows instead, many more tokens, to save a mask that is no larger than theirs
        budget = max(MASK_BUDGET, masks * len(rows) * columns**2)
        return packed if masks * len(packed.segments) * packed.width**2 <= budget else None


def text_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The inputs of one of TRL's passes over text, by name. `None` if a call of a model is of another kind."""
    inputs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes all it knows
    is_text = TEXT_INPUTS <= inputs.keys() <= TEXT_INPUTS | {"use_cache"}
    return None if args or not is_text or not inputs["fused_lm_head"] or inputs.get("use_cache") else inputs


class _PaddedRows:
    """
    The rows of a pass as TRL gives them. The tokens of a row lie side by side, with padding on either end.

    Args:
        inputs (`dict`):
            Of the model. Labels may cover the last columns only.
        completion_columns (`int`, *optional*):
            Last columns that hold completions, if prompts end in the same column.
    """

    def __init__(self, inputs: dict[str, Any], completion_columns: int | None) -> None:
        self.ids, self.mask = inputs["input_ids"], inputs["attention_mask"].bool()
        self.count, self.columns = self.ids.shape
        self.completion_columns = completion_columns
        missing = self.columns - inputs["labels"].size(1)
        self.labels = nn.functional.pad(inputs["labels"], (missing, 0), value=IGNORED)
        ids, mask = self.ids.cpu(), self.mask.cpu()
        self.sizes = mask.sum(dim=1).tolist()
        self.rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]

    @property
    def prompt_columns(self) -> int:
        assert self.completion_columns is not None
        return self.columns - self.completion_columns

    def prompts(self) -> tuple[list[int], list[int], list[int]]:
        """One row for each different prompt, for each row the number of its prompt, and its prompt's tokens."""
        sizes = self.mask[:, : self.prompt_columns].sum(dim=1).tolist()
        numbers: dict[tuple[int, ...], int] = {}
        first: list[int] = []
        prompt_of = []
        for i, (row, size) in enumerate(zip(self.rows, sizes, strict=True)):
            prompt = tuple(row[:size].tolist())
            if prompt not in numbers:
                numbers[prompt] = len(first)
                first.append(i)
            prompt_of.append(numbers[prompt])
        return first, prompt_of, sizes

    def wanted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns `(B, L)` whose state is asked for, and the label of each."""
        labels = nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORED)
        wanted = labels != IGNORED
        if self.completion_columns is not None:  # a critic needs the state after the last token too
            wanted[:, self.prompt_columns - 1 :] |= self.mask[:, self.prompt_columns - 1 :]
        return wanted & self.mask, labels


class SharedPass:
    """
    Stands for a model in TRL's passes over text.

    Args:
        model (`Callable`):
            The model with TRL's fused head, wrapped as TRL has it, or its forward method.
        sharing ([`Sharing`]):
            What may be shared.
        base ([`~transformers.PreTrainedModel`]):
            The causal language model itself, under PEFT the base model.
        completion_columns (`int`, *optional*):
            Last columns of the inputs that hold completions, if prompts end in the same column. A critic's values are
            returned for the states from the prompts' last token on.
    """

    def __init__(
        self, model: Callable[..., Any], sharing: Sharing, base: Any, completion_columns: int | None = None
    ) -> None:
        self.model, self.sharing, self.base = model, sharing, base
        self.completion_columns = completion_columns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = text_inputs(args, kwargs)
        if inputs is None:
            return self.model(*args, **kwargs)
        rows, sharing = _PaddedRows(inputs, self.completion_columns), self.sharing
        sharing.passes += 1
        sharing.token_slots_unshared += rows.ids.numel()
        how, tokens = self._cheapest(rows)
        sharing.token_slots += tokens
        if how is not None:
            return how()
        KeptStates.of(self.base)
        if self.completion_columns is not None:  # no state before the prompt's last token is asked for
            inputs["labels"] = inputs["labels"][:, -self.completion_columns - 1 :]
        return self.model(**inputs)

    def _cheapest(self, rows: _PaddedRows) -> tuple[Callable[[], Any] | None, int]:
        """How to compute the rows (`None`: as they are), and how many tokens that takes."""
        sharing, cost = self.sharing, self.sharing.cost
        unshared = cost.of(rows.count, rows.columns)
        options: list[tuple[float, Callable[[], Any], int]] = []
        if not sharing.may_share(rows.sizes, rows.columns):
            return None, rows.ids.numel()
        packed = sharing.packed(rows.rows, rows.columns)
        if packed is not None:
            whole = cost.of(len(packed.segments), packed.width)
            options.append((whole, partial(self._packed, rows, packed), packed.tokens))
        if sharing.cache and rows.completion_columns is not None and can_repeat_cache(self.base):
            first, prompt_of, sizes = rows.prompts()
            longest, branch = max(sizes), rows.completion_columns + 1
            if len(first) < rows.count and min(sizes) > 1 and longest > sharing.fewest:
                whole = cost.of(len(first), longest - 1) + cost.of(rows.count, branch, longest - 1 + branch)
                tokens = len(first) * (longest - 1) + rows.count * branch
                options.append((whole, partial(self._cached, rows, first, prompt_of, longest), tokens))
        if not options:
            return None, rows.ids.numel()
        best, how, tokens = min(options, key=lambda option: option[0])
        if not sharing.always and best > WORTH * unshared:
            return None, rows.ids.numel()
        return how, tokens

    def _packed(self, rows: _PaddedRows, packed: PackedRows) -> ActorCriticOutput:
        """One call of the model on packed rows."""
        self.sharing.packed_passes += 1
        device = rows.ids.device
        wanted, labels = rows.wanted()
        place = torch.zeros(rows.ids.shape, dtype=torch.long, device=device)
        place[rows.mask] = torch.cat([packed.places(i) for i in range(rows.count)]).to(device)
        places = place[wanted]
        window = self.sharing.window_within(max(rows.sizes))
        with KeptStates.of(self.base).keeping(places):
            output = self.model(
                input_ids=packed.input_ids.to(device),
                attention_mask=attention_masks(packed, self.sharing.attention, self.base.dtype, device, window),
                position_ids=packed.positions.to(device),
                shift_labels=labels[wanted].unsqueeze(0),
                fused_lm_head=True,
            )

        def unpacked(values: torch.Tensor) -> torch.Tensor:
            if values.size(1) != len(places):  # of a model that kept all states
                values = picked(values, places)
            return values.new_zeros(rows.ids.shape).masked_scatter(wanted, values[0])

        found = {name: output[name] for name in PER_TOKEN if output.get(name) is not None}
        by_token = {name: unpacked(values)[:, :-1] for name, values in found.items()}
        state_values = getattr(output, "state_values", None)
        if state_values is not None and self.completion_columns is not None:
            by_token["state_values"] = unpacked(state_values)[:, -self.completion_columns - 1 :]
        return ActorCriticOutput(loss=output.loss, **by_token)

    def _cached(self, rows: _PaddedRows, first: list[int], prompt_of: list[int], longest: int) -> Any:
        """Each prompt once, then all completions on its keys and values."""
        self.sharing.cached_passes += 1
        KeptStates.of(self.base)
        device, stop = rows.ids.device, rows.prompt_columns
        start, mask, once = stop - longest, rows.mask.long(), torch.tensor(first, device=device)
        cache = DynamicCache(config=self.base.config)
        self.model(
            input_ids=rows.ids[once, start : stop - 1],
            attention_mask=mask[once, start : stop - 1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        index = torch.tensor(prompt_of, device=device)
        layers: Any = cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
        return self.model(
            input_ids=rows.ids[:, stop - 1 :],
            attention_mask=mask[:, start:],
            past_key_values=cache,
            labels=rows.labels[:, stop - 1 :],
            fused_lm_head=True,
        )


def attention_masks(
    packed: PackedRows, implementation: str | None, dtype: torch.dtype, device: torch.device, window: Window | None
) -> Any:
    """Which places of packed rows see which, in the form that a model with this `window` takes."""
    if window is None:
        return attention_mask(packed, implementation, dtype, device)
    sliding = attention_mask(packed, implementation, dtype, device, window.tokens)
    if window.masks == "one":
        return sliding
    return {
        "full_attention": attention_mask(packed, implementation, dtype, device),
        "sliding_attention": sliding,
    }


def attention_mask(
    packed: PackedRows,
    implementation: str | None,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> Any:
    """
    Which places of packed rows see which, in the form that an `attn_implementation` takes. With a `window`, a place
    sees that many last tokens of its row.
    """
    if implementation == "flex_attention":
        return block_mask(packed, device, window)
    visible = packed.visible if window is None else packed.visible_within(window)
    visible = visible.unsqueeze(1).to(device)  # (R, 1, N, N)
    if implementation == "sdpa":
        return visible
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, lowest)


def block_mask(packed: PackedRows, device: torch.device, window: int | None = None) -> Any:
    """The same for FlexAttention, which skips blocks of places that don't see each other."""
    from torch.nn.attention.flex_attention import create_block_mask

    limits, segments, positions = (t.to(device) for t in (packed.limits, packed.segment_of, packed.positions))
    count, width = packed.input_ids.shape
    sees_back = width if window is None else window

    def sees(row: Any, head: Any, looks: Any, seen: Any) -> Any:
        limit = limits[row, segments[row, looks], segments[row, seen]]
        back = positions[row, looks] - positions[row, seen]
        return (positions[row, seen] < limit) & (back >= 0) & (back < sees_back)

    return create_block_mask(sees, count, None, width, width, device=str(device))
