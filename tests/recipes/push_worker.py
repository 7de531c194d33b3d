"""
`train FILE ARGUMENTS`: PPO's recipe, and what its policy says of some tokens.
`load FILE REPOSITORY`: what the policy and the critic of a repository say of the same tokens.
"""

import sys
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoTokenizer

import trl_ext
from trl_ext.roles.critic import logps_and_values
from trl_ext.run.arguments import PPOArguments
from trl_ext.run.hub import be_patient
from trl_ext.run.loading import ppo_arguments
from trl_ext.run.training import train_policy


def said(policy: Any) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(4, 20, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logps, values = logps_and_values(policy.eval(), input_ids, torch.ones_like(input_ids))
    return {"logps": logps.contiguous(), "values": values.contiguous()}


if __name__ == "__main__":
    mode, file, *argv = sys.argv[1:]
    torch.set_num_threads(1)
    if mode == "train":
        settings = {"script_class": PPOArguments, "further_arguments": ppo_arguments}
        trainer = train_policy(trl_ext.PPOTrainer, trl_ext.PPOConfig, argv, **settings)
        save_file(said(trainer.model), file)
    else:
        be_patient(5.0)  # the Hub of a test fails every third request
        policy = AutoPeftModelForCausalLM.from_pretrained(*argv)
        assert AutoTokenizer.from_pretrained(*argv).pad_token_id is not None
        trl_ext.load_critic(argv[0], policy)
        save_file(said(policy), file)
