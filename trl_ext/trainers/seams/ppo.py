"""
What an actor with a critic needs of TRL's and transformers' private methods: values from TRL's own forwards, files of
two models, parameter groups, a reference that the user brings.
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
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.kernels import chunked_logprob
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from ...roles.critic import CRITIC, Critic, LastColumns, split_state_dict, without_critic
from ..grpo import GRPOTrainer


logger = get_logger(__name__)

REFERENCE_FILE = "trl_ext_reference.pt"
# Tokens that TRL's fused head takes at a time on a CPU: its own 4,096 make temporaries that leave every cache. What a
# step costs with either is in benchmarks/RESULTS.md.
CPU_TILE = 256


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
    """Stands for a model in a call of TRL's: has it score completions only, and keeps the values that it returns."""

    def __init__(self, model: Any, completion_columns: int) -> None:
        self.model = model
        self.states = completion_columns + 1  # before each token, and after the last
        self.state_values: list[torch.Tensor] = []

    def __call__(self, **inputs: Any) -> Any:
        inputs["labels"] = inputs["labels"][:, -self.states :]
        output = self.model(**inputs)
        values = getattr(output, "state_values", None)
        if values is not None:
            self.state_values.append(values)
        return output


class RefreshReference(TrainerCallback):
    """
    Moves the reference towards the policy every `ref_model_sync_steps` optimizer steps, like TRL's
    `SyncRefModelCallback`, for policies with a critic and for adapters: there the reference is the adapter `ref`.
    """

    def __init__(self, trainer: "ActorCriticSeams") -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        trainer, alpha = self.trainer, args.ref_model_mixup_alpha
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.ref_model is not None:
            reference = trainer.accelerator.unwrap_model(trainer.ref_model)
            with without_critic(policy):
                SyncRefModelCallback.sync_target_model(policy, reference, alpha)
            return
        parameters = dict(policy.named_parameters())
        for name, reference in parameters.items():
            if ".ref." in name:
                newer = parameters[name.replace(".ref.", ".default.")]
                reference.data.mul_(1 - alpha).add_(newer.data, alpha=alpha)


