"""
Equal rows of a pass are computed once: a completion that is in several pairs of a micro-batch.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .shared_pass import PER_TOKEN, Sharing, text_inputs


def distinct_rows(forward: Callable[..., Any], sharing: Sharing) -> Callable[..., Any]:
    """
    The forward method of a model with TRL's fused head, computing equal rows once. What it returns for each row is a
    copy, so that gradients of all copies reach the row. Passes of other kinds stay as they are.

    Args:
        forward (`Callable`):
            The method.
        sharing ([`~trl_ext.rollouts.shared_pass.Sharing`]):
            Counts the tokens that weren't computed.
    """

    @wraps(forward)
    def once(*args: Any, **kwargs: Any) -> Any:
        inputs = text_inputs(args, kwargs)
        if inputs is None:
            return forward(*args, **kwargs)
        by_row = ("input_ids", "attention_mask", "labels")
        whole = torch.cat([inputs[name] for name in by_row], dim=1)
        different, copy_of = torch.unique(whole, dim=0, return_inverse=True)
        if len(different) == len(whole):
            return forward(*args, **kwargs)
        sharing.token_slots_unshared += (len(whole) - len(different)) * inputs["input_ids"].size(1)
        sizes = [inputs[name].size(1) for name in by_row]
        parts = dict(zip(by_row, different.split(sizes, dim=1), strict=True))
        output = forward(**inputs | parts)
        for name in PER_TOKEN:
            if output.get(name) is not None:
                output[name] = output[name].index_select(0, copy_of)
        return output

    return once
