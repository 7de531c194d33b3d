"""
Which role is on which weights in a trainer: what TRL, the critic and the rewards keep apart, in one place.
"""

from typing import Any

from torch import nn

from ..rewards.adapter import AdapterReward
from ..rewards.models import RewardModelOnIds
from ..roles.critic import critic_of
from ..roles.roles import Roles, roles_on


def roles_of(trainer: Any) -> Roles:
    """
    The roles of a trainer of `trl_ext`.

    Raises:
        ValueError: if several adapters of the policy are active, or one would play two roles.
    """
    unwrap = trainer.accelerator.unwrap_model
    policy = unwrap(trainer.model)
    rewards: dict[str, Any] = {}
    names = getattr(trainer, "reward_func_names", [])
    for name, given in zip(names, getattr(trainer, "reward_funcs", []), strict=True):
        func = getattr(given, "func", given)  # behind a guard
        if isinstance(func, AdapterReward):
            rewards[name] = (func.adapter, func.head)
        elif isinstance(func, RewardModelOnIds):
            rewards[name] = unwrap(func.model)
        elif isinstance(func, nn.Module):
            rewards[name] = unwrap(func)
    reference = None if trainer.ref_model is None else unwrap(trainer.ref_model)
    # DPO always has one, others if their loss or their reward asks for it
    wanted = getattr(trainer, "needs_reference", True) or getattr(trainer, "beta", 0.0) != 0.0
    return roles_on(policy, reference, wanted, critic_of(policy), rewards)
