"""
Evaluation whose numbers are those of the whole data set, as if it had been a single batch.

TRL appends what it measures on each batch to `_metrics["eval"]`, and `log` takes the plain mean: a short last batch
counts as much as a full one, rows that a distributed sampler repeats count twice, all named evaluation sets write the
same keys, and what an evaluation that failed left there goes into the next one. Here the values of each batch are
taken out of that buffer as soon as they are there, and the numbers of the set are among the metrics that
`evaluation_loop` returns, with its prefix. `log` finds the buffer empty.

These are methods of a transformers trainer, so that the seams of GRPO and of DPO share them.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput

from ...evaluation.batches import BatchesOfProcess, evaluation_rounds, weighted_mean


LOSS = "loss"


@dataclass
class EvaluatedBatch:
    """
    What was measured on one batch.

    Args:
        rows (`int`):
            Distinct rows of all processes. (Of this process, if the loader deals all rows alike.)
        copies (`int`):
            How often each of them is in the batch.
        values (`dict[str, float]`):
            TRL's metrics of the batch, the same on all processes.
        loss (`float`):
            The loss of this process.
        weights (`dict[str, float]`):
            Weights of metrics, and of the `"loss"`, that are not means over rows: what they were divided by, on this
            process.
        rewards (`torch.Tensor` of shape `(N, F)`, *optional*):
            Rewards of the distinct rows, if there are rewards.
    """

    rows: int
    copies: int
    values: dict[str, float]
    loss: float
    weights: dict[str, float] = field(default_factory=dict)
    rewards: torch.Tensor | None = None


@dataclass
class Evaluation:
    """An evaluation that is under way: its loader, and the batches so far."""

    loader: Any
    batches: list[EvaluatedBatch] = field(default_factory=list)

    def begin_batch(self) -> tuple[int, int | None]:
        """Copies of each row in the batch that comes next, and its distinct rows, if the loader knows them."""
        rounds = getattr(getattr(self.loader, "batch_sampler", None), "rounds", None)
        if rounds is None:
            return 1, None
        round_ = rounds[len(self.batches)]
        if round_.copies > 1 and len(self.batches) == len(rounds) - 1:
            self.loader.remainder = round_.distinct  # what Accelerate's `gather_for_metrics` keeps of the last batch
        return round_.copies, round_.distinct

    def is_one_batch(self) -> bool:
        """Whether TRL's numbers of a batch are those of the set."""
        return len(self.batches) == 1 and self.batches[0].copies == 1


def _take_metrics(trainer: Any) -> dict[str, list[float]]:
    """Empties the buffer of evaluation, and returns what was in it."""
    taken: dict[str, list[float]] = trainer._metrics["eval"]
    trainer._metrics["eval"] = defaultdict(list)
    return taken


