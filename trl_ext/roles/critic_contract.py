"""
The contract of critics: what a kind of critic must say, how it is attached to an actor, and how it is saved.

A critic is a submodule of the actor, so that there is one engine, one optimizer and one forward pass, under DDP,
DeepSpeed and FSDP alike. Its values leave this pass as a field of the output: DDP and ZeRO find no other way to the
critic's parameters.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..errors import require_one_of
from ..rollouts.kept_states import ActorCriticOutput, KeptStates


HEAD_KINDS = ("linear", "mlp")
# The name of a critic among the submodules of an actor, and of its folder beside the actor's files
CRITIC = "critic"
CONFIG_FILE, WEIGHTS_FILE = "critic_config.json", "critic.safetensors"


class Float32Linear(nn.Linear):
    """Computes in float32, whatever the type of its weights."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.bias is not None
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


class ValueHead(nn.Module):
    """
    From hidden states to values, in float32 whatever the trunk's type. It starts at V = 0 everywhere, so that it
    changes neither the advantages nor a shared trunk before it has learned something.

    Args:
        hidden_size (`int`):
            Size of the hidden states.
        kind (`str`):
            `"linear"`, or `"mlp"` with one hidden layer of the same size.
    """

    def __init__(self, hidden_size: int, kind: str = "linear") -> None:
        super().__init__()
        require_one_of("kind", kind, HEAD_KINDS)
        self.hidden_size, self.kind = hidden_size, kind
        self.dense = Float32Linear(hidden_size, hidden_size, dtype=torch.float32) if kind == "mlp" else None
        self.out = Float32Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(B, S, H)` to `(B, S)`."""
        with torch.autocast(hidden.device.type, enabled=False):
            if self.dense is not None:
                hidden = nn.functional.gelu(self.dense(hidden))
            values: torch.Tensor = self.out(hidden).squeeze(-1)
            return values


class Critic(nn.Module):
    """
    Base of the critics, and their contract. A kind of critic is a subclass with

    - `kind`: its name, in `PPOConfig.critic`, in [`CRITICS`] and in saved files;
    - `settings`, [`check_settings`]: arguments of `PPOConfig` that not every kind takes, and what is wrong with them;
    - [`check_policy`]: which policies can't have it;
    - `learning_rate_factor`: its default learning rate, as a multiple of the policy's;
    - [`for_policy`]: how it is built for a policy, and `built_before_trl`: when;
    - [`values`]: the value of a state, and `reads_token_ids`: what from;
    - [`trained_parameters`]: what is trained;
    - [`detached`], [`split_state_dict`]: how it is separated from the policy's weights for saving;
    - [`description`], [`from_description`]: what is saved beside its weights, and how it is built from that.

    `kind`, `learning_rate_factor`, `for_policy`, `values` and `from_description` must be there; the others have
    defaults, for a critic whose parameters are all in its own module.

    Attributes:
        active (`bool`):
            If `False`, passes of the actor with its fused head return no values and compute none.

    Raises:
        TypeError: when a subclass that has a `kind` is defined without a part of the contract.
    """

    kind: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    learning_rate_factor: ClassVar[float]
    # Whether it is built before TRL and PEFT wrap and change the policy, as a critic that copies weights must be
    built_before_trl: ClassVar[bool] = False
    # Whether it runs a model of its own on them: then left padding changes its values, unless positions are relative
    reads_token_ids: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "kind"):
            return  # a common base of several kinds
        missing = [] if hasattr(cls, "learning_rate_factor") else ["learning_rate_factor"]
        for name in ("for_policy", "from_description", "values"):
            own, inherited = getattr(cls, name), getattr(Critic, name)
            if getattr(own, "__func__", own) is getattr(inherited, "__func__", inherited):
                missing.append(name)
        if missing:
            lacks = f"{cls.__name__} is half a critic: it lacks {', '.join(missing)}."
            raise TypeError(f"{lacks} The contract is in the docstring of trl_ext.roles.critic.Critic.")

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self._wanted = False  # in a pass of the actor with the fused head
        self._read: list[torch.Tensor] | None = None
        self._hidden: torch.Tensor | None = None
        self._inputs: dict[str, Any] = {}

    @classmethod
    def check_settings(cls, config: Any) -> None:
        """Raise `ValueError` for bad values of this kind's `settings` in a `PPOConfig`."""

    @classmethod
    def check_policy(cls, policy: Any, peft_config: Any) -> None:
        """Raise `ValueError` for a policy, or the name of one, that can't have this critic. Nothing is loaded yet."""

    @classmethod
    def for_policy(cls, policy: Any, config: Any, value_model: Any = None, reward_model: Any = None) -> Self:
        """
        A new critic for a policy.

        Args:
            policy (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The policy that the user passed, or the trainer's if the critic is not `built_before_trl`.
            config (`PPOConfig`):
                Its settings.
            value_model, reward_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
                Sequence classification models that the user passed.
        """
        raise NotImplementedError

    @classmethod
    def from_description(cls, description: dict[str, Any], actor: Any) -> Self:
        """A critic whose weights are to be loaded, from what [`description`] returned, for a model or PEFT model."""
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """What [`from_description`] needs, as JSON."""
        return {"critic": self.kind}

    def values(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """V `(B, S)` after each token, from the actor's last hidden state `(B, S, H)` and its inputs."""
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        return self.values(hidden, inputs)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters that learn with the critic's learning rate, and in steps that leave the policy as it is."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @contextmanager
    def detached(self, actor: nn.Module) -> Iterator[None]:
        """Within this context, `actor` (a base model) has no weights of the critic."""
        delattr(actor, CRITIC)
        try:
            yield
        finally:
            actor.add_module(CRITIC, self)

    def split_state_dict(
        self, state_dict: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The weights of the actor, and those of the critic under the critic's own names."""
        actor, critic = {}, {}
        for name, value in state_dict.items():
            before, found, own_name = name.partition(f"{CRITIC}.")
            if found and (not before or before.endswith(".")):
                critic[own_name] = value
            else:
                actor[name] = value
        return actor, critic

    def attach(self, actor: PreTrainedModel) -> None:
        """
        Make this the critic of a causal language model that has TRL's fused head (under PEFT, of the base model). From
        then on its passes with the fused head return [`ActorCriticOutput`]. Generation doesn't change.
        """
        actor.add_module(CRITIC, self)
        KeptStates.of(actor)
        actor.register_forward_pre_hook(self._before, with_kwargs=True)
        actor.base_model.register_forward_hook(self._keep)
        actor.register_forward_hook(self._after)

    @contextmanager
    def reading(self) -> Iterator[list[torch.Tensor]]:
        """
        Within this context, passes of the actor without the fused head compute values, too. They are appended to the
        list that this returns, `(B, S)` each, and don't leave the pass in its output: no gradient flows.
        """
        self._read = []
        try:
            yield self._read
        finally:
            self._read, self._wanted, self._hidden, self._inputs = None, False, None, {}

    def _before(self, actor: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._wanted = self._read is not None or (self.active and bool(kwargs.get("fused_lm_head")))
        names = ("input_ids", "attention_mask", "position_ids")
        self._inputs = {name: kwargs[name] for name in names if name in kwargs} if self._wanted else {}

    def _keep(self, backbone: nn.Module, args: Any, output: Any) -> None:
        if self._wanted:
            self._hidden = output.last_hidden_state

    def _after(self, actor: nn.Module, args: Any, output: Any) -> Any:
        if not self._wanted:
            return output
        hidden, inputs = self._hidden, self._inputs
        self._wanted, self._hidden, self._inputs = False, None, {}
        assert hidden is not None
        if self._read is not None:
            self._read.append(self(hidden, inputs).detach())
            return output
        return ActorCriticOutput(**output, state_values=self(hidden, inputs))

    def save(self, directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """
        Write the critic's description and weights.

        Args:
            directory (`Path`):
                Folder, which is made if it isn't there.
            state_dict (`dict`, *optional*):
                All of its weights, if the module of this process holds only a part of them.
        """
        directory.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        save_file({name: value.contiguous().cpu() for name, value in weights.items()}, directory / WEIGHTS_FILE)
        (directory / CONFIG_FILE).write_text(json.dumps(self.description(), indent=2) + "\n", encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Read the weights that [`save`] wrote."""
        self.load_state_dict(load_file(directory / WEIGHTS_FILE))


def base_model_of(actor: Any) -> Any:
    """What a PEFT model is built on; any other model itself."""
    return actor.get_base_model() if hasattr(actor, "get_base_model") else actor


def base_name(policy: Any) -> str:
    """The name or folder of the base model of a policy, or its class."""
    base = base_model_of(policy)
    return str(base.config.name_or_path or type(base).__name__)


def critic_of(actor: nn.Module) -> Critic | None:
    """The critic that is attached to a model or to the base model of a PEFT model."""
    critic = getattr(base_model_of(actor), CRITIC, None)
    return critic if isinstance(critic, Critic) else None


@contextmanager
def without_critic(actor: nn.Module) -> Iterator[None]:
    """
    Within this context, a model or PEFT model has no weights of a critic: for saving, for vLLM, and for PEFT, which
    looks layers up by their names.
    """
    critic = critic_of(actor)
    if critic is None:
        yield
        return
    with critic.detached(base_model_of(actor)):
        yield
