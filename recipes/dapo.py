"""
DAPO (https://huggingface.co/papers/2503.14476): new prompts take the place of groups that are all right or all wrong,
the clip is wider upwards, every token weighs the same, and answers that run too long are punished softly.

```shell
accelerate launch recipes/dapo.py --config recipes/configs/quickstart_dapo.yaml          # a laptop, minutes
accelerate launch recipes/dapo.py --config recipes/configs/dapo_qwen2.5_0.5b_gsm8k.yaml  # a GPU
accelerate launch recipes/dapo.py --config recipes/configs/dapo_qwen2.5_7b_gsm8k.yaml    # a GPU with 80 GB
accelerate launch recipes/dapo.py --config recipes/configs/dapo_qwen2.5_32b_gsm8k.yaml   # four GPUs with 80 GB
accelerate launch recipes/dapo.py --config recipes/configs/dapo_smollm2_chain_sum.yaml   # a small real model, a CPU
accelerate launch recipes/dapo.py --config recipes/configs/smoke_dapo.yaml  # a smoke test
```

Defaults are the paper's (see `trl_ext.DAPOConfig`), made for long reasoning on many GPUs: set
`max_completion_length`, `num_generations` and `updates_per_generation` for anything smaller. See
`trl_ext.run.arguments.PolicyArguments` for data, rewards and held-out evaluation.
"""

import trl_ext
from trl_ext.run.training import train_policy


if __name__ == "__main__":
    train_policy(trl_ext.DAPOTrainer, trl_ext.DAPOConfig)
