"""
GRPO (https://huggingface.co/papers/2402.03300): TRL's trainer, with `trl_ext`'s axes at hand.

```shell
accelerate launch recipes/grpo.py --config recipes/configs/grpo_qwen2.5_0.5b_gsm8k.yaml
accelerate launch recipes/grpo.py --config recipes/configs/grpo_qwen2.5_7b_gsm8k.yaml  # a GPU with 80 GB
accelerate launch recipes/grpo.py --config recipes/configs/smoke_grpo.yaml  # a smoke test
```

`--rollout_selection`, `--advantage_estimator` and `--importance_sampling_level` combine freely; with their defaults,
this is `trl.GRPOTrainer`, number for number. See `trl_ext.run.arguments.PolicyArguments` for data, rewards and
held-out evaluation.
"""

import trl_ext
from trl_ext.run.training import train_policy


if __name__ == "__main__":
    train_policy(trl_ext.GRPOTrainer, trl_ext.GRPOConfig)
