"""
Critics: the value V of a state, from the forward that gives the log-probabilities.

A critic is a submodule of the actor, so that there is one engine, one optimizer and one forward, under DDP, DeepSpeed
and FSDP alike. Its values leave that forward as a field of the output: what leaves it in another way is lost on them.

- [`HeadCritic`]: a head on the actor's own last hidden state. How much of its gradient reaches the trunk is a setting:
  a value loss can wreck a policy early on (https://huggingface.co/papers/2009.01325, app. G.1).
- [`ModelCritic`]: a model of its own.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head


HEAD_KINDS = ("linear", "mlp")
# The name of a critic among the submodules of an actor, and of its folder beside the actor's files
CRITIC = "critic"
CONFIG_FILE, WEIGHTS_FILE = "critic_config.json", "critic.safetensors"


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """
    TRL's output of a fused forward, with values.

    Args:
        state_values (`torch.Tensor` of shape `(batch, seq_len)`):
            V after each token of the input.
    """

    state_values: torch.Tensor | None = None


class LastColumns:
    """
    Makes a causal language model that has TRL's fused head score only the columns that it is given labels for, counted
    from the last. TRL scores all columns where there is no Triton, and leaves out what has no label afterwards.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model (the base model, under PEFT). Its forward is as it was where labels have all columns.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.columns: int | None = None  # during a fused forward
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.base_model.register_forward_hook(self._cut)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.columns = kwargs["labels"].size(1) if kwargs.get("fused_lm_head") else None

    def _cut(self, backbone: nn.Module, args: Any, output: Any) -> Any:
        if self.columns is not None:
            output.last_hidden_state = output.last_hidden_state[:, -self.columns :]
            self.columns = None
        return output


