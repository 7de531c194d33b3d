"""
Preference pairs from a policy: completions of each prompt are sampled, scored and paired.

```shell
accelerate launch recipes/make_pairs.py --config recipes/configs/quickstart_pairs.yaml
```

It takes the arguments of the recipes that sample. The output folder is what `--dataset_name` of `recipes/dpo.py` and
`recipes/reward.py` takes: the training split as pairs. `report.json` says what became of every prompt and completion.
If it is stopped, the same command goes on where it was: `completions.jsonl` keeps what is done.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common import PolicyArguments, get_split, leave, load_data, load_reward_funcs, parse_arguments, trainer_arguments
from datasets import Dataset, DatasetDict

from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.preferences.flags import flag_pairs
from trl_ext.preferences.pairs import make_pairs


@dataclass
class PairArguments(PolicyArguments):
    """
    Args:
        strategy, margin, max_pairs, truncated (*optional*):
            As in [`~trl_ext.preferences.pairs.make_pairs`].
        max_prompts (`int`, *optional*):
            Prompts to sample for, chosen by `seed`. `None`: all.
    """

    strategy: str = field(default="best_worst", metadata={"help": "'best_worst', 'margin' or 'majority'."})
    margin: float = field(default=0.0, metadata={"help": "By how much scores have to differ, at least."})
    max_pairs: int | None = field(default=None, metadata={"help": "Pairs of a prompt, the largest margins first."})
    truncated: str = field(default="drop", metadata={"help": "Completions without an end: 'drop', 'reject', 'keep'."})
    max_prompts: int | None = field(default=None, metadata={"help": "Prompts to sample for. None: all."})


def main(argv: list[str] | None = None) -> Dataset:
    script_args, training_args, model_args, mixture_args = parse_arguments(PairArguments, GRPOConfig, argv)
    split, output = script_args.dataset_train_split, Path(training_args.output_dir)
    prompts = get_split(data := load_data(script_args, mixture_args), split, "dataset_train_split")
    if script_args.max_prompts is not None:
        prompts = prompts.shuffle(seed=training_args.seed).take(script_args.max_prompts)
    rewards = load_reward_funcs(script_args, training_args)
    trainer = GRPOTrainer(reward_funcs=rewards, **trainer_arguments(script_args, training_args, model_args, data))
    chosen = {name: getattr(script_args, name) for name in ("strategy", "margin", "max_pairs", "truncated")}
    pairs, report = make_pairs(
        trainer,
        prompts,
        **chosen,
        batch_size=max(1, training_args.generation_batch_size // trainer.num_generations),
        seed=training_args.seed,
        partial_results=output / "completions.jsonl",
        on_progress=lambda done, rows: trainer.accelerator.print(f"sampled for {done} of {rows} prompts", flush=True),
    )
    _, flags = flag_pairs(pairs)
    if trainer.is_world_process_zero():
        DatasetDict({split: pairs}).save_to_disk(str(output))
        report.save(output / "report.json")
    trainer.accelerator.print(f"{report}\n{flags}\nSaved to {output}.")
    leave(trainer)
    return pairs


if __name__ == "__main__":
    main()
