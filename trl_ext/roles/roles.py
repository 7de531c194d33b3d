"""
Who plays which role in a trainer, and on which weights: actor, critic, rewards, reference. A role is an adapter on the
policy's base model, the base model alone, or a model of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from ..errors import require, require_one_of
from .adapters import trained_adapter
from .critic_contract import CRITIC, Critic, base_model_of, base_name
from .switching import using_adapter
from .trunk import REFERENCE_ADAPTER


ACTOR, REFERENCE = "actor", "reference"


@dataclass(frozen=True)
class Role:
    """
    A role.

    Args:
        model (`torch.nn.Module`):
            What is called: the policy, or a model of its own.
        adapter (`str`, *optional*):
            The adapter of the policy with which it is called. `None`: none.
        head (`torch.nn.Module`, *optional*):
            What turns its states into values or scores.
        on_base (`bool`):
            Whether it shares the policy's base model.
    """

    model: Any
    adapter: str | None
    head: nn.Module | None
    on_base: bool

    def parameters(self) -> list[nn.Parameter]:
        """Its weights. Of a role on the policy's base, those that are not the base's or another adapter's."""
        own = [] if self.head is None else list(self.head.parameters())
        if not self.on_base:
            return [*self.model.parameters(), *own]
        adapters = {*getattr(self.model, "peft_config", {})}
        if not adapters:
            return [w for name, w in self.model.named_parameters() if CRITIC not in name.split(".")] + own
        named = self.model.named_parameters()
        return [w for name, w in named if self.adapter is not None and self.adapter in name.split(".")[:-1]] + own


class Roles:
    """
    The roles on one policy.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, not wrapped for several processes. It plays the actor, with its active adapter.
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self._roles: dict[str, Role] = {}
        self.add(ACTOR, adapter=trained_adapter(policy) if self._adapters else None)

    @property
    def _adapters(self) -> list[str]:
        return list(self.policy.peft_config) if isinstance(self.policy, PeftModel) else []

    def add(
        self,
        name: str,
        *,
        adapter: str | None = None,
        model: Any = None,
        head: nn.Module | None = None,
        needs_head: bool = False,
    ) -> None:
        """
        Add a role.

        Args:
            name (`str`):
                Its name, such as `"reference"`, or that of a reward.
            adapter (`str`, *optional*):
                Its adapter in the policy. `None` without a `model`: the base model alone.
            model (`torch.nn.Module`, *optional*):
                A model of its own.
            head (`torch.nn.Module`, *optional*):
                Its head.
            needs_head (`bool`, *optional*, defaults to `False`):
                Whether it is nothing without a head.

        Raises:
            ValueError: if the role is there already, an adapter plays another role already or isn't there, or the
                role lacks its head.
        """
        base = base_name(self.policy)
        require(name not in self._roles, f"There are two roles named {name!r} on {base!r}. Give each its own name.")
        if adapter is not None:
            require(
                adapter in self._adapters,
                f"The adapter {adapter!r} of the role {name!r} is not on the base model {base!r}, which has "
                f"{', '.join(self._adapters) or 'none'}. Load it (model.load_adapter) under this name.",
            )
            others = [other for other, role in self._roles.items() if role.on_base and role.adapter == adapter]
            require(
                not others,
                f"The adapter {adapter!r} on the base model {base!r} would play {' and '.join([*others, name])}. Load "
                "it a second time under another name (adapter_name).",
            )
        require(
            head is not None or not needs_head,
            f"The role {name!r} has no head, and the adapter {adapter!r} on the base model {base!r} returns states, "
            "not numbers. Save it with its head (task_type='SEQ_CLS' or modules_to_save=['score'] for a reward, "
            "trainer.save_model for a critic).",
        )
        self._roles[name] = Role(self.policy if model is None else model, adapter, head, model is None)

    def __contains__(self, name: str) -> bool:
        return name in self._roles

    def __getitem__(self, name: str) -> Role:
        require_one_of("role", name, self._roles)
        return self._roles[name]

    @contextmanager
    def playing(self, name: str) -> Iterator[Any]:
        """
        Within this context, the model that is returned plays a role. Wrong nesting is an error, see
        [`~trl_ext.roles.switching.using_adapter`].
        """
        role = self[name]
        switched = role.on_base and bool(self._adapters)
        with using_adapter(self.policy, role.adapter) if switched else nullcontext():
            yield role.model

    def describe(self) -> dict[str, dict[str, Any]]:
        """For each role on which model and adapter it is, how many weights of its own it has, and trains."""
        found = {}
        for name, role in self._roles.items():
            weights = {id(weight): weight for weight in role.parameters()}.values()  # a head may be in the policy, too
            sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in weights]
            found[name] = {
                "model": base_name(role.model) if role.on_base else type(role.model).__name__,
                "adapter": role.adapter,
                "shares_base": role.on_base,
                "parameters": sum(size for size, _ in sizes),
                "trained": sum(size for size, trained in sizes if trained),
            }
        return found

    def __str__(self) -> str:
        lines = []
        for name, told in self.describe().items():
            how = "the base" if told["adapter"] is None else f"adapter {told['adapter']!r} on the base"
            where = how if told["shares_base"] and self._adapters else "a model"
            lines.append(f"{name}: {where} {told['model']}, {told['trained']:,} of {told['parameters']:,} trained")
        return "; ".join(lines)


def roles_on(
    policy: Any,
    reference: Any,
    has_reference: bool,
    critic: Critic | None = None,
    rewards: dict[str, Any] | None = None,
) -> Roles:
    """
    The roles of a trainer.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Not wrapped for several processes.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            A reference that is a model of its own.
        has_reference (`bool`):
            Whether there is a reference. Without a model of its own, it is the adapter `ref`, or the base alone.
        critic ([`~trl_ext.roles.critic.Critic`], *optional*):
            The critic that is attached to the policy.
        rewards (`dict[str, Any]`, *optional*):
            For each reward that is a model, by name: its adapter's name with its head, or the model.
    """
    roles = Roles(policy)
    if critic is not None:
        adapter = CRITIC if CRITIC in getattr(policy, "peft_config", {}) else None
        if adapter is None:
            roles.add(CRITIC, model=critic)
        else:
            roles.add(CRITIC, adapter=adapter, head=getattr(critic, "head", None), needs_head=True)
    for name, reward in (rewards or {}).items():
        if isinstance(reward, tuple):
            roles.add(name, adapter=reward[0], head=reward[1], needs_head=True)
        else:
            roles.add(name, model=reward)
    if reference is not None:
        roles.add(REFERENCE, model=base_model_of(reference))
    elif has_reference and hasattr(policy, "peft_config"):
        roles.add(REFERENCE, adapter=REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None)
    return roles
