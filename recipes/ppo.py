"""
PPO (https://huggingface.co/papers/1707.06347, for language models https://huggingface.co/papers/2203.02155): a critic
says what each token was worth, so that one completion a prompt is enough.

```shell
accelerate launch recipes/ppo.py --config recipes/configs/quickstart_ppo.yaml             # a laptop: `make ppo`
accelerate launch recipes/ppo.py --config recipes/configs/ppo_qwen2.5_0.5b_gsm8k.yaml     # a GPU
accelerate launch recipes/ppo.py --config recipes/configs/ppo_one_trunk_qwen2.5_0.5b.yaml # four roles, one base
accelerate launch recipes/ppo.py --config recipes/configs/ppo_one_trunk_qwen2.5_7b.yaml   # a GPU with 80 GB
accelerate launch recipes/ppo.py --config recipes/configs/ppo_one_trunk_33b.yaml          # see the head of the file
accelerate launch recipes/ppo.py --config recipes/configs/ppo_one_trunk_qwen2.5_32b.yaml  # two GPUs
accelerate launch recipes/ppo.py --config recipes/configs/ppo_tutorial.yaml               # the numbers of tutorials
accelerate launch recipes/ppo.py --config recipes/configs/smoke_ppo.yaml  # a smoke test
```

What is maximised: `--reward_model_name_or_path` (`recipes/reward.py` trains one), `--reward_funcs`, or both. With
`--use_peft true`, a reward model that is an adapter on the policy's base is one more adapter of the policy.
`--reward_weights` has the reward model last; a function of weight 0 is only watched. The output folder has the policy,
its `critic/`, and beside the usual report `tokens.png`: value, advantage and probability of single tokens. See
`trl_ext.run.arguments.PPOArguments`.
"""

import trl_ext
from trl_ext.run.arguments import PPOArguments
from trl_ext.run.loading import ppo_arguments
from trl_ext.run.training import train_policy


if __name__ == "__main__":
    train_policy(trl_ext.PPOTrainer, trl_ext.PPOConfig, script_class=PPOArguments, further_arguments=ppo_arguments)
