"""
Reward modelling, with TRL's own trainer: a model that scores completions, learned from pairs of a better and a worse
one (https://huggingface.co/papers/2203.02155, eq. 1). PPO maximises it where no function can say what is right.

```shell
accelerate launch recipes/reward.py --config recipes/configs/quickstart_reward.yaml
```

Data: `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` with the prompt in them, as [`~trl.RewardTrainer`]
takes them. With `--eval_strategy`, `--dataset_test_split` names the held-out pairs, and `summary.json` says how often
the better one scores higher. All arguments of [`~trl.RewardConfig`] and [`~trl.ModelConfig`] work on the command line
and in the yaml file.
"""

import time
from pathlib import Path

from common import DataArguments, fit, load_data, parse_arguments, save, trainer_arguments
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from trl_ext.evaluation.pairs import read_pair_accuracy
from trl_ext.reports.summary import summarize, write_summary


def main() -> None:
    started = time.monotonic()
    script_args, training_args, model_args, mixture_args = parse_arguments(DataArguments, RewardConfig)
    data = load_data(script_args, mixture_args)
    trainer = RewardTrainer(**trainer_arguments(script_args, training_args, model_args, data))
    fit(trainer)
    if trainer.is_world_process_zero() and isinstance(trainer.eval_dataset, Dataset):
        measured = read_pair_accuracy(trainer.state.log_history, len(trainer.eval_dataset))
        seconds = time.monotonic() - started
        summary = summarize(trainer, measured, seconds, model_args.model_name_or_path, script_args.dataset_name)
        write_summary(summary, Path(trainer.args.output_dir) / "summary.json")
    save(trainer, script_args.dataset_name)


if __name__ == "__main__":
    main()
