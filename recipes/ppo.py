"""
PPO (https://huggingface.co/papers/1707.06347, for language models https://huggingface.co/papers/2203.02155): a critic
says what each token was worth, so that one completion a prompt is enough.

```shell
accelerate launch recipes/ppo.py --config recipes/configs/quickstart_ppo.yaml          # a laptop, minutes: `make ppo`
accelerate launch recipes/ppo.py --config recipes/configs/ppo_qwen2.5_0.5b_gsm8k.yaml  # a GPU
```

What is maximised: `--reward_model_name_or_path` (`recipes/reward.py` trains one), `--reward_funcs`, or both.
`--reward_weights` has the reward model last; a function of weight 0 is only watched. The output folder has the policy,
its `critic/`, and beside the usual report `tokens.png`: value, advantage and probability of single tokens. See
`common.PolicyArguments` for data and held-out evaluation.
"""

from dataclasses import dataclass, field
from typing import Any

from common import DataArguments, PolicyArguments, get_split, load_data, train_policy
from trl import DatasetMixtureConfig

from trl_ext import PPOConfig, PPOTrainer


@dataclass
class PPOArguments(PolicyArguments):
    """
    Args:
        value_model_name_or_path (`str`, *optional*):
            A sequence classification model with one output, from which the critic starts. Sets `critic="model"`.
        ptx_dataset_name (`str`, *optional*):
            Text for the language-modelling term of `--ptx_coef`: whatever `--dataset_name` can be.
        ptx_dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
    """

    value_model_name_or_path: str | None = field(default=None, metadata={"help": "Model that the critic starts from."})
    ptx_dataset_name: str | None = field(default=None, metadata={"help": "Text for the language-modelling term."})
    ptx_dataset_split: str = field(default="train", metadata={"help": "Split of that text."})


def roles(script_args: PPOArguments, reward_funcs: list[Any]) -> dict[str, Any]:
    """What the trainer takes beside the arguments that all take."""
    reward_model, text = script_args.reward_model_name_or_path, None
    if script_args.ptx_dataset_name is not None:
        data = load_data(DataArguments(dataset_name=script_args.ptx_dataset_name), DatasetMixtureConfig())
        text = get_split(data, script_args.ptx_dataset_split, "ptx_dataset_split")
    return {
        "reward_funcs": [func for func in reward_funcs if func != reward_model],
        "reward_model": reward_model,
        "value_model": script_args.value_model_name_or_path,
        "ptx_dataset": text,
    }


if __name__ == "__main__":
    train_policy(PPOTrainer, PPOConfig, script_class=PPOArguments, roles=roles)
