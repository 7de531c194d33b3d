"""
Which states of a pass are scored, and what the pass returns. States are the last hidden states of a model, one after
each token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """
    TRL's output of a forward pass with its fused head, with values.

    Args:
        state_values (`torch.Tensor` of shape `(batch, states)`):
            V of each state that was kept.
    """

    state_values: torch.Tensor | None = None


class KeptStates:
    """
    Makes a causal language model with TRL's fused head score only the states that are asked for. On machines without
    Triton, TRL scores all of them and drops those without a label afterwards. The states are as many of the last
    columns as there are labels, or the places that [`keeping`] names.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model; under PEFT the base model. If labels cover all columns, nothing changes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._columns: int | None = None  # in a pass with the fused head
        self._places: torch.Tensor | None = None
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.base_model.register_forward_hook(self._cut)
        model.trl_ext_kept_states = self  # type: ignore[assignment]

    @classmethod
    def of(cls, model: Any) -> "KeptStates":
        """Those of a model, which are made the first time that they are asked for."""
        found: KeptStates | None = getattr(model, "trl_ext_kept_states", None)
        return cls(model) if found is None else found

    @contextmanager
    def keeping(self, places: torch.Tensor) -> Iterator[None]:
        """Within this context, a pass keeps the states at `places` `(M,)` of the flattened inputs, as one row."""
        self._places = places
        try:
            yield
        finally:
            self._places = None  # also if the pass ran out of memory

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        self._columns = labels.size(1) if kwargs.get("fused_lm_head") and labels is not None else None

    def _cut(self, backbone: nn.Module, args: Any, output: Any) -> Any:
        if self._places is not None:
            output.last_hidden_state = picked(output.last_hidden_state, self._places)
        elif self._columns is not None:
            output.last_hidden_state = output.last_hidden_state[:, -self._columns :]
        self._columns = None
        return output


def picked(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Some places `(M,)` of the flattened first two dimensions of `values` `(R, N, …)`, as one row `(1, M, …)`."""
    return values.flatten(0, 1).index_select(0, places.to(values.device)).unsqueeze(0)
