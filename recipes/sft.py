"""
Supervised fine-tuning, with TRL's own trainer: where a policy usually starts.

```shell
accelerate launch recipes/sft.py --config recipes/configs/quickstart_sft.yaml
accelerate launch recipes/sft.py --config recipes/configs/sft_qwen2.5_0.5b.yaml         # a GPU
accelerate launch recipes/sft.py --config recipes/configs/sft_smollm2_chain_sum.yaml   # a small real model, a CPU
accelerate launch recipes/sft.py --config recipes/configs/smoke_sft.yaml  # a smoke test
```

Data: `prompt` and `completion`, `messages`, or `text`, as [`~trl.SFTTrainer`] takes them. All arguments of
[`~trl.SFTConfig`] and [`~trl.ModelConfig`] work on the command line and in the yaml file; see
`trl_ext.run.arguments.DataArguments` for data.
"""

from trl_ext.run.training import train_supervised


if __name__ == "__main__":
    train_supervised()
