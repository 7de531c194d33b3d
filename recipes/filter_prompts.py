"""
DUPO's offline half (https://huggingface.co/papers/2507.02592, section 4.2): roll out a data set with a model, and drop
the prompts that all of its samples solve.

```shell
accelerate launch recipes/filter_prompts.py --config recipes/configs/dupo_qwen2.5_0.5b_gsm8k.yaml \
    --num_generations 8 --output_dir runs/gsm8k_filtered
```

It takes the training recipes' arguments, so the same yaml file serves both. The output folder is what `--dataset_name`
of the next recipe takes: the training split with the column `pass_rate`, and the other splits as they were. If it is
stopped, the same command goes on where it was; `pass_rates.jsonl` keeps what is done.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common import PolicyArguments, leave, load_data, load_reward_funcs, parse_arguments, trainer_arguments
from datasets import DatasetDict

from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.curriculum.difficulty import drop_solved, pass_rates


@dataclass
class FilterArguments(PolicyArguments):
    """
    Args:
        drop_unsolved (`bool`, *optional*, defaults to `False`):
            Drop also the prompts that no sample solves.
    """

    drop_unsolved: bool = field(default=False, metadata={"help": "Drop also the prompts that no sample solves."})


def main() -> None:
    script_args, training_args, model_args, mixture_args = parse_arguments(FilterArguments, GRPOConfig)
    data = load_data(script_args, mixture_args)
    rewards = load_reward_funcs(script_args, training_args)
    trainer = GRPOTrainer(reward_funcs=rewards, **trainer_arguments(script_args, training_args, model_args, data))

    output, split = Path(training_args.output_dir), script_args.dataset_train_split
    rated = pass_rates(
        trainer,
        data[split],
        batch_size=max(1, training_args.generation_batch_size // training_args.num_generations),
        seed=training_args.seed,
        partial_results=output / "pass_rates.jsonl",
        on_progress=lambda done, rows: trainer.accelerator.print(f"rolled out {done} of {rows} prompts", flush=True),
    )
    kept = drop_solved(rated, script_args.drop_unsolved)
    if trainer.is_world_process_zero():
        DatasetDict({**data, split: kept}).save_to_disk(str(output))
    trainer.accelerator.print(f"Kept {len(kept)} of {len(rated)} prompts, in {output}.")
    leave(trainer)


if __name__ == "__main__":
    main()
