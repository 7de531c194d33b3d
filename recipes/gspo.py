"""
GSPO (https://huggingface.co/papers/2507.18071): importance ratios of whole completions, length-normalised and clipped
tightly, which is steadier over several updates per rollout and for mixtures of experts.

```shell
accelerate launch recipes/gspo.py --config recipes/configs/gspo_qwen2.5_0.5b_gsm8k.yaml
accelerate launch recipes/gspo.py --config recipes/configs/gspo_qwen2.5_7b_gsm8k.yaml  # a GPU with 80 GB
accelerate launch recipes/gspo.py --config recipes/configs/smoke_gspo.yaml  # a smoke test
```

GSPO-token, for advantages that differ between tokens, is `--importance_sampling_level sequence_token`. See
`trl_ext.run.arguments.PolicyArguments` for data, rewards and held-out evaluation.
"""

import trl_ext
from trl_ext.run.training import train_policy


if __name__ == "__main__":
    train_policy(trl_ext.GSPOTrainer, trl_ext.GSPOConfig)
