"""
DPO first, PPO later, in one launch: pairs sampled from the policy and cleaned, DPO on them until its preference
accuracy stays above a threshold, then PPO (or a different method) from the same adapter.

```shell
accelerate launch recipes/dpo_then_ppo.py --config recipes/configs/quickstart_hybrid.yaml  # a laptop: `make hybrid`
accelerate launch recipes/dpo_then_ppo.py --config recipes/configs/hybrid_smollm2_kind_sentence.yaml  # `make real`
accelerate launch recipes/dpo_then_ppo.py --config recipes/configs/hybrid_qwen2.5_0.5b_gsm8k.yaml  # a GPU
accelerate launch recipes/dpo_then_ppo.py --config recipes/configs/smoke_hybrid.yaml  # a smoke test
```

All stages share one model in memory. Arguments are those of the second stage's recipe, `recipes/ppo.py` by default;
`--reward_funcs implicit_reward` is the reward that DPO has learned. In the yaml file, the arguments of DPO are under
`dpo:`, with a `curriculum` and `curriculum_column` of its own, and under `pairs:` are those of `make_pairs`, or the
`split` of given pairs, and the `eval_split` of held-out ones. If the run is killed, the same command resumes it. See
`trl_ext.run.arguments.HybridArguments`.
"""

from trl_ext.run.stages import train_dpo_then_ppo


if __name__ == "__main__":
    train_dpo_then_ppo()
