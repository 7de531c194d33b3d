"""
REINFORCE (Williams, 1992): plain policy gradient, where the baseline is a running mean of the rewards so far.

```shell
accelerate launch recipes/reinforce.py --config recipes/configs/reinforce_qwen2.5_0.5b_gsm8k.yaml
accelerate launch recipes/reinforce.py --config recipes/configs/smoke_reinforce.yaml  # a smoke test
```

It is `recipes/grpo.py` with a different `--advantage_estimator`. Completions of a prompt are not compared: many
prompts with few completions (`--num_generations 2` is the least) serve it better than the reverse. See
`trl_ext.run.arguments.PolicyArguments` for data, rewards and held-out evaluation.
"""

import trl_ext
from trl_ext.run.training import train_policy


if __name__ == "__main__":
    defaults = {"advantage_estimator": "reinforce", "reinforce_baseline_momentum": 0.9}
    train_policy(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, defaults=defaults)
