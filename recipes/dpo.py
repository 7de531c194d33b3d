"""
DPO (https://huggingface.co/papers/2305.18290): a policy from pairs of a better and a worse completion, no sampling.

```shell
accelerate launch recipes/dpo.py --config recipes/configs/quickstart_dpo.yaml  # a laptop, minutes
accelerate launch recipes/dpo.py --config recipes/configs/dpo_tutorial.yaml    # a GPU
accelerate launch recipes/dpo.py --config recipes/configs/dpo_qwen2.5_7b.yaml  # a GPU with 80 GB
accelerate launch recipes/dpo.py --config recipes/configs/smoke_dpo.yaml  # a smoke test
```

Data: as [`~trl.DPOTrainer`] takes them. With `--eval_strategy`, `--dataset_test_split` names the held-out pairs, and
`summary.json` says which share of them the implicit reward ranks right, unless they are streamed; before training that
is 0, because a policy ties with itself. With `--held_out_split` and `--reward_funcs`, completions for the prompts of
that split are sampled and scored, before and after training. See `trl_ext.run.arguments.DPOArguments`.
"""

from trl_ext.run.preferences import train_dpo


if __name__ == "__main__":
    train_dpo()
