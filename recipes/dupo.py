"""
DUPO (https://huggingface.co/papers/2507.02592): the places of groups that are all right or all wrong are taken by
copies of other groups of the same batch, which costs no generation. Made for agents, whose rollouts are slow.

```shell
# Drop the prompts that the model solves every time, then train on the rest
accelerate launch recipes/filter_prompts.py --config recipes/configs/dupo_qwen2.5_0.5b_gsm8k.yaml \
    --output_dir runs/gsm8k_filtered
accelerate launch recipes/dupo.py --config recipes/configs/dupo_qwen2.5_0.5b_gsm8k.yaml \
    --dataset_name runs/gsm8k_filtered
accelerate launch recipes/dupo.py --config recipes/configs/smoke_dupo.yaml  # a smoke test
```

See `trl_ext.run.arguments.PolicyArguments` for data, rewards and held-out evaluation.
"""

import trl_ext
from trl_ext.run.training import train_policy


if __name__ == "__main__":
    train_policy(trl_ext.DUPOTrainer, trl_ext.DUPOConfig)
