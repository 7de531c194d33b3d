"""
MaxRL (https://huggingface.co/papers/2602.02710): the advantage is the reward minus the mean reward of its group,
divided by that mean, so that prompts which are seldom solved weigh more.

```shell
accelerate launch recipes/maxrl.py --config recipes/configs/maxrl_qwen2.5_0.5b_gsm8k.yaml
accelerate launch recipes/maxrl.py --config recipes/configs/smoke_maxrl.yaml  # a smoke test
```

It is `recipes/grpo.py` with a different `--advantage_estimator`. Rewards must be 0 or more, best 0 and 1, and groups
large: `--num_generations 16`. See `trl_ext.run.arguments.PolicyArguments` for data, rewards and held-out evaluation.
"""

import trl_ext
from trl_ext.run.training import train_policy


if __name__ == "__main__":
    train_policy(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, defaults={"advantage_estimator": "maxrl"})
