"""
Critics: the value V of a state, from the forward pass that gives the log-probabilities.

A critic is a submodule of the actor, so that there is one engine, one optimizer and one forward pass, under DDP,
DeepSpeed and FSDP alike. Its values leave this pass as a field of the output: DDP and ZeRO find no other way to the
critic's parameters.

[`Critic`] is the contract: a kind of critic is one subclass and one entry of [`CRITICS`].

- [`HeadCritic`]: a head on the actor's last hidden state. The share of its gradient that reaches the trunk is a
  setting, because a value loss can wreck a policy early on (https://huggingface.co/papers/2009.01325, app. G.1).
- [`ModelCritic`]: a model of its own.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from ..errors import require, require_one_of, require_type
from ..rollouts.kept_states import ActorCriticOutput, KeptStates


HEAD_KINDS = ("linear", "mlp")
CRITIC_INITS = ("policy", "reward")
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
    - `settings`, [`check_settings`]: arguments of `PPOConfig` that belong to it alone, and what is wrong with them;
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
        """A critic whose weights are to be loaded, from what [`description`] returned, for an actor's base model."""
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


class HeadCritic(Critic):
    """
    A head on the actor's last hidden state.

    Args:
        hidden_size (`int`):
            Size of the actor's hidden states.
        head (`str`):
            `"linear"` or `"mlp"`.
        trunk_grad (`float`):
            Share of the value gradient, in [0, 1], that reaches the trunk. 0: the trunk doesn't learn from values.
    """

    kind = "head"
    settings = ("critic_head", "critic_trunk_grad")
    # It starts at zero, and the features that it reads are learned already
    learning_rate_factor = 100.0
    reads_token_ids = False

    def __init__(self, hidden_size: int, head: str = "linear", trunk_grad: float = 0.0) -> None:
        super().__init__()
        self.head = ValueHead(hidden_size, head)
        self.trunk_grad = trunk_grad

    @classmethod
    def check_settings(cls, config: Any) -> None:
        require_one_of("critic_head", config.critic_head, (None, *HEAD_KINDS))
        share = config.critic_trunk_grad
        require(share is None or 0 <= share <= 1, f"critic_trunk_grad={share} is a share: choose it in [0, 1].")

    @classmethod
    def for_policy(cls, policy: Any, config: Any, value_model: Any = None, reward_model: Any = None) -> Self:
        size = policy.config.get_text_config().hidden_size
        return cls(size, config.critic_head or "linear", config.critic_trunk_grad or 0.0)

    @classmethod
    def from_description(cls, description: dict[str, Any], actor: Any) -> Self:
        size, own = actor.config.get_text_config().hidden_size, description["hidden_size"]
        require(
            size == own,
            f"The value head reads hidden states of size {own}, but the policy's have {size}. Load the policy that it "
            "was trained with.",
        )
        return cls(size, description["head"])

    def description(self) -> dict[str, Any]:
        return super().description() | {"head": self.head.kind, "hidden_size": self.head.hidden_size}

    def values(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        if self.trunk_grad == 0.0:
            hidden = hidden.detach()
        elif self.trunk_grad != 1.0:
            hidden = self.trunk_grad * hidden + (1.0 - self.trunk_grad) * hidden.detach()
        values: torch.Tensor = self.head(hidden)
        return values


QUANTIZED = (
    "A critic of its own (critic='model') would start from a quantized model, whose layers can't learn, nor be read "
    "from a checkpoint. Set critic='head', or pass a value_model that is not quantized."
)


class ModelCritic(Critic):
    """
    A model with weights of its own.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A sequence classification model with one output, such as a reward model.
    """

    kind = "model"
    settings = ("critic_init",)
    learning_rate_factor = 1.0
    built_before_trl = True
    backbone: Any
    score: nn.Linear

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._require_weights(model)
        if model.config.num_labels != 1:
            raise ValueError(
                f"The value model has {model.config.num_labels} outputs. Load it with num_labels=1: a value is one "
                "number."
            )
        score: Any = getattr(model, "score", None)
        if score is None:
            raise ValueError(
                f"{type(model).__name__} has no layer `score`, with which causal models score a token. A value must "
                "know nothing of later tokens: use the sequence classifier of a causal model."
            )
        # As children of this module, so that the classification wrapper, which pools, is left out
        self._take(model.base_model, score, model.config)

    @staticmethod
    def _require_weights(model: Any) -> None:
        """Raises `ValueError` for a quantized model, whose layers hold no weights that could learn."""
        require(not getattr(model, "is_quantized", False), QUANTIZED)

    def _take(self, backbone: Any, score: nn.Linear, config: Any) -> None:
        self.backbone, self.score, self.config = backbone, score, config

    @classmethod
    def check_settings(cls, config: Any) -> None:
        require_one_of("critic_init", config.critic_init, (None, *CRITIC_INITS))

    @classmethod
    def for_policy(cls, policy: Any, config: Any, value_model: Any = None, reward_model: Any = None) -> Self:
        source = value_model or (reward_model if config.critic_init == "reward" else policy)
        if isinstance(source, str):
            # In float32 unless said otherwise, as TRL loads what it trains
            own: Any = config.model_init_kwargs if source is policy else None
            settings = {"dtype": torch.float32, "trust_remote_code": config.trust_remote_code, **(own or {})}
            require(settings.get("quantization_config") is None, QUANTIZED)  # before it is loaded
            critic = cls(AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **settings))
            if source is policy:
                nn.init.zeros_(critic.score.weight)  # its file has no such layer
            return critic
        if source is policy:
            return cls.on_backbone_of(policy)
        return cls(source if source is value_model else copy.deepcopy(source))

    @classmethod
    def from_description(cls, description: dict[str, Any], actor: Any) -> Self:
        config = AutoConfig.for_model(**description["config"])
        return cls(AutoModelForSequenceClassification.from_config(config))

    def description(self) -> dict[str, Any]:
        return super().description() | {"config": self.config.to_dict()}

    @classmethod
    def on_backbone_of(cls, policy: Any) -> Self:
        """A copy of a policy's backbone, adapters merged into it, with a head that starts at V = 0."""
        cls._require_weights(policy)
        base = policy
        if hasattr(policy, "merge_and_unload"):  # its layers are the adapter's, and all but those are frozen
            base = copy.deepcopy(policy).merge_and_unload()
            base.requires_grad_(True)
        critic = cls.__new__(cls)
        Critic.__init__(critic)
        config = copy.deepcopy(base.config)
        config.num_labels = 1
        score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False, dtype=base.dtype)
        nn.init.zeros_(score.weight)
        critic._take(copy.deepcopy(base.base_model), score, config)
        return critic

    def values(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        own = self.backbone(**inputs, use_cache=False).last_hidden_state
        values: torch.Tensor = self.score(own.to(self.score.weight.dtype)).squeeze(-1).float()
        return values


# Every kind of critic. A further one is a subclass of [`Critic`] and an entry here.
CRITICS: dict[str, type[Critic]] = {cls.kind: cls for cls in (HeadCritic, ModelCritic)}


def critic_class(kind: str) -> type[Critic]:
    """The class behind the name of a kind. Raises `ValueError` if there is none, or it goes by a different name."""
    require_one_of("critic", kind, CRITICS)
    found = CRITICS[kind]
    own = getattr(found, "kind", None)
    require(
        own == kind,
        f"CRITICS[{kind!r}] is {found.__name__}, whose `kind` is {own!r}: what it saves could not be loaded. Use one "
        "name for both.",
    )
    return found


def base_model_of(actor: Any) -> Any:
    """What a PEFT model is built on; any other model itself."""
    return actor.get_base_model() if hasattr(actor, "get_base_model") else actor


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


def load_critic(directory: str | Path, actor: nn.Module, temperature: float = 1.0) -> Critic:
    """
    Load the critic that a trainer saved in `<output_dir>/critic`, and attach it to a policy.

    ```python
    policy = AutoModelForCausalLM.from_pretrained("out")  # or a PEFT model
    critic = load_critic("out/critic", policy)
    logps, values = logps_and_values(policy, input_ids, attention_mask)
    ```

    Args:
        directory (`str` or `Path`):
            The folder of the critic.
        actor (`PreTrainedModel` or `PeftModel`):
            The policy that was saved with it.
        temperature (`float`):
            Divisor of the logits. With the trainer's, log-probabilities are the trainer's.

    Raises:
        FileNotFoundError: if there is no critic.
        ValueError: if its kind is unknown, or it is a head for hidden states of a different size.
    """
    require_type("directory", directory, str | Path, "Pass the folder of a critic, such as 'out/critic'.")
    require_type("actor", actor, nn.Module, "Pass the loaded policy that was saved with the critic.")
    directory = Path(directory)
    if not (directory / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"No critic in directory={str(directory)!r}: {CONFIG_FILE} is missing. Pass the folder `critic` in the "
            "output_dir of a trainer."
        )
    description = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    base = base_model_of(actor)
    try:
        critic = critic_class(description["critic"]).from_description(description, base)
    except ValueError as error:
        raise ValueError(f"The critic in {directory} can't be loaded. {error}") from error
    critic.load(directory)
    critic.to(base.device).train(base.training)
    add_fused_lm_head(base, temperature)
    critic.attach(base)
    return critic


def logps_and_values(
    actor: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of tokens, and values of states, in one forward pass.

    Args:
        actor (`PreTrainedModel` or `PeftModel`):
            A policy to which [`load_critic`] attached its critic.
        input_ids, attention_mask (`torch.Tensor` of shape `(B, S)`):
            Prompts and completions.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: log-probabilities `(B, S − 1)` of tokens 1 to S − 1, and values `(B, S)`
        of the states after each token.
    """
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    output = actor(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    return output.log_probs, output.state_values
