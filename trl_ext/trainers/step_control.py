"""
What an optimizer step takes: which of them move the policy, and what happens to those whose loss isn't finite.
"""

import math
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback


logger = get_logger(__name__)

# Steps in a row whose loss isn't finite, after which a run is not worth its electricity
MOST_SKIPPED_STEPS = 3


class NonFiniteLossError(RuntimeError):
    """The loss was not finite for several optimizer steps in a row."""


def zero_loss(*tensors: torch.Tensor) -> torch.Tensor:
    """0 as a function of `tensors`, for a backward pass through their graph without the loss that isn't finite."""
    return torch.stack([(tensor.nan_to_num() * 0.0).sum() for tensor in tensors]).sum()


class StepControl(TrainerCallback):
    """
    Freezes the policy in the steps that only move the critic, skips steps whose loss isn't finite, and stops a run
    with too many of those in a row.

    Args:
        trainer ([`PPOTrainer`]):
            The trainer. It sets `loss_is_finite` at the end of each accumulation window.

    Attributes:
        loss_is_finite (`bool`):
            Whether the loss of the step that is being accumulated is finite on all ranks.
        explained_variance (`float`):
            Of the generation batch that was credited last, on all ranks.
        early_warmup_steps (`int`, *optional*):
            Length of a warm-up of the critic that ended before `critic_warmup_steps`.
        skipped, skipped_in_a_row (`int`):
            Steps that were skipped, in total and since the last one that wasn't.

    Raises:
        NonFiniteLossError: if `MOST_SKIPPED_STEPS` steps in a row were skipped. A checkpoint is written first.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.loss_is_finite = True
        self.explained_variance = math.nan
        self.early_warmup_steps: int | None = None
        self.skipped = 0
        self.skipped_in_a_row = 0

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps at the start that move only the critic, as far as is known now."""
        planned: int = self.trainer.args.critic_warmup_steps
        return planned if self.early_warmup_steps is None else self.early_warmup_steps

    @property
    def in_warmup(self) -> bool:
        """Whether the policy hasn't begun to learn."""
        return bool(self.trainer.state.global_step < self.warmup_steps)

    @property
    def policy_is_frozen(self) -> bool:
        """Whether this optimizer step moves only the critic."""
        period = self.trainer.args.value_updates_per_policy_update
        step = self.trainer.state.global_step - self.warmup_steps
        return bool(step < 0 or step % period != period - 1)

    def _look_at_critic(self) -> None:
        """
        End the warm-up with this step if the critic is good enough. Its explained variance is that of a generation
        batch which it hadn't learned from. Decided before the schedule sets the learning rate of the next step.
        """
        wanted = self.trainer.args.critic_warmup_explained_variance
        if wanted is None or not self.in_warmup:
            return
        done = self.trainer.state.global_step + 1
        if self.explained_variance >= wanted:  # NaN, where returns don't vary, is not
            self.early_warmup_steps = done
        elif done == self.warmup_steps:
            logger.warning(
                f"The critic's explained variance is {self.explained_variance:.3f} after critic_warmup_steps={done}, "
                f"below critic_warmup_explained_variance={wanted}. The policy begins to learn nevertheless."
            )

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """
        Take gradients away from everything that must not move. DeepSpeed's are out of reach; there the learning rate
        is set to 0, until the schedule sets it again.
        """
        self._look_at_critic()
        if self.loss_is_finite and not self.policy_is_frozen:
            return
        trainer = self.trainer
        moving = {id(p) for p in trainer.critic.trained_parameters()} if self.loss_is_finite else set()
        for group in trainer.optimizer.param_groups:
            if trainer.is_deepspeed_enabled and not (moving and group.get("is_critic")):
                group["lr"] = 0.0
            for parameter in group["params"]:
                if id(parameter) not in moving:
                    parameter.grad = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Count the steps that were skipped, and stop after too many in a row."""
        if self.loss_is_finite:
            self.skipped_in_a_row = 0
            return
        trainer = self.trainer
        self.loss_is_finite = True
        self.skipped += 1
        self.skipped_in_a_row += 1
        trainer.train_metrics["skipped_steps"] = [self.skipped]
        logger.warning(f"The loss of step {trainer.state.global_step} is not finite: the step is skipped.")
        if self.skipped_in_a_row < MOST_SKIPPED_STEPS:
            return
        error = NonFiniteLossError(
            f"The loss was not finite for {MOST_SKIPPED_STEPS} steps in a row. Lower learning_rate or "
            "critic_learning_rate, set reward_scaling='running' or reward_clip, and look at the rewards."
        )
        trainer.save_before_stopping(error)
        raise error

    def state_dict(self) -> tuple[int, int, int | None]:
        """What a checkpoint must hold. A generation batch is credited, and judged, within one optimizer step."""
        return self.skipped, self.skipped_in_a_row, self.early_warmup_steps

    def load_state_dict(self, state: tuple[Any, ...]) -> None:
        """The reverse of [`state_dict`]."""
        self.skipped, self.skipped_in_a_row = state[:2]
        self.early_warmup_steps = state[2] if len(state) > 2 else None  # older checkpoints have two
