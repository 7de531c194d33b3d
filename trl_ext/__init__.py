"""
An extension layer on Hugging Face TRL: trainers that subclass TRL's.

Whoever can use `trl.GRPOTrainer` can use it: change the import, keep the rest.
"""

from .monitors.verify import verify
from .monitors.waste import WasteCallback
from .rewards.guard import RewardFunctionError
from .roles.critic import load_critic
from .trainers.dapo import DAPOConfig, DAPOTrainer
from .trainers.dupo import DUPOConfig, DUPOTrainer
from .trainers.grpo import GRPOConfig, GRPOTrainer
from .trainers.gspo import GSPOConfig, GSPOTrainer
from .trainers.ppo import NonFiniteLossError, PPOConfig, PPOTrainer


__all__ = [
    "DAPOConfig",
    "DAPOTrainer",
    "DUPOConfig",
    "DUPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "GSPOConfig",
    "GSPOTrainer",
    "NonFiniteLossError",
    "PPOConfig",
    "PPOTrainer",
    "RewardFunctionError",
    "WasteCallback",
    "load_critic",
    "verify",
]
