"""
Memory that runs out in a pass of the loss. The micro-batch is computed again in two parts, then in four, and so on,
and the run goes on that way.

The loss itself is not divided: it is taken over the whole micro-batch, whose log-probabilities are computed part by
part without keeping what the backward pass needs. That is computed again, part by part, in the backward pass
(activation checkpointing over rows). So the gradient is that of the whole micro-batch for every loss, also for those
that divide by their own micro-batch's tokens, for entropy terms, and for a critic's. It costs one more forward pass.
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, release_memory
from torch.utils.checkpoint import checkpoint


logger = get_logger(__name__)

# What TRL's pass has one row of for each row of the micro-batch
BY_ROW = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
OTHERS = ("model", "logits_to_keep", "compute_entropy")
# Gradients up to this size are kept before each micro-batch, so that those of a failed backward pass can be undone
MOST_KEPT_BYTES = 256 * 2**20


def in_parts(forward: Callable[..., Any], parts: int, fewest_rows: int) -> Callable[..., Any]:
    """
    TRL's pass `forward` (`_get_per_token_logps_and_entropies`, bound), part by part.

    Args:
        forward (`Callable`):
            The pass.
        parts (`int`):
            How many parts. 1: the pass as it is.
        fewest_rows (`int`):
            Rows that a part has at least.
    """
    if parts == 1:
        return forward
    signature = inspect.signature(forward)

    @wraps(forward)
    def by_parts(*args: Any, **kwargs: Any) -> Any:
        given = {name: v for name, v in signature.bind(*args, **kwargs).arguments.items() if v is not None}
        rows = len(given["input_ids"])
        size = max(-(-rows // parts), fewest_rows)
        if rows <= size:
            return forward(*args, **kwargs)
        pass_ = partial(forward, **{name: given[name] for name in OTHERS if name in given})
        results = []
        for start in range(0, rows, size):
            inputs = {name: given[name][start : start + size] for name in BY_ROW if name in given}
            results.append(checkpoint(partial(pass_, **inputs), use_reentrant=False))
        return tuple(None if values[0] is None else torch.cat(values) for values in zip(*results, strict=True))

    return by_parts


class MemoryFallback:
    """
    What a trainer does when memory runs out in a pass of the loss.

    Args:
        trainer ([`~trl_ext.trainers.seams.grpo.GRPOSeams`]):
            The trainer.

    Attributes:
        parts (`int`):
            In how many parts a micro-batch is computed.
        under_way (`bool`):
            Whether the loss of a micro-batch, or its backward pass, is being computed.
        again (`bool`):
            Whether this is the same micro-batch once more.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.parts = 1
        self.under_way = self.again = False
        self._gradients: dict[torch.nn.Parameter, torch.Tensor] | None = {}
        self._before: Any = None

    def begin(self) -> None:
        """Before a micro-batch: keep its gradients so far, if they are small."""
        self.under_way, self._before = False, None
        policy: torch.nn.Module = self.trainer.model
        found = {weight: weight.grad for weight in policy.parameters() if weight.grad is not None}
        small = sum(gradient.nbytes for gradient in found.values()) <= MOST_KEPT_BYTES
        able = self.trainer.accelerator.distributed_type == DistributedType.NO and small
        self._gradients = {weight: g.clone() for weight, g in found.items()} if able or not found else None

    def keep_metrics(self) -> None:
        """After the forward pass: what the loss logs is undone if its backward pass fails."""
        metrics = {name: list(values) for name, values in self.trainer.train_metrics.items()}
        self._before = metrics, self.trainer.loss_state()

    def obstacle(self, inputs: dict[str, Any], fewest_rows: int) -> str | None:
        """Why a micro-batch can't be computed in more parts."""
        trainer = self.trainer
        if trainer.accelerator.distributed_type != DistributedType.NO:
            return "other processes take part in its passes"
        if any(isinstance(value, list) for value in inputs.values()) or "pixel_values" in inputs:
            return "it has images"
        if getattr(trainer, "aux_loss_enabled", False):
            return "the auxiliary loss balances experts over it"
        if len(inputs["completion_ids"]) < 2 * self.parts * fewest_rows:
            return "each part is as small as it can be"
        if self._gradients is None:
            return (
                "its backward pass has added to the gradients of earlier micro-batches, which are too large to be kept"
            )
        return None

    def fall_back(self, error: torch.OutOfMemoryError, inputs: dict[str, Any], fewest_rows: int) -> None:
        """
        Compute in twice as many parts from now on.

        Raises:
            torch.OutOfMemoryError: the error, with a note that says what to change, if that can't be done.
        """
        args, rows = self.trainer.args, len(inputs["completion_ids"])
        size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        smaller = f"per_device_train_batch_size={max(size // 2, 1)} and gradient_accumulation_steps={2 * accumulation}"
        obstacle = self.obstacle(inputs, fewest_rows)
        if obstacle is not None:
            error.add_note(
                f"A micro-batch of {rows} rows doesn't fit, and was not computed in {2 * self.parts} parts: "
                f"{obstacle}. Set {smaller}, or shorter prompts and completions."
            )
            raise error
        self.parts *= 2
        logger.warning(
            f"Out of memory in a micro-batch of {rows} rows ({str(error).splitlines()[0][:200]}). From now on each is "
            f"computed in {self.parts} parts. The gradient is the same, and costs one more forward pass. {smaller} "
            "would save that."
        )

    def undo(self) -> None:
        """What the failed attempt did, so that it can be made again."""
        assert self._gradients is not None
        for weight in self.trainer.model.parameters():
            weight.grad = self._gradients.get(weight)
        if self._before is not None:
            metrics, state = self._before
            self.trainer.train_metrics.clear()
            self.trainer.train_metrics.update(metrics)
            self.trainer.load_loss_state(state)
        release_memory()
