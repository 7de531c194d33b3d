"""
DPO, then PPO, with DeepSpeed ZeRO on two processes: `schedule_worker.py OUTPUT`. Started by `test_deepspeed.py`.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from pipelines.dpo_then_ppo_worker import lora, policy_settings, schedule

from trl_ext import PPOConfig


if __name__ == "__main__":
    # The reference is a copy of the adapter, which TRL makes of weights that an engine has spread
    schedule(
        sys.argv[1],
        rounds=2,
        reward_funcs=[tiny.low_ids],
        policy_args=PPOConfig(**policy_settings()),
        reference="dpo",
        fit_critic=0,
        peft_config=lora(lora_dropout=0.0),
    ).train()
    tiny.leave()
