"""
A critic that is an adapter of its own on the frozen base model that the actor's adapter is on, with a head.

Beside the base model it takes the memory of an adapter. No value gradient reaches the actor's adapter, and no policy
gradient the critic's. The price is a second pass of the base model. It is made inside the actor's forward pass, so
that an engine sees one model, and batches and shared prompts are the actor's.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from ..errors import require, require_count, require_number, require_one_of
from .adapters import check_base_is_frozen, trained_adapter, without_adapter
from .critic_contract import CRITIC, HEAD_KINDS, Critic, ValueHead, base_model_of, base_name
from .switching import using_adapter
from .trunk import load_adapter


ADAPTER_FOLDER = "adapter"  # in the critic's folder, where transformers doesn't take it for an adapter of the policy
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # PEFT's name
OTHER_CRITICS = "Set critic='head' or critic='model'"


def critic_adapter_config(policy: LoraConfig, r: int | None, alpha: float | None) -> LoraConfig:
    """
    The configuration of the critic's adapter: the policy's layers, and its rank and scale unless said otherwise.

    Args:
        policy ([`~peft.LoraConfig`]):
            Of the adapter that the policy trains.
        r, alpha (`int`, `float`, *optional*):
            Rank and α for all layers; `None`: the policy's.
    """
    config = copy.deepcopy(policy)
    config.init_lora_weights = True  # B = 0; others, such as PiSSA, would change the base model
    config.bias, config.modules_to_save, config.trainable_token_indices = "none", None, None  # the head is its own
    if r is not None:
        config.r, config.rank_pattern = r, {}
    if alpha is not None:
        config.lora_alpha, config.alpha_pattern = alpha, {}  # type: ignore[assignment]  # PEFT takes fractions
    return config


class AdapterCritic(Critic):
    """
    An adapter named `critic` and a head on the policy's base model. The head computes in float32. The weights of the
    adapter have the type of the policy's, which is bfloat16 where TRL trains on a quantized base.

    Args:
        policy ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]):
            The policy, changed by PEFT. Its adapter `critic` is made by [`for_policy`] or [`load`].
        head (`str`):
            `"linear"` or `"mlp"`.
    """

    kind = "adapter"
    settings = ("critic_head", "critic_lora_r", "critic_lora_alpha")
    # The policy's rate is that of an adapter already, and the features begin as those of the base model; but the head
    # starts at zero, and a critic has to keep up with a policy that moves
    learning_rate_factor = 10.0

    def __init__(self, policy: Any, head: str = "linear") -> None:
        super().__init__()
        self.head = ValueHead(base_model_of(policy).config.get_text_config().hidden_size, head)
        self._policy = (policy,)  # no submodule: it is the other way round

    @classmethod
    def check_settings(cls, config: Any) -> None:
        require_one_of("critic_head", config.critic_head, (None, *HEAD_KINDS))
        if config.critic_lora_r is not None:
            require_count("critic_lora_r", config.critic_lora_r)
        if config.critic_lora_alpha is not None:
            require_number("critic_lora_alpha", config.critic_lora_alpha)
            require(config.critic_lora_alpha > 0, f"critic_lora_alpha={config.critic_lora_alpha} must be positive.")

    @classmethod
    def check_policy(cls, policy: Any, peft_config: Any) -> None:
        if not isinstance(policy, PeftModel):
            require(
                peft_config is not None,
                "critic='adapter' is an adapter on the frozen base of a policy with an adapter, and this policy "
                f"trains all weights. Pass a peft_config (LoraConfig). {OTHER_CRITICS} to train the whole model.",
            )
            config = peft_config
        else:
            require(
                CRITIC not in policy.peft_config,
                f"The policy has an adapter named {CRITIC!r} already, on {base_name(policy)!r}, and critic='adapter' "
                "adds one of this name. Load it under a different name (adapter_name), or delete it.",
            )
            config = policy.peft_config[trained_adapter(policy)]
        kind = getattr(config.peft_type, "value", config.peft_type)
        require(
            isinstance(config, LoraConfig),
            f"critic='adapter' is LoRA, and PEFT puts it on no base that has an adapter of the type {kind}. Use a "
            f"LoraConfig. {OTHER_CRITICS} otherwise.",
        )

    @classmethod
    def for_policy(cls, policy: Any, config: Any, value_model: Any = None, reward_model: Any = None) -> Self:
        cls.check_policy(policy, None)
        adapter = trained_adapter(policy)
        check_base_is_frozen(policy, f"The adapter {CRITIC!r} on {base_name(policy)!r}", "set critic='head'")
        own = critic_adapter_config(policy.peft_config[adapter], config.critic_lora_r, config.critic_lora_alpha)
        if config.disable_dropout:
            own.lora_dropout = 0.0
        with torch.random.fork_rng():  # so that the first rollouts are those with critic='head'
            # By now every process has a seed of its own, and FSDP would take a part of the new weights from each
            torch.manual_seed(config.seed)
            policy.add_adapter(CRITIC, own)
        critic = cls(policy, config.critic_head or "linear")
        types = {weight.dtype for name, weight in policy.named_parameters() if adapter in name.split(".")}
        for weight in critic.adapter_parameters():
            weight.data = weight.data.to(next(iter(types)))
            weight.requires_grad_(True)
        return critic

    @classmethod
    def from_description(cls, description: dict[str, Any], actor: Any) -> Self:
        require(
            bool(getattr(actor, "peft_config", None)),
            "It is an adapter on the base of a policy with an adapter, and this policy has none. Load the policy with "
            "its adapter (PeftModel.from_pretrained), not merged.",
        )
        text = base_model_of(actor).config.get_text_config()
        for name, what in (("hidden_size", "hidden states of size"), ("vocab_size", "a vocabulary of")):
            own, found = description[name], getattr(text, name)
            require(
                own == found,
                f"Its adapter {CRITIC!r} was trained on {description['base']!r} with {what} {own}, and the base of "
                f"this policy, {base_name(actor)!r}, has {found}. Load the policy that it was trained with.",
            )
        return cls(actor, description["head"])

    def description(self) -> dict[str, Any]:
        text = base_model_of(self.policy).config.get_text_config()
        sizes = {"hidden_size": text.hidden_size, "vocab_size": text.vocab_size}
        return super().description() | {"head": self.head.kind, "base": base_name(self.policy)} | sizes

    @property
    def policy(self) -> Any:
        """The policy on whose base it is."""
        return self._policy[0]

    @property
    def backbone(self) -> Any:
        """The layers that it shares with the policy."""
        return base_model_of(self.policy).base_model

    @property
    def config(self) -> Any:
        """Configuration of the base model."""
        return base_model_of(self.policy).config

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The weights of its adapter, which are held by the layers of the base model."""
        return [weight for name, weight in self.backbone.named_parameters() if CRITIC in name.split(".")]

    def trained_parameters(self) -> list[nn.Parameter]:
        return [*self.adapter_parameters(), *self.head.parameters()]

    def values(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        with using_adapter(self.backbone, CRITIC, inside=True):
            own = self.backbone(**inputs, use_cache=False).last_hidden_state
        values: torch.Tensor = self.head(own)
        return values

    @contextmanager
    def detached(self, actor: nn.Module) -> Iterator[None]:
        """Within this context, `actor` has no weights of the critic, and PEFT knows nothing of its adapter."""
        with super().detached(actor), without_adapter(self.policy, CRITIC):
            yield

    def split_state_dict(
        self, state_dict: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The weights of the actor, and those of the critic: the head's under its own names, the adapter's as here."""
        actor, critic = {}, {}
        for name, value in state_dict.items():
            _, found, own_name = f".{name}".rpartition(f".{CRITIC}.head.")
            if found:
                critic[f"head.{own_name}"] = value
            elif CRITIC in name.split("."):
                critic[name] = value
            else:
                actor[name] = value
        return actor, critic

    def save(self, directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the description, the head, and the adapter as PEFT does, into a folder in `directory`."""
        weights = self.state_dict() if state_dict is None else state_dict
        super().save(directory, {name: value for name, value in weights.items() if name.startswith("head.")})
        adapter = get_peft_model_state_dict(self.policy, state_dict, adapter_name=CRITIC, save_embedding_layers=False)
        folder = directory / ADAPTER_FOLDER
        folder.mkdir(exist_ok=True)
        save_file(
            {name: value.contiguous().cpu() for name, value in adapter.items()},
            folder / ADAPTER_WEIGHTS,
            metadata={"format": "pt"},
        )
        config = copy.deepcopy(self.policy.peft_config[CRITIC])
        config.inference_mode = True
        config.base_model_name_or_path = config.base_model_name_or_path or base_name(self.policy)
        config.save_pretrained(str(folder))

    def load(self, directory: Path) -> None:
        folder = directory / ADAPTER_FOLDER
        if CRITIC not in self.policy.peft_config:
            config = PeftConfig.from_pretrained(str(folder))
            if isinstance(self.policy, PeftModel):
                self.policy.add_adapter(CRITIC, config)
            else:
                active = self.policy.active_adapters()
                self.policy.add_adapter(config, CRITIC)
                self.policy.set_adapter(active)
        base = base_model_of(self.policy)
        attached = getattr(base, CRITIC, None) is self
        with super().detached(base) if attached else nullcontext():  # whose head has the adapter's name in it
            load_adapter(self.policy, folder, CRITIC)
        super().load(directory)