class WholeEvaluations(Trainer):
    """
    A transformers trainer that evaluates as the top of this file says. The hooks do nothing here:

    - `rows_together`: rows of a group, which one batch must hold.
    - `complete_batch`: weights of metrics that are not means over rows, and rewards.
    - `pool_batches`: metrics that are not weighted means.
    - `evaluation_apart`: a context around a whole evaluation.
    """

    _evaluation: Evaluation | None = None  # while `evaluation_loop` runs

    @property
    def rows_together(self) -> int:
        return 1

    def complete_batch(self, batch: EvaluatedBatch, inputs: Any) -> None:
        """Add `weights` and `rewards` to a batch that was measured on `inputs`, in place."""

    def pool_batches(self, values: dict[str, list[float]], batches: list[EvaluatedBatch]) -> dict[str, float | None]:
        """Metrics of the set that are not weighted means of `values`, which has one value for each batch."""
        return {}

    def evaluation_apart(self, metric_key_prefix: str) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        with self.evaluation_apart(metric_key_prefix):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        loader: Any = super().get_eval_dataloader(eval_dataset)
        processes, dataset = self.accelerator.num_processes, loader.dataset
        if (
            processes == 1
            or isinstance(dataset, IterableDataset)
            or self.args.dataloader_drop_last
            or self.accelerator.parallelism_config is not None  # whose processes don't all have rows of their own
        ):
            return loader
        sampler = self._get_eval_sampler(dataset)
        order = range(len(dataset)) if sampler is None else list(sampler)
        rounds = evaluation_rounds(order, processes, self.args.eval_batch_size, self.rows_together)
        dealt = DataLoader(
            dataset,
            batch_sampler=BatchesOfProcess(rounds, self.accelerator.process_index, processes),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
        )
        return prepare_data_loader(dealt, self.accelerator.device, num_processes=1, put_on_device=True)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._evaluation = evaluation = Evaluation(dataloader)
        try:
            output: EvalLoopOutput = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._evaluation = None
            _take_metrics(self)
        metrics: Any = output.metrics
        for name, value in self._of_whole_set(evaluation).items():
            metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        evaluation = self._evaluation
        if evaluation is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        copies, rows = evaluation.begin_batch()
        if rows is None:
            rows = len(inputs) if isinstance(inputs, list) else find_batch_size(inputs)
        _take_metrics(self)  # what doesn't belong to this batch
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        values = {name: weighted_mean(of, [1.0] * len(of)) for name, of in _take_metrics(self).items()}
        known = {name: math.nan if value is None else value for name, value in values.items()}
        batch = EvaluatedBatch(rows or 1, copies, known, math.nan if loss is None else float(loss))
        self.complete_batch(batch, inputs)
        evaluation.batches.append(batch)
        return loss, logits, labels

    def _of_whole_set(self, evaluation: Evaluation) -> dict[str, Any]:
        """The metrics of the data set. Every process makes the call."""
        batches = evaluation.batches
        names = dict.fromkeys(name for batch in batches for name in batch.values)
        values = {name: [batch.values.get(name, math.nan) for batch in batches] for name in names}
        if evaluation.is_one_batch() or not batches:
            return {name: None if math.isnan(of[0]) else of[0] for name, of in values.items()}
        losses = [batch.loss for batch in batches]
        filters = self.args.logging_nan_inf_filter and any(map(math.isfinite, losses))
        kinds = sorted({LOSS, *(name for batch in batches for name in batch.weights)})
        numbers = []
        for batch in batches:
            of_copies = {name: float(weight) / batch.copies for name, weight in batch.weights.items()}
            weights = [of_copies.get(name, float(batch.rows)) for name in kinds]
            counted = math.isfinite(batch.loss) or not filters
            weight = weights[kinds.index(LOSS)] if counted else 0.0
            numbers.append([*weights, weight, weight * batch.loss if counted else 0.0])
        table = torch.tensor(numbers, device=self.accelerator.device)
        *columns, weight, loss = self.accelerator.reduce(table, reduction="sum").T.tolist()
        weights_of = dict(zip(kinds, columns, strict=True))
        rows = [float(batch.rows) for batch in batches]
        means = {name: weighted_mean(of, weights_of.get(name, rows)) for name, of in values.items()}
        return means | self.pool_batches(values, batches) | {LOSS: sum(loss) / max(sum(weight), 1e-12)}


# The table of completions


@contextmanager
def completions_apart(trainer: Any) -> Iterator[None]:
    """
    Within this context, TRL's table of completions is an empty one, and nothing is pending that a reward function
    logged: an evaluation shows its own completions, and training goes on with those that it had.
    """
    names = ("_logs", "_pending_metrics", "_pending_extra_logs")
    before = {name: getattr(trainer, name) for name in names}
    for name, value in before.items():
        fresh = copy.deepcopy(value) if name != "_logs" else {key: copy.copy(column) for key, column in value.items()}
        for column in fresh.values() if name == "_logs" else [fresh]:
            column.clear()
        setattr(trainer, name, fresh)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


@contextmanager
def table_of_evaluation(trainer: Any, prefix: str) -> Iterator[None]:
    """Within this context, the file that TRL's `log` writes gets `prefix` before its name, and replaces no other."""
    folder = Path(str(trainer.args.output_dir)) / "completions"
    file = folder / f"completions_{trainer.state.global_step:05d}.parquet"
    kept = folder / f".{file.name}"
    if trainer.accelerator.is_main_process and file.exists():
        file.rename(kept)
    try:
        yield
    finally:
        if trainer.accelerator.is_main_process:
            if file.exists():
                file.rename(folder / f"{prefix}_{file.name}")
            if kept.exists():
                kept.rename(file)
