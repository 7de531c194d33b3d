"""
GRPO (https://huggingface.co/papers/2402.03300): TRL's trainer, with `trl_ext`'s axes at hand.

```shell
accelerate launch recipes/grpo.py --config recipes/configs/grpo_qwen2.5_0.5b_gsm8k.yaml
```

`--rollout_selection`, `--advantage_estimator` and `--importance_sampling_level` combine freely; left alone, this is
`trl.GRPOTrainer`, number for number. See `common.PolicyArguments` for data, rewards and held-out evaluation.
"""

from common import train_policy

from trl_ext import GRPOConfig, GRPOTrainer


if __name__ == "__main__":
    train_policy(GRPOTrainer, GRPOConfig)