class Float32Linear(nn.Linear):
    """Computes in float32, whatever the type of its weights."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.bias is not None
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


class ValueHead(nn.Module):
    """
    From hidden states to values, in float32 whatever the trunk's type. Starts at V = 0 everywhere: it moves neither
    the advantages nor a shared trunk before it has learned something.

    Args:
        hidden_size (`int`):
            Size of the hidden states.
        kind (`str`):
            `"linear"`, or `"mlp"` with one hidden layer of the same size.
    """

    def __init__(self, hidden_size: int, kind: str = "linear") -> None:
        super().__init__()
        if kind not in HEAD_KINDS:
            raise ValueError(f"kind={kind!r} is unknown. Choose one of {', '.join(map(repr, HEAD_KINDS))}.")
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
    Base of the critics; see [`attach`].

    Attributes:
        active (`bool`):
            `False`: fused forwards of the actor give no values, and cost nothing for them.
    """

    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self._wanted = False  # during a fused forward of the actor
        self._hidden: torch.Tensor | None = None
        self._inputs: dict[str, Any] = {}

    def values(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """V `(B, S)`, from the actor's last hidden state `(B, S, H)` and its inputs."""
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        return self.values(hidden, inputs)

    def attach(self, actor: PreTrainedModel) -> None:
        """
        Make this the critic of a causal language model that has TRL's fused head (of the base model, under PEFT): its
        fused forwards return [`ActorCriticOutput`] from now on. Generation is left alone.
        """
        actor.add_module(CRITIC, self)
        LastColumns(actor)
        actor.register_forward_pre_hook(self._before, with_kwargs=True)
        actor.base_model.register_forward_hook(self._keep)
        actor.register_forward_hook(self._after)

    def _before(self, actor: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._wanted = self.active and bool(kwargs.get("fused_lm_head"))
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
        return ActorCriticOutput(**output, state_values=self(hidden, inputs))

    # Files

    def description(self) -> dict[str, Any]:
        """What [`load_critic`] needs beside the weights."""
        return {"critic": self.kind}

    def save(self, directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """
        Write the critic.

        Args:
            directory (`Path`):
                Where to.
            state_dict (`dict`, *optional*):
                Its whole weights, where the module itself holds only a part of them.
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
            Share of the value gradient, in [0, 1], that reaches the trunk. 0: the critic reads, and doesn't write.
    """

    kind = "head"

    def __init__(self, hidden_size: int, head: str = "linear", trunk_grad: float = 0.0) -> None:
        super().__init__()
        self.head = ValueHead(hidden_size, head)
        self.trunk_grad = trunk_grad

    def values(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        if self.trunk_grad == 0.0:
            hidden = hidden.detach()
        elif self.trunk_grad != 1.0:
            hidden = self.trunk_grad * hidden + (1.0 - self.trunk_grad) * hidden.detach()
        values: torch.Tensor = self.head(hidden)
        return values

    def description(self) -> dict[str, Any]:
        return super().description() | {"head": self.head.kind, "hidden_size": self.head.hidden_size}


class ModelCritic(Critic):
    """
    A model with weights of its own.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A sequence classification model with one output, such as a reward model.
    """

    kind = "model"
    backbone: Any
    score: nn.Linear

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
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

    def _take(self, backbone: Any, score: nn.Linear, config: Any) -> None:
        self.backbone, self.score, self.config = backbone, score, config

    @classmethod
    def on_backbone_of(cls, policy: Any) -> "ModelCritic":
        """A copy of a policy's backbone, adapters merged into it, with a head that starts at V = 0."""
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

    def description(self) -> dict[str, Any]:
        return super().description() | {"config": self.config.to_dict()}


def critic_of(actor: nn.Module) -> Critic | None:
    """The critic that is attached to a model or to the base model of a PEFT model."""
    base = actor.get_base_model() if hasattr(actor, "get_base_model") else actor  # type: ignore[operator]
    critic = getattr(base, CRITIC, None)
    return critic if isinstance(critic, Critic) else None


@contextmanager
def without_critic(actor: nn.Module) -> Iterator[None]:
    """The actor as everything else knows it: saving, vLLM and references see no weights of a critic."""
    base: nn.Module = actor.get_base_model() if hasattr(actor, "get_base_model") else actor  # type: ignore[operator]
    critic = base._modules.pop(CRITIC, None)
    try:
        yield
    finally:
        if critic is not None:
            base._modules[CRITIC] = critic


def split_state_dict(
    state_dict: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of an actor, and those of its critic under the critic's own names."""
    actor, critic = {}, {}
    for name, value in state_dict.items():
        before, found, own_name = name.partition(f"{CRITIC}.")
        if found and (not before or before.endswith(".")):
            critic[own_name] = value
        else:
            actor[name] = value
    return actor, critic


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
            That logits are divided by: the one of the trainer, for its log-probabilities.

    Raises:
        FileNotFoundError: if there is no critic.
        ValueError: if it is a head for hidden states of another size.
    """
    directory = Path(directory)
    if not (directory / CONFIG_FILE).exists():
        raise FileNotFoundError(f"No critic in {directory}: {CONFIG_FILE} is missing.")
    description = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    base: Any = actor.get_base_model() if hasattr(actor, "get_base_model") else actor  # type: ignore[operator]
    critic: Critic
    if description["critic"] == HeadCritic.kind:
        size = base.config.get_text_config().hidden_size
        if size != description["hidden_size"]:
            raise ValueError(
                f"The value head in {directory} reads hidden states of size {description['hidden_size']}, but the "
                f"policy's have {size}. Load the policy that it was trained with."
            )
        critic = HeadCritic(size, description["head"])
    else:
        config = AutoConfig.for_model(**description["config"])
        critic = ModelCritic(AutoModelForSequenceClassification.from_config(config))
    critic.load(directory)
    critic.to(base.device).train(base.training)
    add_fused_lm_head(base, temperature)
    critic.attach(base)
    return critic


def logps_and_values(
    actor: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of tokens, and values of states, in one forward.

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
