"""
DPO (https://huggingface.co/papers/2305.18290): a policy from pairs of a better and a worse completion, no sampling.

```shell
accelerate launch recipes/dpo.py --config recipes/configs/quickstart_dpo.yaml  # a laptop, minutes
accelerate launch recipes/dpo.py --config recipes/configs/dpo_tutorial.yaml    # a GPU
```

Data: as [`~trl.DPOTrainer`] takes them. With `--eval_strategy`, `--dataset_test_split` names the held-out pairs, and
`summary.json` says which share the implicit reward ranks right, unless they are streamed; before training that is 0: a
policy ties with itself. With `--held_out_split` and `--reward_funcs`, prompts of that split are sampled and scored,
before and after.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import common
from datasets import Dataset

from trl_ext import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl_ext.evaluation.held_out import Estimate, evaluate_policy
from trl_ext.reports.summary import summarize, write_summary
from trl_ext.roles.trunk import sharing_weights


@dataclass
class DPOArguments(common.PolicyArguments):
    held_out_split: str | None = field(default=None, metadata={"help": "Split of prompts to sample and score."})
    held_out_length: int = field(default=256, metadata={"help": "Maximum length of those completions, in tokens."})


def sampled(trainer: Any, script_args: DPOArguments, data: Any) -> dict[str, Estimate]:
    samples = script_args.held_out_samples
    if script_args.held_out_split is None:
        return {}
    same = {name: getattr(trainer.args, name) for name in ("output_dir", "use_cpu", "bf16")}
    sizes = dict.fromkeys(("num_generations", "per_device_train_batch_size"), max(samples, 2))  # TRL asks for 2
    config = GRPOConfig(**same, **sizes, max_completion_length=script_args.held_out_length, report_to="none")
    rows = common.get_split(data, script_args.held_out_split, "held_out_split")
    rows = rows.shuffle(seed=script_args.held_out_seed).take(script_args.held_out_prompts)
    rows = Dataset.from_list(list(rows))  # also of a stream
    rewards, tokenizer = common.load_reward_funcs(script_args, config), trainer.processing_class
    model = sharing_weights(trainer.accelerator.unwrap_model(trainer.model))
    sampler = GRPOTrainer(model, rewards, args=config, train_dataset=rows, processing_class=tokenizer)
    return evaluate_policy(sampler, rows, samples, seed=script_args.held_out_seed)


def main() -> None:
    started = time.monotonic()
    script_args, args, model_args, mixture_args = common.parse_arguments(DPOArguments, DPOConfig)
    data, name = common.load_data(script_args, mixture_args), model_args.model_name_or_path
    order = common.curriculum_of(script_args.curriculum, script_args.curriculum_column)
    trainer = DPOTrainer(**common.trainer_arguments(script_args, args, model_args, data), curriculum=order)
    before = sampled(trainer, script_args, data)
    common.fit(trainer, script_args.health_checks)
    after = sampled(trainer, script_args, data)
    if trainer.is_world_process_zero():
        measured = common.pair_accuracy(trainer)
        for step, found in ((0, before), (trainer.state.global_step, after)):
            measured[step] = {**measured.get(step, {}), **found}
        measured, seconds = dict(sorted(measured.items())), time.monotonic() - started
        summary = summarize(trainer, measured, seconds, name, script_args.dataset_name)
        write_summary(summary, f"{args.output_dir}/summary.json")
    common.publish(trainer, script_args.dataset_name)


if __name__ == "__main__":
    main()
