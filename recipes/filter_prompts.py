"""
DUPO's offline half (https://huggingface.co/papers/2507.02592, section 4.2): roll out a data set with a model, and drop
the prompts that all of its samples solve.

```shell
accelerate launch recipes/filter_prompts.py --config recipes/configs/dupo_qwen2.5_0.5b_gsm8k.yaml \
    --num_generations 8 --output_dir runs/gsm8k_filtered
accelerate launch recipes/filter_prompts.py --config recipes/configs/smoke_filter.yaml  # a smoke test
```

It takes the training recipes' arguments, so the same yaml file serves both. The output folder is what `--dataset_name`
of the next recipe takes: the training split with the column `pass_rate`, and the other splits as they were. If it is
stopped, the same command continues where it stopped; `pass_rates.jsonl` keeps what is done. See
`trl_ext.run.arguments.FilterArguments`.
"""

from trl_ext.run.sampling import filter_prompts


if __name__ == "__main__":
    filter_prompts()
