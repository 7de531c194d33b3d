"""
Looks into a trainer without changing its run: the micro-batches that it would train on, the one that it used last, the
savings of compute that are exact for it, and rollouts outside of training. Where `trl.GRPOTrainer` is the type of the
trainer, it may be TRL's or one of `trl_ext`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl

from ...roles.critic import critic_of
from ...rollouts.exactness import (
    ExactSavings,
    exact_savings,
    fewest_rows,
    has_relative_positions,
    needs_full_width,
)
from .checkpoints import random_states, set_random_states
from .grpo import GRPOSeams


def savings_of(trainer: trl.GRPOTrainer) -> ExactSavings:
    """Which savings of compute are exact for the loss and the models of a trainer."""
    unwrap: Any = trainer.accelerator.unwrap_model
    critic = critic_of(unwrap(trainer.model))
    models = [unwrap(model) for model in (trainer.model, trainer.ref_model) if model is not None]
    models += [getattr(critic, "backbone", critic)] if critic is not None and critic.reads_token_ids else []
    return exact_savings(
        trainer.loss_type,
        kl=trainer.beta != 0.0,
        entropy_terms=trainer._entropy_bonus_enabled or trainer.top_entropy_quantile < 1.0,
        aux_loss=trainer.aux_loss_enabled,
        value_loss=getattr(trainer, "has_value_loss", False),
        relative_positions=all(map(has_relative_positions, models)),
        full_width=min(filter(None, map(needs_full_width, models)), default=None),
        fewest_rows=max(map(fewest_rows, models)),
    )


def last_micro_batch(trainer: trl.GRPOTrainer) -> dict[str, Any]:
    """The micro-batch whose loss was computed last."""
    buffer: Any = trainer._buffered_inputs
    batch: dict[str, Any] = buffer[(trainer._step - 1) % len(buffer)]
    return batch


def generation_is_used_up(trainer: trl.GRPOTrainer) -> bool:
    """Whether the trainer will generate before its next micro-batch."""
    args: Any = trainer.args
    return int(trainer._step) % (args.steps_per_generation * trainer.num_iterations) == 0


def preview_micro_batches(trainer: GRPOSeams) -> list[dict[str, Any]]:
    """
    The micro-batches of TRL that an epoch would start with. They are generated and scored; afterwards the trainer, its
    random states, metrics and logs are what they were.
    """
    copied = ("_metrics", "_logs", "_pending_metrics", "_pending_extra_logs")
    before = {name: copy.deepcopy(getattr(trainer, name)) for name in copied}
    before |= {name: getattr(trainer, name) for name in ("_step", "_buffered_inputs", "_window", "_before_window")}
    states, run, tokens = random_states(), copy.deepcopy(trainer.run_state()), trainer.state.num_input_tokens_seen
    trainer._step, trainer._buffered_inputs, trainer.previewed = 0, None, []
    try:
        trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        return trainer.previewed
    finally:
        trainer.previewed = None
        for name, value in before.items():
            setattr(trainer, name, value)
        set_random_states(states)
        trainer.load_run_state(run)
        trainer.state.num_input_tokens_seen = tokens


@contextmanager
def without_trace(trainer: GRPOSeams, num_generations: int, seed: int | None) -> Iterator[None]:
    """
    Evaluation mode with groups of `num_generations`. Afterwards mode, random states, metrics and logs are what they
    were.
    """
    training, generations = trainer.model.training, trainer.num_generations_eval
    metrics, pending = trainer._metrics["eval"], copy.deepcopy(trainer._pending_metrics)
    trainer._metrics["eval"] = copy.deepcopy(metrics)
    trainer.model.eval()
    trainer.num_generations_eval = num_generations
    states = random_states()
    try:
        if seed is not None:
            torch.manual_seed(seed + trainer.accelerator.process_index)
        yield
    finally:
        set_random_states(states)
        trainer.model.train(training)
        trainer.num_generations_eval = generations
        trainer._metrics["eval"], trainer._pending_metrics = metrics, pending
