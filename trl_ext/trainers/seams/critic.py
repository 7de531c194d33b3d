"""
What a policy with a critic needs of the private methods of TRL and transformers: values from TRL's own forward passes,
parameter groups, and files of two models.

Without a critic, every override here does exactly what its parent does.

When what happens:

- construction: TRL wraps the policy, and the reference is there; then [`attach_critic`] is called;
- a pass over a generation batch or a micro-batch: `with_extras` adds the values to what TRL's pass returns;
- `training_step`: the fused head works on small tiles on a CPU;
- first step: `create_optimizer` gives the critic its own learning rate;
- a checkpoint: the policy is saved without the critic, the critic into a folder of its own, the reference if it is
  refreshed; loading is the reverse.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.kernels import chunked_logprob
from trl.trainer.utils import disable_dropout_in_model

from ...roles.critic import CRITIC, Critic, base_model_of, without_critic
from ...roles.switching import staying_trainable
from ...rollouts.kept_states import KeptStates
from .grpo import GRPOSeams
from .parts import parts_are_all, writes_parts
from .whole_checkpoints import gathered_weights, spread_weights


logger = get_logger(__name__)

# Tokens that TRL's fused head takes at a time on a CPU. The temporaries of TRL's own 4,096 fit into no cache; what a
# step costs with either is in benchmarks/RESULTS.md.
CPU_TILE = 256
# Weights of a critic beside the parts of a trained adapter (FSDP)
CRITIC_BESIDE_PARTS = "trl_ext_critic.pt"


@contextmanager
def tiles_that_fit_a_cache(device: torch.device) -> Iterator[None]:
    """On a CPU, TRL's fused head works on smaller tiles, forward and backward; the numbers differ by rounding."""
    before = chunked_logprob.TOKEN_CHUNK_SIZE
    if device.type == "cpu":
        chunked_logprob.TOKEN_CHUNK_SIZE = min(before, CPU_TILE)
    try:
        yield
    finally:
        chunked_logprob.TOKEN_CHUNK_SIZE = before


class _Recording:
    """Stands for a model in a pass of TRL's: lets it score completions only, and keeps the values that it returns."""

    def __init__(self, model: Any, completion_columns: int) -> None:
        self.model = model
        self.columns = completion_columns + 1  # the states before each token, and after the last
        self.state_values: list[torch.Tensor] = []

    def __call__(self, **inputs: Any) -> Any:
        inputs["labels"] = inputs["labels"][:, -self.columns :]
        output = self.model(**inputs)
        state_values = getattr(output, "state_values", None)
        if state_values is not None:
            self.state_values.append(state_values)
        return output


# Roles


def attach_critic(trainer: Any, critic: Critic) -> None:
    """Make `critic` part of the policy, after TRL has wrapped the policy: PEFT freezes and casts what it finds."""
    trainer.critic = critic.to(trainer.accelerator.device)
    if is_deepspeed_zero3_enabled():
        # ZeRO-3 keeps all trained weights in one buffer of one type, and steps on a copy in float32
        trained = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
        critic.to(next(iter(trained), torch.float32))
    if trainer.args.disable_dropout:
        disable_dropout_in_model(critic)
    critic.attach(base_model_of(trainer.model))
    if trainer.ref_model is not None:
        KeptStates.of(trainer.accelerator.unwrap_model(trainer.ref_model))
    if trainer.use_vllm:
        synchronise = trainer.vllm_generation.sync_weights

        @wraps(synchronise)
        def without_values(*args: Any, **kwargs: Any) -> Any:
            with without_critic(trainer.model):
                return synchronise(*args, **kwargs)

        trainer.vllm_generation.sync_weights = without_values


def reads_images(trainer: Any) -> bool:
    """Whether the policy is a vision-language model."""
    return bool(trainer._is_vlm)


def metrics_of(trainer: Any, training: bool) -> dict[str, list[float]]:
    """What TRL averages into its next log of training or of evaluation."""
    metrics: dict[str, list[float]] = trainer._metrics["train" if training else "eval"]
    return metrics


# Parameters and files


