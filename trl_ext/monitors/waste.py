"""
How much of what a plain `trl.GRPOTrainer` computes is padding, or belongs to rows that can't move the policy.
"""

from typing import Any

import trl
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import require_type
from ..metric_keys import COMPUTE_SAVED
from ..rollouts.exactness import ExactSavings
from ..rollouts.micro_batches import MicroBatch, SavedCompute, fit_step
from ..rollouts.shared_pass import Sharing
from ..trainers.grpo import GRPOTrainer
from ..trainers.seams.prefixes import sharing_of
from ..trainers.seams.probes import generation_is_used_up, last_micro_batch, savings_of


SHARE, PADDING, DEAD_ROWS = "waste/share", "waste/padding", "waste/dead_rows"
REPEATED_PROMPTS = "waste/repeated_prompts"
SLOTS_OF_TRL_EXT = "waste/slots_of_trl_ext"


class WasteCallback(TrainerCallback):
    """
    Measures the waste of an unchanged `trl.GRPOTrainer`, and what a trainer of `trl_ext` would have computed for the
    same gradient. It changes nothing about the training.

    Compute is counted in token slots: rows × columns of what goes through the forward and backward pass of the loss. A
    transformer's cost grows with that number. (Attention grows faster with length, so that long padding costs more
    than its slots.) Generation and passes without gradient are not counted.

    Each log of training gets `waste/share`, its parts `waste/dead_rows` and `waste/padding`, beside them
    `waste/repeated_prompts` for prompts that were computed again for the next completion (shares of the slots since
    the log before), and `waste/slots_of_trl_ext` (the slots of `trl_ext` over TRL's). The totals are printed at the
    end of training.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer to which the callback is added.

    Raises:
        TypeError: for a trainer of `trl_ext`, which computes no such waste and logs `compute/saved`.

    Example:

    ```python
    trainer = GRPOTrainer(...)
    trainer.add_callback(WasteCallback(trainer))
    ```
    """

    def __init__(self, trainer: trl.GRPOTrainer) -> None:
        if isinstance(trainer, GRPOTrainer):
            raise TypeError(
                "WasteCallback watches a plain trl.GRPOTrainer. This trainer already leaves the waste out: read "
                f"`{COMPUTE_SAVED}` in its logs, or call trl_ext.verify(trainer)."
            )
        require_type("trainer", trainer, trl.GRPOTrainer, "Pass the trl.GRPOTrainer to which the callback is added.")
        self.trainer = trainer
        self.total = SavedCompute()
        self.since_log = SavedCompute()
        self.micro_batches: list[MicroBatch] = []  # those of the current optimizer step and generation
        self.savings: ExactSavings | None = None
        self.sharing: Sharing | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_batches = []  # an interrupted training may have left some

    def _remember(self) -> None:
        self.micro_batches.append(last_micro_batch(self.trainer))
        # Micro-batches of two generations are padded to different lengths, and never dealt together
        if generation_is_used_up(self.trainer):
            self._measure()

    def _measure(self) -> None:
        if not self.micro_batches:
            return
        trainer = self.trainer
        if self.savings is None:
            self.savings = savings_of(trainer)
            sharing, _ = sharing_of(trainer)
            self.sharing = sharing if sharing.any_length else None
        multiple = int(trainer.pad_to_multiple_of or 1)
        saved = SavedCompute()
        kind, accelerator = trainer.loss_type, trainer.accelerator
        fit_step(self.micro_batches, self.savings, accelerator, kind, multiple, saved, self.sharing)
        self.total += saved
        self.since_log += saved
        self.micro_batches = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remember()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remember()
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
        logs |= shares  # for the trackers that are called after this callback
        state.log_history[-1] |= shares
        self.since_log = SavedCompute()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.total.rows:
            print(self.summary(), flush=True)

    def summary(self) -> str:
        """The totals in two sentences; an empty text before the first step."""
        if not self.total.rows:
            return ""
        shares, total = waste_shares(self.total), self.total
        return (
            f"{shares[SHARE]:.0%} of the training compute was padding ({shares[PADDING]:.0%}) or rows "
            f"that can't move the policy ({shares[DEAD_ROWS]:.0%}), and {shares[REPEATED_PROMPTS]:.0%} computed a "
            f"prompt again: {total.token_slots_trl:,} token slots for {total.useful_tokens:,} useful tokens. For the "
            f"same gradient, trl_ext.GRPOTrainer computes {total.token_slots:,} ({shares[SLOTS_OF_TRL_EXT]:.0%})."
        )


def waste_shares(saved: SavedCompute) -> dict[str, float]:
    """Metrics of [`WasteCallback`], from what fitting micro-batches to their rows would have saved."""
    slots = saved.token_slots_trl
    share, dead = 1 - saved.useful_tokens / slots, saved.dead_slots / slots
    return {
        SHARE: share,
        PADDING: share - dead,
        DEAD_ROWS: dead,
        REPEATED_PROMPTS: saved.repeated_prompts / slots,
        SLOTS_OF_TRL_EXT: saved.token_slots / slots,
    }
