"""
The names that `trl_ext` offers. A new one is added here: `trl_ext/__init__.py` looks them up when they are used.
"""

from .curriculum.schedule import DifficultyCurriculum
from .monitors.health import HealthChecks
from .monitors.verify import verify
from .monitors.waste import WasteCallback
from .pipelines.dpo_then_ppo import DPOThenPPO
from .pipelines.exporting import export_role
from .preferences.pairs import make_pairs
from .rewards.adapter import AdapterReward
from .rewards.guard import RewardFunctionError
from .rewards.implicit import ImplicitReward
from .rewards.objectives import ObjectiveSchedule, RewardConstraint, RewardObjectives
from .rewards.service import ServiceReward
from .roles.critic import load_critic
from .trainers.dapo import DAPOConfig, DAPOTrainer
from .trainers.dpo import DPOConfig, DPOTrainer
from .trainers.dupo import DUPOConfig, DUPOTrainer
from .trainers.grpo import GRPOTrainer
from .trainers.grpo_config import GRPOConfig
from .trainers.gspo import GSPOConfig, GSPOTrainer
from .trainers.ppo import NonFiniteLossError, PPOConfig, PPOTrainer
from .trainers.rloo import RLOOConfig, RLOOTrainer
from .trainers.vapo import VAPOConfig, VAPOTrainer


__all__ = [
    "AdapterReward",
    "DAPOConfig",
    "DAPOTrainer",
    "DPOConfig",
    "DPOThenPPO",
    "DPOTrainer",
    "DUPOConfig",
    "DUPOTrainer",
    "DifficultyCurriculum",
    "GRPOConfig",
    "GRPOTrainer",
    "GSPOConfig",
    "GSPOTrainer",
    "HealthChecks",
    "ImplicitReward",
    "NonFiniteLossError",
    "ObjectiveSchedule",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConstraint",
    "RewardFunctionError",
    "RewardObjectives",
    "ServiceReward",
    "VAPOConfig",
    "VAPOTrainer",
    "WasteCallback",
    "export_role",
    "load_critic",
    "make_pairs",
    "verify",
]
