"""
Preference pairs from a policy: completions of each prompt are sampled, scored and paired.

```shell
accelerate launch recipes/make_pairs.py --config recipes/configs/quickstart_pairs.yaml
accelerate launch recipes/make_pairs.py --config recipes/configs/smoke_pairs.yaml  # a smoke test
```

It takes the arguments of the recipes that sample. The output folder is what `--dataset_name` of `recipes/dpo.py` and
`recipes/reward.py` takes: the training split as pairs. `report.json` says what became of every prompt and completion.
If it is stopped, the same command continues where it stopped; `completions.jsonl` keeps what is done. See
`trl_ext.run.arguments.PairArguments`.
"""

from trl_ext.run.sampling import sample_pairs


if __name__ == "__main__":
    sample_pairs()
