"""
The stage that makes the pairs of a round: sampled from the policy, cleaned, and written to the stage's folder.
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset, load_from_disk
from trl import DPOConfig as TRLDPOConfig

from ..preferences.cleaning import clean_by_cross_fitting
from ..preferences.pairs import PAIR_WEIGHT, make_pairs, read_completions, with_equal_budgets
from ..preferences.scorers import ImplicitRewardScorer, ImplicitRewardTraining
from ..rewards.implicit import IMPLICIT_REWARD, token_ids
from ..roles.trunk import ADAPTER
from ..trainers.dpo import DPOConfig
from ..trainers.grpo import GRPOTrainer
from ..trainers.seams.processes import forget_accelerator
from ..trainers.value_fitting import ScoredCompletion
from .shared_policy import SharedPolicy
from .stages import print_once


Clean = Callable[[Dataset], tuple[Dataset, Any]]

# Distance of the seeds of two rounds; large, because `make_pairs` adds the number of the row to the seed
SEEDS_OF_A_ROUND = 1_000_003
# All completions that were sampled for pairs, with their rewards, in the stage's folder
COMPLETIONS = "completions.jsonl"


def without_implicit_reward(
    reward_funcs: list[Any], args: Any, kwargs: Mapping[str, Any]
) -> tuple[list[Any], Any, dict[str, Any]]:
    """
    The rewards that can judge pairs, with the configuration and the further arguments of a trainer for them.

    Args:
        reward_funcs (`list`):
            Rewards of the second stage. `"implicit_reward"` is left out, and so are its weight and its processing
            class.
        args ([`GRPOConfig`]):
            The second stage's configuration. It stays as it is.
        kwargs (`Mapping[str, Any]`):
            Further arguments of the second stage's trainer. They stay as they are.
    """
    judges = [reward != IMPLICIT_REWARD for reward in reward_funcs]
    args, kwargs = copy.copy(args), dict(kwargs)

    def of_judges(values: list[Any]) -> list[Any]:  # the value for a reward model comes last
        return [value for i, value in enumerate(values) if i >= len(judges) or judges[i]]

    if args.reward_weights is not None:
        args.reward_weights = of_judges(args.reward_weights)
    if args.outcome_reward_funcs is not None:
        args.outcome_reward_funcs = [name for name in args.outcome_reward_funcs if name != IMPLICIT_REWARD] or None
    if isinstance(kwargs.get("reward_processing_classes"), list):
        kwargs["reward_processing_classes"] = of_judges(kwargs["reward_processing_classes"])
    return of_judges(reward_funcs), args, kwargs


def prompts_of_round(prompts: Dataset, settings: Mapping[str, Any], round_: int, seed: int) -> Dataset:
    """The prompts of a round, in the order in which they are sampled for. The arguments are [`sample_pairs`]'s."""
    count = settings.get("prompts")
    return prompts if count is None else prompts.shuffle(seed=seed + round_).take(min(count, len(prompts)))


def sample_pairs(
    trainer: GRPOTrainer, prompts: Dataset, settings: Mapping[str, Any], folder: Path, round_: int, seed: int
) -> tuple[Dataset, int]:
    """
    Samples the pairs of a round. Every process must make the call.

    Args:
        trainer ([`GRPOTrainer`]):
            A trainer with the policy and the rewards that judge.
        prompts ([`~datasets.Dataset`]):
            All prompts.
        settings (`Mapping[str, Any]`):
            Arguments of [`~trl_ext.preferences.pairs.make_pairs`], and `prompts`, the number of prompts per round.
        folder (`Path`):
            The stage's folder, for partial results and the report.
        round_ (`int`):
            Round, from 1.
        seed (`int`):
            Seed of the prompts, and of the samples if `settings` have none.

    Returns:
        [`~datasets.Dataset`] and `int`: the pairs, and the number of completion tokens that were sampled.

    Raises:
        NoPairsError: if no prompt gave a pair.
    """
    own, prompts = dict(settings), prompts_of_round(prompts, settings, round_, seed)
    own.pop("prompts", None)
    own.setdefault("seed", seed + SEEDS_OF_A_ROUND * round_)
    pairs, report = make_pairs(
        trainer,
        prompts,
        partial_results=folder / COMPLETIONS,
        on_progress=lambda done, rows: print_once(f"sampled for {done} of {rows} prompts"),
        **own,
    )
    print_once(str(report))
    if PartialState().is_main_process:
        report.save(folder / "report.json")
    return pairs, report.generated_tokens