class ActorCriticSeams(GRPOTrainer):
    """
    [`GRPOTrainer`] with a critic inside its policy.

    Attributes:
        critic ([`~trl_ext.roles.critic.Critic`]):
            The critic.
    """

    critic: Critic
    # Narrower than upstream's annotations, or wider
    args: Any
    ref_model: Any

    # Roles

    def attach_critic(self, critic: Critic) -> None:
        """Make `critic` part of the policy. After TRL has wrapped it: PEFT freezes and casts what it finds."""
        self.critic = critic.to(self.accelerator.device)
        if is_deepspeed_zero3_enabled():
            # It keeps what is trained in one buffer, of one type, and steps on a copy in float32
            trained = {parameter.dtype for parameter in self.model.parameters() if parameter.requires_grad}
            critic.to(next(iter(trained), torch.float32))
        if self.args.disable_dropout:
            disable_dropout_in_model(critic)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        critic.attach(base)
        if self.ref_model is not None:  # which TRL loaded
            LastColumns(self.accelerator.unwrap_model(self.ref_model))
        if self.use_vllm:
            synchronise = self.vllm_generation.sync_weights

            @wraps(synchronise)
            def without_values(*args: Any, **kwargs: Any) -> Any:
                with without_critic(self.model):
                    return synchronise(*args, **kwargs)

            self.vllm_generation.sync_weights = without_values  # type: ignore[method-assign]

    def use_reference(self, model: nn.Module) -> None:
        """Take `model` for the reference, and prepare it as TRL does its own."""
        if self.args.disable_dropout:
            disable_dropout_in_model(model)
        add_fused_lm_head(model, self.temperature, self.args.cast_lm_head_to_fp32)  # type: ignore[arg-type]
        LastColumns(model)  # type: ignore[arg-type]
        self.ref_model = self.prepared(model)

    def prepared(self, model: nn.Module) -> Any:
        """A model that isn't trained, on this process's device and sharded as the backend does it."""
        model.requires_grad_(False).eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True, device_placement=True)

    def keep_reference_fresh(self) -> None:
        """See [`RefreshReference`]."""
        if self.ref_model is None and "ref" not in self.model.peft_config:
            with without_critic(self.model):  # whose layers may have the names of those that are adapted
                self.model.add_adapter("ref", self.model.peft_config["default"])
            weights = dict(self.model.named_parameters())
            for name, reference in weights.items():
                if ".ref." in name:
                    reference.data.copy_(weights[name.replace(".ref.", ".default.")].data)
        self.add_callback(RefreshReference(self))

    # Forward

    def with_extras(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def with_values(model: Any, *args: Any, **kwargs: Any) -> Any:
            columns = inspect.signature(forward).bind(model, *args, **kwargs).arguments["logits_to_keep"]
            recording = _Recording(model, columns)
            result = forward(recording, *args, **kwargs)
            if not recording.state_values:
                return result
            states = result[0].size(1) + 1  # before each completion token, and after the last
            return (*result, torch.cat(recording.state_values)[:, -states:])

        return with_values

    def pass_without_loss(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Once a generation batch: not in the pass of the reference
        self.critic.active = not self.batch.extras and not self.batch.credits_late
        try:
            return super().pass_without_loss(forward, *args, **kwargs)
        finally:
            self.critic.active = True

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # All passes of a step, and the backward, which reads the size of a tile again
        with tiles_that_fit_a_cache(self.accelerator.device):
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss

    # Parameters and files

    def critic_parameters(self) -> list[nn.Parameter]:
        """What of the policy's parameters is the critic's."""
        return [parameter for parameter in self.critic.parameters() if parameter.requires_grad]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        own = {id(parameter) for parameter in self.critic_parameters()}
        groups = []
        for group in optimizer.param_groups:
            apart = [parameter for parameter in group["params"] if id(parameter) in own]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            own -= {id(parameter) for parameter in apart}
            if apart:
                groups.append({**group, "params": apart})
        if own:  # an optimizer that was made before there was a critic
            groups.append({"params": [p for p in self.critic_parameters() if id(p) in own]})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        for group in groups:
            optimizer.add_param_group({**group, "lr": self.args.critic_learning_rate, "is_critic": True})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        target = Path(output_dir or str(self.args.output_dir)) / CRITIC
        if state_dict is None:
            own = None
        else:
            state_dict, own = split_state_dict(state_dict)
        with without_critic(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)
        if self.args.should_save and (own is None or own):
            self.critic.save(target, own)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # one sharded checkpoint of both
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with without_critic(self.accelerator.unwrap_model(self.model if model is None else model)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_critic(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # one checkpoint of both
            super()._load_best_model()
            return
        with without_critic(self.accelerator.unwrap_model(self.model)):
            super()._load_best_model()
        self._load_critic(str(self.state.best_model_checkpoint))

    def _load_critic(self, checkpoint: str) -> None:
        if os.path.isdir(os.path.join(checkpoint, CRITIC)):
            self.critic.load(Path(checkpoint) / CRITIC)
        else:
            logger.warning(f"{checkpoint} has no critic: it starts anew, the policy goes on.")

    # A reference that is refreshed is part of the run

    @property
    def _keeps_reference(self) -> bool:
        """Whether checkpoints hold it: an adapter is saved with the others, and what is sharded is not kept."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return self.args.sync_ref_model and self.ref_model is not None and not sharded

    def write_checkpoint(self, model: Any, trial: Any, directory: Path) -> None:
        if self._keeps_reference and self.args.should_save and not self.args.save_only_model:
            reference = self.accelerator.unwrap_model(self.ref_model)
            directory.mkdir(exist_ok=True)
            torch.save(reference.state_dict(), os.path.join(directory, REFERENCE_FILE))
        super().write_checkpoint(model, trial, directory)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = os.path.join(checkpoint or "", REFERENCE_FILE)
        if checkpoint is None or not self._keeps_reference:
            return
        if os.path.exists(file):
            reference = self.accelerator.unwrap_model(self.ref_model)
            reference.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        else:
            logger.warning(f"{checkpoint} has no refreshed reference: it starts anew, the policy goes on.")
