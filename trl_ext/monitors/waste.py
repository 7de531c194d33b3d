"""
How much of what a plain `trl.GRPOTrainer` computes is padding, or rows that can't move the policy?
"""

from typing import Any

import trl
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..rollouts.exactness import ExactSavings
from ..rollouts.micro_batches import MicroBatch, SavedCompute, fit_step
from ..trainers.grpo import GRPOTrainer
from ..trainers.seams.probes import generation_is_used_up, last_micro_batch, savings_of


class WasteCallback(TrainerCallback):
    """
    Measures the waste of an unchanged `trl.GRPOTrainer`, and what a trainer of `trl_ext` would have computed for the
    same gradient. Nothing of the training changes.

    Compute is counted in token slots: rows × columns of what goes through forward and backward pass of the loss, which
    is what a transformer's cost grows with (attention grows faster with length, so that long padding costs more than
    its slots). Generation and passes without gradient are not in it.

    Each log of training gets `waste/share`, `waste/dead_rows` and `waste/padding` (shares of the slots since the last
    one) and `waste/slots_of_trl_ext` (ours over TRL's); the end of training prints the totals.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer that it is added to.

    Raises:
        TypeError: for a trainer of `trl_ext`, which saves it already and logs `compute/saved`.

    Example:

    ```python
    trainer = GRPOTrainer(...)
    trainer.add_callback(WasteCallback(trainer))
    ```
    """

    def __init__(self, trainer: trl.GRPOTrainer) -> None:
        if isinstance(trainer, GRPOTrainer):
            raise TypeError(
                "WasteCallback watches a plain trl.GRPOTrainer. This trainer leaves the waste out already: read "
                "`compute/saved` in its logs, or call trl_ext.verify(trainer)."
            )
        self.trainer = trainer
        self.total = SavedCompute()
        self.since_log = SavedCompute()
        self.micro_batches: list[MicroBatch] = []  # of the optimizer step and the generation under way
        self.savings: ExactSavings | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_batches = []  # of a training that was broken off

    def _seen(self) -> None:
        self.micro_batches.append(last_micro_batch(self.trainer))
        # Micro-batches of two generations are not padded alike, and not dealt together
        if generation_is_used_up(self.trainer):
            self._measure()

    def _measure(self) -> None:
        if not self.micro_batches:
            return
        trainer = self.trainer
        if self.savings is None:
            self.savings = savings_of(trainer)
        multiple = int(trainer.pad_to_multiple_of or 1)
        saved = SavedCompute()
        fit_step(self.micro_batches, self.savings, trainer.accelerator, trainer.loss_type, multiple, saved)
        self.total += saved
        self.since_log += saved
        self.micro_batches = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen()
        self._measure()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not self.since_log.rows or "loss" not in logs:
            return
        shares = waste_shares(self.since_log)
        logs |= shares  # for trackers that come after this callback
        state.log_history[-1] |= shares
        self.since_log = SavedCompute()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.total.rows:
            print(self.summary(), flush=True)

    def summary(self) -> str:
        """The totals in a sentence or two; nothing before the first step."""
        if not self.total.rows:
            return ""
        shares, total = waste_shares(self.total), self.total
        return (
            f"{shares['waste/share']:.0%} of the training compute was padding ({shares['waste/padding']:.0%}) or rows "
            f"that can't move the policy ({shares['waste/dead_rows']:.0%}): {total.token_slots_trl:,} token slots for "
            f"{total.useful_tokens:,} useful tokens. For the same gradient, trl_ext.GRPOTrainer computes "
            f"{total.token_slots:,} ({shares['waste/slots_of_trl_ext']:.0%})."
        )


def waste_shares(saved: SavedCompute) -> dict[str, float]:
    """Metrics of [`WasteCallback`] from what fitting would have saved."""
    slots = saved.token_slots_trl
    share, dead = 1 - saved.useful_tokens / slots, saved.dead_slots / slots
    return {
        "waste/share": share,
        "waste/padding": share - dead,
        "waste/dead_rows": dead,
        "waste/slots_of_trl_ext": saved.token_slots / slots,
    }
