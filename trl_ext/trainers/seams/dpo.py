"""
`trl.DPOTrainer` with its private methods wrapped, never copied: the order of rows, checkpoints, evaluation,
prompts that passes share, and the micro-batches in which pairs of one prompt meet.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import trl
from torch.utils.data import Sampler

from ...rollouts.pair_dealing import PAIR_MEAN_LOSSES, WEIGHTS, dealt_anew
from ...rollouts.shared_pass import Sharing
from .evaluation import EvaluatedBatch, WholeEvaluations
from .prefixes import sharing_forwards
from .references import drop_reference, making_reference, reference_of
from .whole_checkpoints import WholeCheckpoints


RowOrder = Callable[[int], list[int]]


class OrderSampler(Sampler[int]):
    """
    Yields the rows in an order that depends only on the epoch, so that it is the same on every process and after a
    resume.

    Args:
        rows (`int`):
            Number of rows in the data set.
        order (`Callable[[int], list[int]]`):
            From an epoch to the indices of its rows, each once.
        epoch (`Callable[[], int]`):
            Returns the epoch that is about to begin.
    """

    def __init__(self, rows: int, order: RowOrder, epoch: Callable[[], int]) -> None:
        self.rows = rows
        self.order = order
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch()))

    def __len__(self) -> int:
        return self.rows


class WeightCollator:
    """
    TRL's collator, which drops all columns that it doesn't know, with the weights of pairs under [`WEIGHTS`].

    Args:
        collate (`Callable`):
            TRL's.
        column (`str`):
            Column of the weights. Rows without it, such as those of evaluation, get none.
    """

    def __init__(self, collate: Callable[..., dict[str, Any]], column: str) -> None:
        self.collate, self.column = collate, column

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        if all(self.column in row for row in rows):
            batch[WEIGHTS] = torch.tensor([float(row[self.column]) for row in rows])
        return batch


def _without_weights(inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None]:
    """A batch as TRL knows it, and the weights of its pairs."""
    return {name: value for name, value in inputs.items() if name != WEIGHTS}, inputs.get(WEIGHTS)


class _Weighted:
    """
    Stands for the policy in TRL's loss, a mean over pairs: what flows back into the log-probabilities of a pair is
    multiplied by its weight, which makes the gradient that of a weighted mean.
    """

    def __init__(self, model: Any, weights: torch.Tensor) -> None:
        self.model, self.weights = model, weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        logps = getattr(output, "log_probs", None)
        if logps is not None and logps.requires_grad:
            weights = torch.cat([self.weights, self.weights]).unsqueeze(1).to(logps)  # chosen before rejected
            logps.register_hook(lambda gradient: gradient * weights)
        return output


class DPOSeams(WholeCheckpoints, WholeEvaluations, trl.DPOTrainer):
    """
    The hook of [`~trl_ext.DPOTrainer`], which does nothing here.

    - `row_order`: a function from the epoch to the order of the training rows; `None` for TRL's order.
    """

    # Narrower than upstream's annotations: both are set once a trainer exists
    args: Any
    train_dataset: Any
    # What passes share; `None`: they are TRL's
    sharing: Sharing | None = None

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        inputs, weights = _without_weights(inputs)
        model = model if weights is None else _Weighted(model, weights)
        with sharing_forwards(self, self.sharing):
            return super()._compute_loss(model, inputs, return_outputs)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        with sharing_forwards(self, self.sharing):
            return super().compute_ref_log_probs(model, _without_weights(inputs)[0])

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        sharing = self.sharing
        if sharing is not None and sharing.any_length and {*self.loss_types} <= {*PAIR_MEAN_LOSSES}:
            batches = dealt_anew(batches, sharing)
        return batches, items

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("ref_model")
        kwargs["ref_model"] = own = reference_of(kwargs, given)
        with making_reference(self, kwargs, own, wanted=True):
            super().__init__(*args, **kwargs)
        if given is None and kwargs["args"].precompute_ref_log_probs:
            drop_reference(self)  # its log-probabilities are there now
        column = kwargs["args"].weight_column
        if column is not None:
            self.data_collator = WeightCollator(self.data_collator, column)

    def row_order(self) -> RowOrder | None:
        return None

    def complete_batch(self, batch: EvaluatedBatch, inputs: Any) -> None:
        mask = inputs["completion_mask"][..., 1:]  # (2B, T), chosen before rejected
        chosen, rejected = (float(half.sum()) for half in mask.chunk(2))
        by_token = {"entropy": chosen + rejected, "mean_token_accuracy": chosen}
        batch.weights |= by_token | {"logits/chosen": chosen, "logits/rejected": rejected}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        column, kept = self.args.weight_column, self._signature_columns
        if column is not None and kept is not None and column not in kept:
            kept.append(column)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler, order = super()._get_train_sampler(train_dataset), self.row_order()
        if order is None:
            return sampler
        # `self.train_dataset`, because the argument lacks the columns that the collator doesn't take
        return OrderSampler(len(self.train_dataset), order, lambda: int(self.state.epoch or 0))
