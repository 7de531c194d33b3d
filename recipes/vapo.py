"""
VAPO (https://huggingface.co/papers/2504.05118): PPO whose critic learns first, alone, and then judges long completions
with one reward at their end.

```shell
accelerate launch recipes/vapo.py --config recipes/configs/quickstart_vapo.yaml          # a laptop, minutes
accelerate launch recipes/vapo.py --config recipes/configs/vapo_qwen2.5_0.5b_gsm8k.yaml  # a GPU
accelerate launch recipes/vapo.py --config recipes/configs/smoke_vapo.yaml  # a smoke test
```

It takes the arguments of `recipes/ppo.py`. The paper's critic starts from a reward model, which `recipes/reward.py`
trains: `--value_model_name_or_path`. See `trl_ext.run.arguments.PPOArguments`.
"""

import trl_ext
from trl_ext.run.arguments import PPOArguments
from trl_ext.run.loading import ppo_arguments
from trl_ext.run.training import train_policy


if __name__ == "__main__":
    train_policy(trl_ext.VAPOTrainer, trl_ext.VAPOConfig, script_class=PPOArguments, further_arguments=ppo_arguments)