def clean_pairs(pairs: Dataset, clean: Clean, folder: Path, seed: int) -> Dataset:
    """
    Cleans the pairs of a round, and writes the report to the stage's folder. Every process must make the call.

    Args:
        pairs ([`~datasets.Dataset`]):
            Pairs before cleaning.
        clean (`Callable`):
            From pairs to the remaining pairs and a report.
        folder (`Path`):
            The stage's folder.
        seed (`int`):
            Seed for `clean`.

    Raises:
        TypeError: if `clean` doesn't return pairs and a report.
        ValueError: if no pairs remain.
    """
    set_seed(seed)
    cleaned: Any = clean(pairs)
    if not (isinstance(cleaned, tuple) and len(cleaned) == 2 and isinstance(cleaned[0], Dataset)):
        raise TypeError(f"clean returned a {type(cleaned).__name__}. Let it return the pairs and a report.")
    left, report = cleaned
    if PAIR_WEIGHT in left.column_names and "prompt_row" in left.column_names and len(left) > 0:
        left = with_equal_budgets(left)
    print_once(str(report))
    if len(left) == 0:
        raise ValueError(f"Cleaning left none of {len(pairs)} pairs:\n{report}\nClean less, or make other pairs.")
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cleaning.txt").write_text(f"{report}\n", encoding="utf-8")
    return left


def cross_fitting(policy: SharedPolicy, dpo_args: DPOConfig, tokenizer: Any) -> Clean:
    """Cleaning by scorers that are trained as `dpo_args` say, each as an adapter on the policy's model."""
    args = {f.name: getattr(dpo_args, f.name) for f in fields(TRLDPOConfig) if f.init}

    def train_scorer(pairs: Dataset) -> ImplicitRewardScorer:
        forget_accelerator()
        trunk: Any = policy.shared()
        adapter = policy.model.peft_config[ADAPTER]
        size = dpo_args.per_device_eval_batch_size
        return ImplicitRewardTraining(trunk.unload(), args, adapter, tokenizer, size)(pairs)

    def clean(pairs: Dataset) -> tuple[Dataset, Any]:
        return clean_by_cross_fitting(
            pairs,
            train_scorer,
            seed=dpo_args.seed,
            on_progress=lambda done, folds: print_once(f"trained scorer {done} of {folds}"),
        )

    return clean


def write_pairs(pairs: Dataset, folder: Path) -> None:
    """Writes pairs to the stage's folder, completely or not at all. Every process must make the call."""
    state = PartialState()
    if state.is_main_process:
        target, partial = folder / "pairs", folder / "pairs.part"
        for path in (target, partial):
            shutil.rmtree(path, ignore_errors=True)
        pairs.save_to_disk(str(partial))
        partial.rename(target)
    state.wait_for_everyone()


def read_pairs(folder: Path) -> Dataset | None:
    """The pairs in a stage's folder; `None` if there are none, because the pairs that were given are used."""
    if not (folder / "pairs").is_dir():
        return None
    pairs = load_from_disk(str(folder / "pairs"))
    assert isinstance(pairs, Dataset)
    return pairs


def scored_completions(trainer: GRPOTrainer, prompts: Dataset, folder: Path) -> list[ScoredCompletion]:
    """
    The completions that were sampled for the pairs of a round, with the weighted sum of the rewards that judged them.
    Every process must make the call.

    Args:
        trainer ([`GRPOTrainer`]):
            The second stage's trainer. The implicit reward that it may have judged no pairs.
        prompts ([`~datasets.Dataset`]):
            The prompts of the round, from [`prompts_of_round`].
        folder (`Path`):
            Folder of the stage that made the pairs.

    Returns:
        `list[ScoredCompletion]`: those to which a reward applied; none if the pairs were given.
    """
    outcome: list[Any] = [None]
    if PartialState().is_main_process and (folder / COMPLETIONS).is_file():
        outcome = [read_completions(folder / COMPLETIONS)]
    broadcast_object_list(outcome)
    template: Any = trainer.chat_template_kwargs or {}
    named = zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    weights = [weight for name, weight in named if name != IMPLICIT_REWARD]
    found = []
    for row, group in zip(prompts, outcome[0] or [], strict=False):
        prompt: Any = row["prompt"]
        further = {} if isinstance(prompt, str) else {"add_generation_prompt": True, **template}
        ids = token_ids(trainer.processing_class, prompt, **further)
        for _, completion_ids, rewards in group:
            earned = [w * r for w, r in zip(weights, rewards, strict=True) if r is not None]
            if earned:
                found.append(ScoredCompletion(ids, completion_ids, sum(earned)))
    return found
