"""
DPO first, PPO later, in one launch: pairs sampled from the policy and cleaned, DPO on them until its preference
accuracy stays above a threshold, then PPO (or another method) from the same adapter. One model in memory all the way.

```shell
accelerate launch recipes/dpo_then_ppo.py --config recipes/configs/quickstart_hybrid.yaml  # a laptop: `make hybrid`
```

Arguments are those of the second stage's recipe, `recipes/ppo.py` by default; `--reward_funcs implicit_reward` is what
DPO has learned. In the yaml file, under `dpo:` are those of DPO, with a `curriculum` and `curriculum_column` of its
own, and under `pairs:` those of `make_pairs`, or the `split` of given pairs, and the `eval_split` of held-out ones.
Kill it anywhere: the same command goes on where it was.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import common
from ppo import PPOArguments, roles

import trl_ext


@dataclass
class HybridArguments(PPOArguments):
    method: str = field(default="PPO", metadata={"help": f"Of the second stage: {', '.join(common.METHODS)}."})
    dpo: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of DPOConfig, and `curriculum`."}
    )
    pairs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Arguments of make_pairs, or a split."})
    clean: str | None = field(default=None, metadata={"help": "'cross_fitting', or 'none'."})
    reference: str = field(default=common.DEFAULTS["reference"], metadata={"help": "Of stage 2: 'base' or 'dpo'."})
    rounds: int = field(default=common.DEFAULTS["rounds"], metadata={"help": "How often all stages are gone through."})
    accuracy_threshold: float | None = field(
        default=common.DEFAULTS["accuracy_threshold"], metadata={"help": "That ends DPO. None: its last step."}
    )
    accuracy_logs: int = field(default=common.DEFAULTS["accuracy_logs"], metadata={"help": "Logs in a row above it."})
    start_name: str = field(default="start", metadata={"help": "What reports call the model as it came."})


def main(argv: list[str] | None = None) -> trl_ext.DPOThenPPO:
    argv = sys.argv[1:] if argv is None else argv
    method = common.peek(argv, "method", common.METHODS)
    config, trainer = getattr(trl_ext, f"{method}Config"), getattr(trl_ext, f"{method}Trainer")
    parsed = script_args, args, model_args, mixture = common.parse_arguments(HybridArguments, config, argv)
    data = common.load_data(script_args, mixture)
    rewards = common.load_reward_funcs(script_args, args)
    more = roles(script_args, rewards) if method == "PPO" else {"reward_funcs": rewards}
    order = common.curriculum_of(script_args.curriculum, script_args.curriculum_column)
    run = trl_ext.DPOThenPPO(
        model_args.model_name_or_path,
        more.pop("reward_funcs"),
        common.get_split(data, script_args.dataset_train_split, "dataset_train_split"),
        output_dir=args.output_dir,
        policy_args=args,
        policy_trainer=trainer,
        policy_kwargs=more | {"curriculum": order},
        **common.preference_stage(script_args, args, data),
        peft_config=common.get_peft_config(model_args),
        model_init_kwargs=common.stage_model_settings(args, model_args),
        held_out=common.held_out_rows(data, script_args),
        prepare=lambda _, trainer: common.watch_stage(trainer, script_args),
        **{name: getattr(script_args, name) for name in common.SCHEDULE_SETTINGS},
    )
    return common.train_stages(run, parsed, argv)


if __name__ == "__main__":
    main()