def group_critic_apart(optimizer: torch.optim.Optimizer, critic: Critic, learning_rate: float) -> None:
    """Move the critic's parameters into groups of their own, which keep the weight decay of the groups they leave."""
    own = {id(parameter) for parameter in critic.trained_parameters()}
    groups = []
    for group in optimizer.param_groups:
        apart = [parameter for parameter in group["params"] if id(parameter) in own]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        own -= {id(parameter) for parameter in apart}
        if apart:
            groups.append({**group, "params": apart})
    if own:  # an optimizer that was made before there was a critic
        groups.append({"params": [p for p in critic.trained_parameters() if id(p) in own]})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in groups:
        optimizer.add_param_group({**group, "lr": learning_rate, "is_critic": True})


def restore_critic(critic: Critic, checkpoint: str) -> None:
    """Load a critic from a checkpoint, which may be a trainer's without one."""
    if os.path.isdir(os.path.join(checkpoint, CRITIC)):
        critic.load(Path(checkpoint) / CRITIC)
    else:
        logger.warning(f"{checkpoint} has no critic: the policy resumes with a new one.")


class CriticSeams(GRPOSeams):
    """
    [`GRPOSeams`] for a policy that has a critic inside.

    Attributes:
        critic ([`~trl_ext.roles.critic.Critic`], *optional*):
            The critic, once [`attach_critic`] was called. `None`: every method does what its parent does.
    """

    critic: Critic | None = None
    # Wider than upstream's annotation
    ref_model: Any

    def with_extras(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        critic, forward = self.critic, super().with_extras(forward)
        if critic is None:
            return forward

        @wraps(forward)
        def with_values(model: Any, *args: Any, **kwargs: Any) -> Any:
            kept = inspect.signature(forward).bind(model, *args, **kwargs).arguments["logits_to_keep"]
            recording = _Recording(model, kept)
            # In the loss, and once for a generation batch: not in the pass of the reference
            critic.active = self._loss_inputs is not None or not (self.batch.extras or self.batch.credits_late)
            try:
                result = forward(recording, *args, **kwargs)
            finally:
                critic.active = True
            if not recording.state_values:
                return result
            columns = result[0].size(1) + 1  # states before each completion token, and after the last
            return (*result, torch.cat(recording.state_values)[:, -columns:])

        return with_values

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        # PEFT freezes all adapters but the active one when TRL goes back to it from the reference
        with staying_trainable([] if self.critic is None else self.critic.trained_parameters()):
            return super()._generate_and_score_completions(inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.critic is None:
            return super().training_step(*args, **kwargs)
        # All passes of a step, and the backward pass, which reads the size of a tile again
        with tiles_that_fit_a_cache(self.accelerator.device):
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.critic is not None:
            group_critic_apart(optimizer, self.critic, self.args.critic_learning_rate)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.critic is None:
            super()._save(output_dir, state_dict)
            return
        target = Path(output_dir or str(self.args.output_dir)) / CRITIC
        own = None
        if state_dict is not None:
            state_dict, own = self.critic.split_state_dict(state_dict)
        with without_critic(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)
        if self.args.should_save and (own is None or own):
            self.critic.save(target, own)

    def write_own_files(self, directory: Path) -> None:
        super().write_own_files(directory)
        if self.critic is not None and writes_parts(self) and not parts_are_all(self):
            policy = self.accelerator.unwrap_model(self.model)
            weights = gathered_weights(policy, {id(weight) for weight in self.critic.trained_parameters()})
            if self.args.should_save:
                torch.save(weights, directory / CRITIC_BESIDE_PARTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.critic is None or self.is_fsdp_enabled:  # FSDP: one sharded checkpoint of both
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_critic_beside_parts(resume_from_checkpoint)
            return
        with without_critic(self.accelerator.unwrap_model(self.model if model is None else model)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_critic(self.critic, resume_from_checkpoint)

    def _load_critic_beside_parts(self, checkpoint: str) -> None:
        if self.critic is None or not writes_parts(self) or parts_are_all(self):
            return
        file = Path(checkpoint) / CRITIC_BESIDE_PARTS
        if file.exists():
            weights = torch.load(file, map_location="cpu", weights_only=True)
            spread_weights(self.accelerator.unwrap_model(self.model), weights)
        else:
            logger.warning(f"{checkpoint} has no critic beside its parts: the policy resumes with a new one.")

    def _load_best_model(self) -> None:
        if self.critic is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:  # one checkpoint of both
            super()._load_best_model()
            self._load_critic_beside_parts(str(self.state.best_model_checkpoint))
            return
        with without_critic(self.accelerator.unwrap_model(self.model)):
            super()._load_best_model()
        restore_critic(self.critic, str(self.state.best_model_checkpoint))
