"""
The hidden state after one token of each row, in a pass without gradients: what a reward model's head reads. Rows that
begin with the same tokens compute them once.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .exactness import needs_full_width
from .kept_states import KeptStates
from .prefix_exactness import attention_window, pass_cost, sharing_obstacles
from .prefix_trees import WORTH, Cost, PackedRows
from .shared_pass import Sharing, attention_masks


def sharing_for(policy: Any, attention: str | None, always: bool = False, multiple: int = 1) -> Sharing:
    """
    What passes of a policy alone may share. Where sharing would be inexact, it is off.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The causal language model, not wrapped for several processes.
        attention (`str`, *optional*):
            Its `attn_implementation`.
        always (`bool`), multiple (`int`):
            As in [`~trl_ext.rollouts.shared_pass.Sharing`].
    """
    pack = not sharing_obstacles(policy, attention, trains=False)
    width = needs_full_width(policy)
    return Sharing(
        pass_cost(policy, policy.device.type) if pack else Cost(0.0),
        attention=attention,
        pack=pack,
        always=always,
        multiple=multiple,
        window=attention_window(policy),
        full_width_from=None if width is None else width.columns,
    )


def batches_of(sizes: Sequence[int], prompts: Sequence[str], batch_size: int) -> list[list[int]]:
    """
    Numbers of rows, dealt to batches: rows of one prompt side by side, and prompts by their longest row. How many
    batches there are depends on the number of rows alone, so that processes with equally many rows make equally many
    passes, which sharded weights need.

    Args:
        sizes (`Sequence[int]`):
            Tokens of each row.
        prompts (`Sequence[str]`):
            What rows of the same prompt have in common.
        batch_size (`int`):
            Rows of a batch.
    """
    longest: dict[str, int] = {}
    for size, prompt in zip(sizes, prompts, strict=True):
        longest[prompt] = max(size, longest.get(prompt, 0))
    order = sorted(range(len(sizes)), key=lambda row: (longest[prompts[row]], prompts[row], sizes[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def last_states(
    model: Any, base: Any, rows: Sequence[torch.Tensor], last: Sequence[int], sharing: Sharing
) -> torch.Tensor:
    """
    The last hidden state after one token of each row, in one call of the model. The model should be in evaluation
    mode. What was computed is added to the counters of `sharing`.

    Args:
        model (`Callable`):
            The causal language model, wrapped as the trainer has it.
        base ([`~transformers.PreTrainedModel`]):
            The model itself, under PEFT the base model.
        rows (`Sequence[torch.Tensor]`):
            Token ids of each row, without padding, on the CPU. Each has at least one.
        last (`Sequence[int]`):
            The token of each row after which the state is asked for.
        sharing ([`~trl_ext.rollouts.shared_pass.Sharing`]):
            What may be shared.

    Returns:
        `torch.Tensor` of shape `(N, H)`.
    """
    device, sizes = base.device, list(map(len, rows))
    columns = -(-max(sizes) // sharing.multiple) * sharing.multiple
    packed = _worth_packing(rows, columns, sharing)
    sharing.passes += 1
    sharing.token_slots_unshared += len(rows) * columns
    if packed is None:
        sharing.token_slots += len(rows) * columns
        ids = torch.zeros(len(rows), columns, dtype=torch.long)  # padding is masked, and may be any token
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = row
        mask = torch.arange(columns) < torch.tensor(sizes).unsqueeze(1)
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
        places = torch.arange(len(rows)) * columns + torch.tensor(last)
    else:
        sharing.packed_passes += 1
        sharing.token_slots += packed.tokens
        window = sharing.window_within(max(sizes))
        inputs = {
            "input_ids": packed.input_ids.to(device),
            "attention_mask": attention_masks(packed, sharing.attention, base.dtype, device, window),
            "position_ids": packed.positions.to(device),
        }
        places = torch.stack([packed.places(i)[at] for i, at in enumerate(last)])
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        inputs["logits_to_keep"] = 1  # as few as there can be: they are not read
    states: list[torch.Tensor] = []

    def keep(backbone: nn.Module, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state[0])

    kept = KeptStates.of(base)
    handle = base.base_model.register_forward_hook(keep)  # after the one that picks the places
    try:
        with kept.keeping(places):
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return states[0]


def _worth_packing(rows: Sequence[torch.Tensor], columns: int, sharing: Sharing) -> PackedRows | None:
    if not sharing.may_share(list(map(len, rows)), columns):
        return None
    packed = sharing.packed(rows, columns)
    if packed is None or sharing.always:
        return packed
    cost = sharing.cost
    cheap = cost.of(len(packed.segments), packed.width) <= WORTH * cost.of(len(rows), columns)
    return packed if cheap else None
