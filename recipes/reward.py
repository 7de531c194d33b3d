"""
Reward modelling, with TRL's own trainer: a model that scores completions, learned from pairs of a better and a worse
one (https://huggingface.co/papers/2203.02155, equation 1). PPO maximises it where no function can say what is right.

```shell
accelerate launch recipes/reward.py --config recipes/configs/quickstart_reward.yaml
accelerate launch recipes/reward.py --config recipes/configs/reward_one_trunk_qwen2.5_0.5b.yaml
accelerate launch recipes/reward.py --config recipes/configs/smoke_reward.yaml  # a smoke test
```

With `--use_peft true`, what is trained and saved is an adapter with its score head. A policy that is trained with an
adapter on the same base, which may be in 4 bits (`--load_in_4bit true`), takes it into its own model: see
`trl_ext.AdapterReward`.

Data: `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` with the prompt in them, as [`~trl.RewardTrainer`]
takes them, in conversations or plain text.

With `--eval_strategy`, `--dataset_test_split` names the held-out pairs, and `summary.json` says how often the better
one scores higher. All arguments of [`~trl.RewardConfig`] and [`~trl.ModelConfig`] work on the command line and in the
yaml file; see `trl_ext.run.arguments.DataArguments` for data.
"""

from trl_ext.run.preferences import train_reward_model


if __name__ == "__main__":
    train_reward_model()
