"""
For scripts that were written for TRL 1.12, the last release with a `PPOTrainer`: the arguments of its `PPOConfig`, and
what its `generate_completions` does.
"""

import argparse
import math
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib import import_module
from itertools import chain, islice
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from transformers.utils import is_rich_available
from trl.trainer.utils import log_table_to_comet_experiment, print_prompt_completions_sample

from ..errors import require
from ..objectives.advantages import aggregate_rewards
from .grpo_config import GRPOConfig


# 1.12's names of arguments that are TRL's own
RENAMED = {
    "num_ppo_epochs": "num_iterations",
    "response_length": "max_completion_length",
    "cliprange": "epsilon",
}
# Arguments of 1.12's that have no effect, and what to use instead
DROPPED = {
    "local_rollout_forward_batch_size": "passes without gradient use per_device_train_batch_size",
    "num_sample_generations": "log_completions=True shows completions",
    "model_adapter_name": "the trained adapter is `default`",
    "ref_adapter_name": "the reference of an adapter is the adapter as it was loaded, or the base model",
}
SHOWN_COMPLETIONS = 5


def _unlisted() -> Any:
    """A field that command lines and yaml files may set but `--help` doesn't list."""
    return field(default=None, metadata={"help": argparse.SUPPRESS})


@dataclass
class TRL112Arguments(GRPOConfig):
    """
    Arguments of TRL 1.12's `PPOConfig` that [`GRPOConfig`] doesn't have by the same name.

    Args:
        num_ppo_epochs, response_length, cliprange (*optional*):
            1.12's names of `num_iterations`, `max_completion_length` and `epsilon`.
        num_mini_batches (`int`, *optional*):
            Mini-batches, with an optimizer step each, into which a batch of `per_device_train_batch_size` ×
            `gradient_accumulation_steps` is split.
        total_episodes (`int`, *optional*):
            Number of completions to train on, instead of `max_steps`.
        stop_token (`str`, *optional*), stop_token_id (`int`, *optional*):
            `"eos"`, or the id of a token that ends completions.
        sft_model_path, reward_model_path (`str`, *optional*), dataset_num_proc (`int`, *optional*):
            Read by 1.12's example scripts, which load models and data themselves. The trainer doesn't read them.
        local_rollout_forward_batch_size, num_sample_generations, model_adapter_name, ref_adapter_name (*optional*):
            Without effect; a warning says what to use.
    """

    num_ppo_epochs: int | None = _unlisted()
    response_length: int | None = _unlisted()
    cliprange: float | None = _unlisted()
    num_mini_batches: int | None = _unlisted()
    total_episodes: int | None = _unlisted()
    stop_token: str | None = _unlisted()
    stop_token_id: int | None = _unlisted()
    sft_model_path: str | None = _unlisted()
    reward_model_path: str | None = _unlisted()
    dataset_num_proc: int | None = _unlisted()
    local_rollout_forward_batch_size: int | None = _unlisted()
    num_sample_generations: int | None = _unlisted()
    model_adapter_name: str | None = _unlisted()
    ref_adapter_name: str | None = _unlisted()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_episodes is not None:
            assert self.generation_batch_size and self.steps_per_generation
            batches = math.ceil(self.total_episodes / self.generation_batch_size)
            updates = self.steps_per_generation * self.num_iterations / self.gradient_accumulation_steps
            self.max_steps = math.ceil(batches * updates)

    def _resolve_method(self) -> None:
        super()._resolve_method()
        defaults = {f.name: f.default for f in fields(self)}
        for old, new in RENAMED.items():
            value = getattr(self, old)
            if value is None:
                continue
            require(
                getattr(self, new) in (defaults[new], value),
                f"{old}={value} and {new}={getattr(self, new)} set the same thing. Set one of them.",
            )
            setattr(self, new, value)
        for name, instead in DROPPED.items():
            if getattr(self, name) is not None:
                self._notes.append(f"{name} has no effect: {instead}.")
        if self.num_mini_batches is not None:
            self._split_batch(self.num_mini_batches)
        self._check_stop_token()

    def _split_batch(self, mini_batches: int) -> None:
        """Set the micro-batches of a batch, and how many of them make an optimizer step."""
        set_otherwise = [
            name
            for name in ("steps_per_generation", "generation_batch_size", "updates_per_generation")
            if getattr(self, name) is not None
        ]
        require(
            not set_otherwise,
            f"num_mini_batches={mini_batches} and {' and '.join(set_otherwise)} both split a generation batch. Set "
            "one of them.",
        )
        accumulation, rows = self.gradient_accumulation_steps, self.per_device_train_batch_size
        if accumulation % mini_batches == 0:
            self.steps_per_generation, self.gradient_accumulation_steps = accumulation, accumulation // mini_batches
            return
        require(
            accumulation == 1 and rows % mini_batches == 0,
            f"num_mini_batches={mini_batches} divides neither gradient_accumulation_steps={accumulation} nor, with "
            f"gradient_accumulation_steps=1, per_device_train_batch_size={rows}. Change one of them.",
        )
        self.per_device_train_batch_size, self.steps_per_generation = rows // mini_batches, mini_batches

    def _check_stop_token(self) -> None:
        require(
            self.stop_token in (None, "eos"),
            f"stop_token={self.stop_token!r} is unknown. Choose 'eos', or set stop_token_id.",
        )
        require(
            self.stop_token is None or self.stop_token_id is None,
            "stop_token and stop_token_id both end completions. Set one of them.",
        )


