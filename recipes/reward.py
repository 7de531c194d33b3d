"""
Reward modelling, with TRL's own trainer: a model that scores completions, learned from pairs of a better and a worse
one (https://huggingface.co/papers/2203.02155, eq. 1). PPO maximises it where no function can say what is right.

```shell
accelerate launch recipes/reward.py --config recipes/configs/quickstart_reward.yaml
```

Data: `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` with the prompt in them, as [`~trl.RewardTrainer`]
takes them, in conversations or plain text.

With `--eval_strategy`, `--dataset_test_split` names the held-out pairs, and `summary.json` says how often the better
one scores higher. All arguments of [`~trl.RewardConfig`] and [`~trl.ModelConfig`] work on the command line and in the
yaml file.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import DataArguments, fit, load_data, pair_accuracy, parse_arguments, publish, trainer_arguments
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

from trl_ext.evaluation.pairs import PAIR_ACCURACY
from trl_ext.reports.summary import summarize, write_summary


def as_policies_are_scored(data: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """
    Plain text as token ids. TRL's reward trainer would end it with the end-of-sequence token, which GRPO and PPO leave
    out of the text that they have scored: the score would be read at a token that never was trained. Conversations
    are the same on both sides, and stay as they are.
    """

    def with_ids(row: dict[str, Any]) -> dict[str, Any]:
        if "chosen_ids" in row or not isinstance(row.get("chosen"), str):
            return {}
        texts = {name: row.get("prompt", "") + row[name] for name in ("chosen", "rejected")}
        return {f"{name}_ids": tokenizer(text=text)["input_ids"] for name, text in texts.items()}

    return {
        # A stream whose rows were changed doesn't know its columns
        split: rows.map(with_ids) if "chosen" in (rows.column_names or "chosen") else rows
        for split, rows in data.items()
    }


def main() -> None:
    started = time.monotonic()
    script_args, training_args, model_args, mixture_args = parse_arguments(DataArguments, RewardConfig)
    model_args.lora_task_type = "SEQ_CLS"  # the head is trained, and saved, with the adapter
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    data = as_policies_are_scored(load_data(script_args, mixture_args), tokenizer)
    trainer = RewardTrainer(**trainer_arguments(script_args, training_args, model_args, data))
    fit(trainer)
    if trainer.is_world_process_zero() and (measured := pair_accuracy(trainer)):
        seconds = time.monotonic() - started
        summary = summarize(trainer, measured, seconds, model_args.model_name_or_path, script_args.dataset_name)
        write_summary(summary, Path(trainer.args.output_dir) / "summary.json")
        for step, estimates in measured.items():
            e = estimates[PAIR_ACCURACY]
            print(f"step {step}: {e.mean:.3f} of {e.prompts} pairs right ({e.low:.3f} to {e.high:.3f})")
    publish(trainer, script_args.dataset_name)


if __name__ == "__main__":
    main()
