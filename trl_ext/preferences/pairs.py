"""
Preference pairs from a policy, prompts and rewards: K completions of each prompt, by the engine's own rollouts, and of
those the pairs of which one is better.

The result is what [`~trl.DPOTrainer`] and [`~trl.RewardTrainer`] take: text, or messages where the prompts are. Text
holds less than the policy wrote, and TRL ends each completion of a pair as its template says, plain text with the
end-of-sequence token. So two kinds of completions are left out, and counted:

- *truncated* ones, which never wrote an end: TRL would teach that they end where the budget did. (`truncated` has
  other ways, for policies that hardly ever end.)
- those with a special token inside, which their text doesn't show: it would teach, or punish, something else.

The margin is in the column `score_margin`, because TRL's reward trainer takes a column `margin` for the margin of its
loss (https://huggingface.co/papers/2307.09288, eq. 2). Rename it if that is what you want.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl.data_utils import _tokenize, common_prefix_length

from ..curriculum.partial import roll_out_all
from ..rollouts.prompts import TokenizedPrompt
from ..rollouts.rollout import ScoredGroups
from ..trainers.grpo import GRPOTrainer


STRATEGIES = ("best_worst", "margin", "majority")
TRUNCATED = ("drop", "reject", "keep")
CHAT_TEMPLATE_KWARGS = "chat_template_kwargs"  # TRL's name for the column

NOT_SCORED = "fewer than two completions with a score"
TOO_FEW = "fewer than two usable completions"
ALIKE = "all completions are the same"
EQUAL = "all scores are equal"
TOO_CLOSE = "no margin large enough"
NO_MAJORITY = "no majority for any pair"
ONLY_TRUNCATED = "only a truncated completion was better"


@dataclass
class Sample:
    """
    A completion as pairs need it.

    Args:
        completion (`str` or `list[dict]`):
            Text, or messages.
        completion_ids (`list[int]`):
            Its token ids.
        rewards (`list[float]`):
            By function, NaN = not applicable.
        score (`float`):
            Weighted sum of the rewards that judge, NaN where none applies.
        ended (`bool`):
            Whether the policy wrote an end.
        hidden (`bool`):
            Whether it has a special token before that.
    """

    completion: Any
    completion_ids: list[int]
    rewards: list[float]
    score: float
    ended: bool
    hidden: bool


@dataclass
class PairReport:
    """
    What became of prompts and completions. `prompts` = `prompts_with_pairs` + the sum of `without_pairs`.

    Args:
        prompts, completions, pairs, prompts_with_pairs (`int`):
            Counts.
        generated_tokens (`int`):
            Completion tokens, in all.
        without_pairs (`dict[str, int]`):
            Prompts that gave no pair, by reason.
        truncated, special_tokens_inside, repeated, not_scored (`int`):
            Completions that never ended, that have special tokens inside, that another one of their prompt equals, and
            to which no reward function applied. The first of these that applies counts; except for truncated ones that
            `truncated` allows, none of them is in a pair.
        truncated_used (`int`):
            Pairs in which there is a truncated completion.
        read_otherwise (`int`):
            Pairs with a completion of whose text TRL makes other tokens than were sampled, because they merge with
            the prompt's or can be written in several ways. A few are usual. If it is all of them, end prompts where a
            token ends.
    """

    prompts: int = 0
    completions: int = 0
    generated_tokens: int = 0
    pairs: int = 0
    prompts_with_pairs: int = 0
    without_pairs: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    special_tokens_inside: int = 0
    repeated: int = 0
    not_scored: int = 0
    truncated_used: int = 0
    read_otherwise: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [
            f"{self.pairs} pairs from {self.prompts_with_pairs} of {self.prompts} prompts, "
            f"{self.completions} completions of {self.generated_tokens} tokens"
        ]
        lines += [f"{count:>8} prompts: {reason}" for reason, count in sorted(self.without_pairs.items())]
        for name in ("truncated", "special_tokens_inside", "repeated", "not_scored"):
            if getattr(self, name):
                lines.append(f"{getattr(self, name):>8} completions: {name.replace('_', ' ')}")
        if self.truncated_used:
            lines.append(f"{self.truncated_used:>8} pairs have a truncated completion, which TRL will end")
        if self.read_otherwise:
            lines.append(f"{self.read_otherwise:>8} pairs are tokenised otherwise than they were sampled")
        return "\n".join(lines)


class NoPairsError(ValueError):
    """No prompt gave a pair; `report` says why."""

    def __init__(self, report: PairReport) -> None:
        self.report = report
        super().__init__(
            "No prompt gave a pair. Sample more completions of each, at a higher temperature, from prompts the policy "
            f"sometimes solves, or lower the margin.\n{report}"
        )


def make_pairs(
    trainer: GRPOTrainer,
    dataset: Dataset,
    num_generations: int | None = None,
    strategy: str = "best_worst",
    margin: float = 0.0,
    max_pairs: int | None = None,
    truncated: str = "drop",
    batch_size: int = 32,
    seed: int = 0,
    partial_results: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Dataset, PairReport]:
    """
    Samples completions from the trainer's policy as it is now, scores them by its reward functions, and pairs them.

    Args:
        trainer ([`GRPOTrainer`]):
            Any `trl_ext` trainer, with the policy and its reward functions: several, weighted, async, models. Those of
            `outcome_reward_funcs` judge. Every process must make the call.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and the columns the rewards need.
        num_generations (`int`, *optional*):
            Completions of each prompt (K), at least 2; by default the trainer's.
        strategy (`str`, *optional*, defaults to `"best_worst"`):
            `"best_worst"`: the best and the worst of K by weighted score, the first sampled among equals. `"margin"`:
            every two whose scores differ enough. `"majority"`: every two between which more than half of the reward
            functions that judge agree (weights only say which ones do: those that aren't 0, negated if negative).
        margin (`float`, *optional*, defaults to `0.0`):
            Scores have to differ by more than this, in units of the reward. Under `"majority"`: the share of votes
            for, less the share against, has to be more than this.
        max_pairs (`int`, *optional*):
            Pairs of a prompt, the largest margins first. `None`: all there are.
        truncated (`str`, *optional*, defaults to `"drop"`):
            Completions without an end: `"drop"` leaves them out; `"reject"` lets them be the worse one; `"keep"` takes
            them as if they had ended.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per generation.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The batch that starts at row i has `seed + i`, as in
            [`~trl_ext.curriculum.difficulty.pass_rates`].
        partial_results (`str` or `Path`, *optional*):
            File in which the completions of finished batches are kept with their rewards. If it is there already, with
            the same policy, data set and sampling, only what is missing is generated; strategy, margin and weights may
            be others.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called with (prompts done, prompts in all) after each batch.

    Returns:
        [`~datasets.Dataset`] and [`PairReport`]: a row a pair, with `prompt`, `chosen`, `rejected`, `score_chosen`,
        `score_rejected`, `score_margin` (under `"majority"` of the votes), `prompt_row` (the prompt's row in
        `dataset`), and the token ids as they were sampled in `chosen_sampled_ids`, `rejected_sampled_ids`.

    Raises:
        `ValueError`: on arguments that can't work, prompts that aren't text, tools, or partial results of another run.
        [`NoPairsError`]: if no prompt gave a pair.
    """
    samples = trainer.num_generations if num_generations is None else num_generations
    _check_arguments(samples, strategy, margin, max_pairs, truncated, batch_size)
    _check_data(trainer, dataset)
    # Weights only come in afterwards: pairs may be made anew of the same completions
    sampled = roll_out_all(
        trainer, dataset, samples, batch_size, seed, _as_lists, {}, partial_results, on_progress=on_progress
    )
    groups = [_as_samples(trainer, group) for group in sampled]
    tokens = sum(len(sample.completion_ids) for group in groups for sample in group)
    weights = [float(weight) for weight in trainer.reward_weights]
    judges = [weight if judging else 0.0 for weight, judging in zip(weights, trainer.is_outcome.tolist(), strict=True)]

    report = PairReport(prompts=len(groups), completions=sum(map(len, groups)), generated_tokens=tokens)
    reasons: Counter[str] = Counter()
    tokenizer = _tokenizer(trainer)
    template: Any = trainer.chat_template_kwargs
    rows: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        usable, few = _usable(group, truncated, report)
        found, reason = (
            ([], few) if len(usable) < 2 else pair_up(usable, strategy, margin, max_pairs, judges, truncated)
        )
        if not found:
            reasons[reason] += 1
            continue
        report.prompts_with_pairs += 1
        prompt = dataset[index]["prompt"]
        for better, worse, gap in found:
            report.truncated_used += not (better.ended and worse.ended)
            report.read_otherwise += any(
                _read_otherwise(tokenizer, prompt, side, template) for side in (better, worse)
            )
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": better.completion,
                    "rejected": worse.completion,
                    "score_chosen": better.score,
                    "score_rejected": worse.score,
                    "score_margin": gap,
                    "prompt_row": index,
                    "chosen_sampled_ids": better.completion_ids,
                    "rejected_sampled_ids": worse.completion_ids,
                    # TRL's DPO renders each row with its own
                    **({CHAT_TEMPLATE_KWARGS: template} if template and not isinstance(prompt, str) else {}),
                }
            )
    report.pairs, report.without_pairs = len(rows), dict(reasons)
    if not rows:
        raise NoPairsError(report)
    return Dataset.from_list(rows), report


def pair_up(
    samples: list[Sample],
    strategy: str = "best_worst",
    margin: float = 0.0,
    max_pairs: int | None = None,
    judges: list[float] | None = None,
    truncated: str = "keep",
) -> tuple[list[tuple[Sample, Sample, float]], str]:
    """
    The pairs of one prompt, see [`make_pairs`].

    Args:
        samples (`list[Sample]`):
            Different completions that all have a score, at least two.
        judges (`list[float]`, *optional*):
            Weights of the reward functions, 0 for those that don't judge; for `"majority"`.

    Returns:
        `list[tuple[Sample, Sample, float]]` and `str`: better, worse and margin, largest margins first; and why there
        are none.
    """
    scores = [sample.score for sample in samples]
    majority = strategy == "majority"
    if majority:
        gaps = {(i, j): _votes(samples[i], samples[j], judges or []) for i, j in combinations(range(len(samples)), 2)}
    else:
        gaps = {(i, j): (scores[i] - scores[j], True) for i, j in combinations(range(len(samples)), 2)}
    # Better first, whichever was sampled first
    found = [(i, j, gap, enough) if gap > 0 else (j, i, -gap, enough) for (i, j), (gap, enough) in gaps.items()]
    found = [(i, j, gap, enough) for i, j, gap, enough in found if gap > 0]
    if not found:
        return [], NO_MAJORITY if majority else EQUAL
    if strategy == "best_worst":
        may_win = [i for i, sample in enumerate(samples) if sample.ended or truncated != "reject"]
        if not may_win:
            return [], ONLY_TRUNCATED
        best, worst = max(may_win, key=scores.__getitem__), scores.index(min(scores))
        if scores[best] <= scores[worst]:
            return [], ONLY_TRUNCATED
        found = [(best, worst, scores[best] - scores[worst], True)]
    if not any(enough for *_, enough in found):
        return [], NO_MAJORITY
    found = [pair for pair in found if pair[3] and pair[2] > margin]
    if not found:
        return [], TOO_CLOSE
    if truncated == "reject":
        found = [pair for pair in found if samples[pair[0]].ended]
        if not found:
            return [], ONLY_TRUNCATED
    found.sort(key=lambda pair: -pair[2])  # stable: in the order of sampling where margins are equal
    return [(samples[i], samples[j], gap) for i, j, gap, _ in found[:max_pairs]], ""


def tokenized_for_dpo(
    tokenizer: Any, prompt: Any, completion: Any, chat_template_kwargs: dict[str, Any] | None = None
) -> tuple[list[int], list[int]]:
    """
    Token ids of prompt and completion as [`~trl.DPOTrainer`] makes them of a row: plain text is ended with the
    end-of-sequence token, and the completion starts where prompt and whole differ.
    """
    plain = isinstance(completion, str)
    if plain and not completion.endswith(tokenizer.eos_token):
        completion += tokenizer.eos_token
    template = {} if plain else chat_template_kwargs or {}
    whole = _tokenize(tokenizer, prompt + completion, **template)["input_ids"]
    alone = _tokenize(tokenizer, prompt, **({} if plain else {"add_generation_prompt": True}), **template)["input_ids"]
    cut = common_prefix_length(alone, whole)
    return whole[:cut], whole[cut:]


def _read_otherwise(tokenizer: Any, prompt: Any, sample: Sample, template: dict[str, Any]) -> bool:
    """Whether TRL makes other tokens of a completion's text than were sampled; how it ends aside."""
    sampled = sample.completion_ids[:-1] if sample.ended else sample.completion_ids
    return tokenized_for_dpo(tokenizer, prompt, sample.completion, template)[1][: len(sampled)] != sampled


def _votes(one: Sample, other: Sample, judges: list[float]) -> tuple[float, bool]:
    """Share of the votes for `one` less those for `other`, and whether either has more than half of them."""
    votes = [
        math.copysign(1.0, weight * (first - second)) if first != second else 0.0
        for weight, first, second in zip(judges, one.rewards, other.rewards, strict=True)
        if weight != 0 and not math.isnan(first) and not math.isnan(second)
    ]
    if not votes:
        return 0.0, False
    return sum(votes) / len(votes), max(votes.count(1.0), votes.count(-1.0)) > len(votes) / 2


def _usable(group: list[Sample], truncated: str, report: PairReport) -> tuple[list[Sample], str]:
    """The completions of a prompt that may be in a pair, and why there are too few of them."""
    written: list[Sample] = []
    for sample in group:
        if not sample.ended:
            report.truncated += 1
            if truncated == "drop":
                continue
        if sample.hidden:
            report.special_tokens_inside += sample.ended  # each completion is counted once
        else:
            written.append(sample)
    distinct: list[Sample] = []
    for sample in written:
        if any(sample.completion == other.completion for other in distinct):
            report.repeated += sample.ended
        else:
            distinct.append(sample)
    scored = [sample for sample in distinct if not math.isnan(sample.score)]
    report.not_scored += sum(math.isnan(sample.score) and sample.ended for sample in distinct)
    if len(written) < 2:
        return scored, TOO_FEW
    return scored, ALIKE if len(distinct) < 2 else NOT_SCORED


def _as_lists(scored: ScoredGroups) -> list[list[Any]]:
    """For each prompt, its completions as [completion, completion_ids, rewards]; `None` = not applicable."""
    prompts, samples, _ = scored.rewards.shape
    local = [(rollout.completion, rollout.completion_ids) for rollout in scored.rollouts]
    # Of all processes, without the rows that only filled up the batch
    written = gather_object(local)[: prompts * samples]
    kept = [
        [completion, ids, [None if math.isnan(reward) else reward for reward in earned]]
        for (completion, ids), earned in zip(written, scored.rewards.flatten(0, 1).tolist(), strict=True)
    ]
    return [kept[i : i + samples] for i in range(0, len(kept), samples)]


def _as_samples(trainer: GRPOTrainer, group: list[Any]) -> list[Sample]:
    tokenizer = _tokenizer(trainer)
    ends, special = set(trainer.eos_token_ids), set(tokenizer.all_special_ids)
    rewards = [[math.nan if reward is None else reward for reward in earned] for _, _, earned in group]
    scores = trainer.group_outcomes(torch.tensor(rewards, dtype=torch.float64), len(group))[0].tolist()
    samples = []
    for (completion, ids, _), earned, score in zip(group, rewards, scores, strict=True):
        ended = bool(ids) and ids[-1] in ends
        hidden = not special.isdisjoint(ids[:-1] if ended else ids)
        samples.append(Sample(completion, ids, earned, score, ended, hidden))
    return samples


def _tokenizer(trainer: GRPOTrainer) -> Any:
    processing: Any = trainer.processing_class
    return getattr(processing, "tokenizer", processing)


def _check_arguments(
    samples: int, strategy: str, margin: float, max_pairs: int | None, truncated: str, batch_size: int
) -> None:
    for name, value, known in (("strategy", strategy, STRATEGIES), ("truncated", truncated, TRUNCATED)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, known))}.")
    if samples < 2:
        raise ValueError(f"`num_generations` is {samples}, but a pair takes at least 2 completions of a prompt.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, but it must be at least 1.")
    if not margin >= 0:
        raise ValueError(f"`margin` is {margin}, but the better completion can't score lower: take 0 or more.")
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(f"`max_pairs` is {max_pairs}, but it must be at least 1, or `None` for all.")


def _check_data(trainer: GRPOTrainer, dataset: Dataset) -> None:
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(
            f"`trainer` is a {type(trainer).__name__}. Pass one of trl_ext's, such as trl_ext.GRPOTrainer."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`dataset` is a {type(dataset).__name__}, whose length isn't known. Load it without streaming."
        )
    if "prompt" not in dataset.column_names or len(dataset) == 0:
        raise ValueError(
            f"`dataset` needs rows with a column `prompt`; it has {len(dataset)} rows of {dataset.column_names}."
        )
    if {"image", "images"} & set(dataset.column_names) or isinstance(dataset[0]["prompt"], TokenizedPrompt):
        raise ValueError("Pairs are made of text. Remove images, or bring prompts as text or messages.")
    if trainer.tools or trainer.environments is not None:
        raise ValueError(
            "The trainer has tools or environments, which write into completions: DPO would train the policy on "
            "tokens that it didn't write. Make pairs without them."
        )
