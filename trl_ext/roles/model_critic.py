"""
A critic that is a model of its own, run on the actor's inputs inside the actor's forward pass.
"""

import copy
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from ..errors import require, require_one_of
from .critic_contract import Critic
from .trunk import gathered


CRITIC_INITS = ("policy", "reward")
QUANTIZED = (
    "A critic of its own (critic='model') would start from a quantized model, whose layers can't learn, nor be read "
    "from a checkpoint. Set critic='head' or critic='adapter', or pass a value_model that is not quantized."
)


def new_score(config: Any, dtype: torch.dtype) -> nn.Linear:
    """A head on a backbone with which V = 0."""
    score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False, dtype=dtype)
    nn.init.zeros_(score.weight)
    return score


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
            if source is policy:  # its file has no such layer, and ZeRO-3 has spread what was made in its place
                critic.score = new_score(critic.config, critic.score.weight.dtype)
            return critic
        if source is policy:
            return cls.on_backbone_of(policy)
        if source is value_model:
            return cls(source)
        with gathered(source):
            return cls(copy.deepcopy(source))

    @classmethod
    def from_description(cls, description: dict[str, Any], actor: Any) -> Self:
        config = AutoConfig.for_model(**description["config"])
        return cls(AutoModelForSequenceClassification.from_config(config))

    def description(self) -> dict[str, Any]:
        return super().description() | {"config": self.config.to_dict()}

    @classmethod
    def on_backbone_of(cls, policy: Any) -> Self:
        """
        A copy of a policy's backbone, adapters merged into it, with a head that starts at V = 0. Of a policy that
        ZeRO-3 has spread, every process holds a whole copy until there is an engine.
        """
        cls._require_weights(policy)
        with gathered(policy):
            if hasattr(policy, "merge_and_unload"):  # its layers are the adapter's, and all but those are frozen
                base = copy.deepcopy(policy).merge_and_unload()
                base.requires_grad_(True)
                backbone = base.base_model
            else:
                base, backbone = policy, copy.deepcopy(policy.base_model)
        critic = cls.__new__(cls)
        Critic.__init__(critic)
        config = copy.deepcopy(base.config)
        config.num_labels = 1
        critic._take(backbone, new_score(config, base.dtype), config)
        return critic

    def values(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        own = self.backbone(**inputs, use_cache=False).last_hidden_state
        values: torch.Tensor = self.score(own.to(self.score.weight.dtype)).squeeze(-1).float()
        return values
