"""
A critic that is a head on the actor's last hidden state. The share of its gradient that reaches the trunk is a
setting, because a value loss can wreck a policy early on (https://huggingface.co/papers/2009.01325, app. G.1).
"""

from typing import Any, Self

import torch

from ..errors import require, require_one_of
from .critic_contract import HEAD_KINDS, Critic, ValueHead, base_model_of


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
        size, own = base_model_of(actor).config.get_text_config().hidden_size, description["hidden_size"]
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