def completions_table(trainer: Any, dataset: Any, sampling: bool) -> dict[str, list[Any]]:
    """
    Prompts, sampled completions and their scores. Every process must make the call, and gets all rows.

    Args:
        trainer ([`PPOTrainer`]):
            Samples at its temperature, and scores.
        dataset (`Dataset`, `IterableDataset` or a `dict` of them):
            Rows with a `prompt`.
        sampling (`bool`):
            Whether only one batch of rows is used.
    """
    processes = trainer.accelerator.num_processes
    rows = iter(chain.from_iterable(dataset.values()) if isinstance(dataset, dict) else dataset)
    table: dict[str, list[Any]] = {"prompt": [], "completion": [], "score": []}
    seed = trainer.args.seed
    while batch := list(islice(rows, trainer.args.per_device_eval_batch_size * processes)):
        scored = trainer.roll_out(batch, num_generations=1, seed=seed)
        texts = gather_object([(rollout.prompt, rollout.completion) for rollout in scored.rollouts])
        for prompt, completion in texts[: len(batch)]:  # what follows only fills up the last batch
            table["prompt"].append(prompt)
            table["completion"].append(completion)
        rewards = scored.rewards[:, 0]
        scores = aggregate_rewards(rewards, trainer.reward_weights.to(rewards), "sum_then_normalize", 1)
        table["score"] += scores.tolist()
        if sampling:
            break
        seed += processes  # each process has a seed of its own
    return table


def report_completions(args: Any, step: int, table: dict[str, list[Any]]) -> None:
    """Print the first rows of a [`completions_table`], and log all of it to the trackers of `args.report_to`."""
    if is_rich_available():
        prompts, completions, scores = (column[:SHOWN_COMPLETIONS] for column in table.values())
        print_prompt_completions_sample(prompts, completions, {"Score": scores}, None, step)
    frame, trackers = Dataset.from_dict(table).to_pandas(), args.report_to or []
    for name in {"wandb", "trackio"} & set(trackers):
        tracker: Any = import_module(name)
        if name == "wandb" and tracker.run is None:
            continue
        with suppress(RuntimeError):  # of trackio without an open run; transformers closes its own after training
            tracker.log({"completions": tracker.Table(dataframe=frame)})
    if "comet_ml" in trackers:
        log_table_to_comet_experiment(name="completions.csv", table=frame)
