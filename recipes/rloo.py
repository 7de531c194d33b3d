"""
RLOO (https://huggingface.co/papers/2402.14740): plain policy gradient, where the baseline of a completion is the mean
reward of the other completions of its prompt, and the KL to the reference is part of the reward.

```shell
accelerate launch recipes/rloo.py --config recipes/configs/rloo_qwen2.5_0.5b_gsm8k.yaml
accelerate launch recipes/rloo.py --config recipes/configs/smoke_rloo.yaml  # a smoke test
```

`--beta` weighs the KL. With one update a generation, as is the default, no ratio is clipped. See
`trl_ext.run.arguments.PolicyArguments` for data, rewards and held-out evaluation.
"""

import trl_ext
from trl_ext.run.training import train_policy


if __name__ == "__main__":
    train_policy(trl_ext.RLOOTrainer, trl_ext.RLOOConfig)
