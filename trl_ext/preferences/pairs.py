"""
Makes preference pairs from a policy, prompts and rewards: samples K completions of each prompt with the engine's own
rollouts, and pairs completions of which one is better than the other.

The result is a data set for [`~trl.DPOTrainer`] and [`~trl.RewardTrainer`]: text, or messages if the prompts are
messages. Text holds less than the token ids that the policy wrote, and TRL ends each completion of a pair in its own
way, plain text with the end-of-sequence token and messages as the chat template says. Two kinds of completions are
therefore left out, and counted:

- *truncated* completions, which the policy never ended: TRL would teach the policy to end them where the token limit
  was. (The argument `truncated` has other ways to treat them, for policies that hardly ever end a completion.)
- completions with a special token inside, which their text doesn't show: DPO would train on different tokens than were
  judged.

The margin is in the column `score_margin` and not in `margin`, because TRL's reward trainer takes a column `margin`
for the margin of its loss (https://huggingface.co/papers/2307.09288, eq. 2). Rename the column to have that.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl.data_utils import common_prefix_length

from ..curriculum.partial import roll_out_all
from ..errors import require, require_count, require_number, require_one_of, require_type
from ..rewards.implicit import token_ids
from ..rollouts.prompts import TokenizedPrompt
from ..rollouts.rollout import ScoredGroups
from ..trainers.data_checks import check_prompts
from ..trainers.grpo import GRPOTrainer
from ..trainers.samples import sample_of


STRATEGIES = ("best_worst", "margin", "majority")
TRUNCATED = ("drop", "reject", "keep")
PAIR_WEIGHT = "pair_weight"
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
    A sampled completion.

    Args:
        completion (`str` or `list[dict]`):
            Text, or messages.
        completion_ids (`list[int]`):
            Its token ids.
        rewards (`list[float]`):
            One for each reward function, NaN if it doesn't apply.
        score (`float`):
            Weighted sum of the outcome rewards, NaN if none applies.
        ended (`bool`):
            Whether the policy ended the completion.
        has_special_tokens (`bool`):
            Whether it has a special token before its end.
    """

    completion: Any
    completion_ids: list[int]
    rewards: list[float]
    score: float
    ended: bool
    has_special_tokens: bool


class Pair(NamedTuple):
    """Two completions of a prompt, and by how much the better one is better."""

    better: Sample
    worse: Sample
    margin: float


@dataclass
class PairReport:
    """
    What became of the prompts and completions. `prompts` = `prompts_with_pairs` + the sum of `without_pairs`.

    Args:
        prompts, completions, pairs, prompts_with_pairs (`int`):
            Counts.
        generated_tokens (`int`):
            Completion tokens that were sampled.
        without_pairs (`dict[str, int]`):
            Numbers of prompts without a pair, by reason.
        truncated, special_tokens_inside, repeated, not_scored (`int`):
            Numbers of completions that the policy never ended, that have special tokens inside, that equal an earlier
            completion of their prompt, and to which no reward function applied. Each completion is counted under the
            first of these that applies. None of them is in a pair, except for truncated ones that `truncated` allows.
        truncated_used (`int`):
            Number of pairs with a truncated completion.
        tokenized_differently (`int`):
            Number of pairs with a completion whose text TRL tokenises into different tokens than were sampled, because
            tokens merge with the prompt's or because the same text has several tokenisations. A few are usual. If it
            is all of them, let the prompts end where a token ends.
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
    tokenized_differently: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
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
        if self.tokenized_differently:
            lines.append(f"{self.tokenized_differently:>8} pairs are tokenised differently than they were sampled")
        return "\n".join(lines)


class NoPairsError(ValueError):
    """No prompt gave a pair. The attribute `report` says why."""

    def __init__(self, report: PairReport) -> None:
        self.report = report
        super().__init__(
            "No prompt gave a pair. Sample more completions of each prompt, at a higher temperature, use prompts that "
            f"the policy sometimes solves, or lower the margin.\n{report}"
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
    Samples completions from the trainer's policy as it is now, scores them with its reward functions, and pairs them.

    Args:
        trainer ([`GRPOTrainer`]):
            Any trainer of `trl_ext` with the policy and the reward functions, of which there can be several, with
            weights, async, or models. The `outcome_reward_funcs` decide which completion is better. Every process must
            make the call.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and the columns that the reward functions need.
        num_generations (`int`, *optional*):
            Completions per prompt (K), at least 2; by default the trainer's.
        strategy (`str`, *optional*, defaults to `"best_worst"`):
            `"best_worst"`: the best and the worst of the K completions by weighted score; among equals, the one that
            was sampled first. `"margin"`: every two completions whose scores differ enough. `"majority"`: every two
            completions of which more than half of the outcome reward functions prefer the same one. (Under
            `"majority"`, only the signs of the weights matter: functions with weight 0 don't vote, and the vote of a
            function with a negative weight is reversed.)
        margin (`float`, *optional*, defaults to `0.0`):
            The scores have to differ by more than this, in units of the reward. Under `"majority"`: the share of votes
            for the better completion minus the share of votes for the other has to be larger than this.
        max_pairs (`int`, *optional*):
            The largest number of pairs per prompt, those with the largest margins first. `None`: no limit.
        truncated (`str`, *optional*, defaults to `"drop"`):
            What happens to completions that the policy didn't end. `"drop"`: they are in no pair. `"reject"`: they can
            only be the worse one of a pair. `"keep"`: they are treated as if they had ended.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts per generation batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The batch that starts at row i has the seed `seed + i`, as in
            [`~trl_ext.curriculum.difficulty.pass_rates`].
        partial_results (`str` or `Path`, *optional*):
            A file to which the completions of each finished batch are written with their rewards. If the file exists
            and belongs to the same policy, data set and sampling, only missing batches are generated. Strategy, margin
            and weights may differ from those with which it was written.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called after each batch with the number of finished prompts and the number of all prompts.

    Returns:
        [`~datasets.Dataset`] and [`PairReport`]: one row per pair, with `prompt`, `chosen`, `rejected`,
        `score_chosen`, `score_rejected`, `score_margin` (under `"majority"`, the margin of the votes), `prompt_row`
        (the prompt's row in `dataset`), the sampled token ids in `chosen_sampled_ids` and `rejected_sampled_ids`, and
        `pair_weight` ([`with_equal_budgets`]).

    Raises:
        ValueError: for arguments that can't work, prompts that aren't text, tools, or partial results of a different
            run.
        TypeError: for a trainer that isn't one of `trl_ext`.
        NoPairsError: if no prompt gave a pair.
    """
    require_type("trainer", trainer, GRPOTrainer, "Pass one of trl_ext's, such as trl_ext.GRPOTrainer.")
    samples = trainer.num_generations if num_generations is None else num_generations
    check_settings(samples, strategy, margin, max_pairs, truncated, batch_size)
    _check_data(trainer, dataset)
    # The partial results don't depend on weights, so that pairs can be made again from the same completions
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
        usable, reason = _usable(group, truncated, report)
        found: list[Pair] = []
        if len(usable) >= 2:
            found, reason = pair_up(usable, strategy, margin, max_pairs, judges, truncated)
        if not found:
            reasons[reason] += 1
            continue
        report.prompts_with_pairs += 1
        prompt = dataset[index]["prompt"]
        for pair in found:
            sides = (pair.better, pair.worse)
            report.truncated_used += not all(side.ended for side in sides)
            report.tokenized_differently += any(
                _is_tokenized_differently(tokenizer, prompt, side, template) for side in sides
            )
            rows.append(_row(pair, prompt, index, template))
    report.pairs, report.without_pairs = len(rows), dict(reasons)
    if not rows:
        raise NoPairsError(report)
    return with_equal_budgets(Dataset.from_list(rows)), report


def with_equal_budgets(pairs: Dataset) -> Dataset:
    """
    Pairs with weights under which each prompt counts the same, however many pairs it gave: the weights of a prompt's
    pairs are equal, their sum is the same for all prompts, and the mean over all pairs is 1. DPO takes them with
    `weight_column="pair_weight"`.

    Args:
        pairs ([`~datasets.Dataset`]):
            Pairs with the column `prompt_row`. Weights that they have are replaced.
    """
    counts = Counter(pairs["prompt_row"])
    budget = len(pairs) / len(counts)
    weights = [budget / counts[row] for row in pairs["prompt_row"]]
    kept = pairs.remove_columns(PAIR_WEIGHT) if PAIR_WEIGHT in pairs.column_names else pairs
    return kept.add_column(PAIR_WEIGHT, weights)


def _row(pair: Pair, prompt: Any, index: int, template: dict[str, Any] | None) -> dict[str, Any]:
    row = {
        "prompt": prompt,
        "chosen": pair.better.completion,
        "rejected": pair.worse.completion,
        "score_chosen": pair.better.score,
        "score_rejected": pair.worse.score,
        "score_margin": pair.margin,
        "prompt_row": index,
        "chosen_sampled_ids": pair.better.completion_ids,
        "rejected_sampled_ids": pair.worse.completion_ids,
    }
    # TRL's DPO applies the chat template to each row with the row's own arguments
    return row | ({CHAT_TEMPLATE_KWARGS: template} if template and not isinstance(prompt, str) else {})


def pair_up(
    samples: list[Sample],
    strategy: str = "best_worst",
    margin: float = 0.0,
    max_pairs: int | None = None,
    judges: list[float] | None = None,
    truncated: str = "keep",
) -> tuple[list[Pair], str]:
    """
    The pairs of one prompt; the other arguments are those of [`make_pairs`].

    Args:
        samples (`list[Sample]`):
            At least two different completions, all with a score.
        judges (`list[float]`, *optional*):
            For `"majority"`: the weights of the reward functions, 0 for those that are no outcome rewards.

    Returns:
        `list[Pair]` and `str`: the pairs, those with the largest margins first, and the reason if there are none.
    """
    scores = [sample.score for sample in samples]
    majority = strategy == "majority"
    if majority:
        gaps = {(i, j): _votes(samples[i], samples[j], judges or []) for i, j in combinations(range(len(samples)), 2)}
    else:
        gaps = {(i, j): (scores[i] - scores[j], True) for i, j in combinations(range(len(samples)), 2)}
    # The better one first, whichever was sampled first
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
    found.sort(key=lambda pair: -pair[2])  # stable, so that equal margins stay in the order of sampling
    return [Pair(samples[i], samples[j], gap) for i, j, gap, _ in found[:max_pairs]], ""


def tokenized_for_dpo(
    tokenizer: Any, prompt: Any, completion: Any, chat_template_kwargs: dict[str, Any] | None = None
) -> tuple[list[int], list[int]]:
    """
    Token ids of prompt and completion as [`~trl.DPOTrainer`] makes them of a row: plain text is ended with the
    end-of-sequence token, and the completion starts at the first token in which the whole differs from the prompt.
    """
    plain = isinstance(completion, str)
    if plain and not completion.endswith(tokenizer.eos_token):
        completion += tokenizer.eos_token
    template = {} if plain else chat_template_kwargs or {}
    whole = token_ids(tokenizer, prompt + completion, **template)
    alone = token_ids(tokenizer, prompt, **({} if plain else {"add_generation_prompt": True}), **template)
    cut = common_prefix_length(alone, whole)
    return whole[:cut], whole[cut:]


def _is_tokenized_differently(tokenizer: Any, prompt: Any, sample: Sample, template: dict[str, Any]) -> bool:
    """Whether TRL makes different tokens of a completion's text than were sampled, disregarding its end."""
    sampled = sample.completion_ids[:-1] if sample.ended else sample.completion_ids
    return tokenized_for_dpo(tokenizer, prompt, sample.completion, template)[1][: len(sampled)] != sampled


def _votes(one: Sample, other: Sample, judges: list[float]) -> tuple[float, bool]:
    """Share of votes for `one` minus the share for `other`, and whether either has more than half of the votes."""
    votes = [
        math.copysign(1.0, weight * (first - second)) if first != second else 0.0
        for weight, first, second in zip(judges, one.rewards, other.rewards, strict=True)
        if weight != 0 and not math.isnan(first) and not math.isnan(second)
    ]
    if not votes:
        return 0.0, False
    return sum(votes) / len(votes), max(votes.count(1.0), votes.count(-1.0)) > len(votes) / 2


def _usable(group: list[Sample], truncated: str, report: PairReport) -> tuple[list[Sample], str]:
    """The completions of a prompt that may be in a pair, and the reason if there are fewer than two."""
    written: list[Sample] = []
    for sample in group:
        if not sample.ended:
            report.truncated += 1
            if truncated == "drop":
                continue
        if sample.has_special_tokens:
            report.special_tokens_inside += sample.ended  # others were counted as truncated
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
    """For each prompt, its completions as `[completion, completion_ids, rewards]`, with `None` instead of NaN."""
    prompts, samples, _ = scored.rewards.shape
    local = [(rollout.completion, rollout.completion_ids) for rollout in scored.rollouts]
    # From all processes, without the rows that only pad the batch
    written = gather_object(local)[: prompts * samples]
    kept = [
        [completion, ids, [None if math.isnan(reward) else reward for reward in earned]]
        for (completion, ids), earned in zip(written, scored.rewards.flatten(0, 1).tolist(), strict=True)
    ]
    return [kept[i : i + samples] for i in range(0, len(kept), samples)]


def read_completions(partial_results: str | Path) -> list[list[list[Any]]]:
    """
    What [`make_pairs`] wrote to `partial_results`: for each prompt its completions, as
    `[completion, completion_ids, rewards]`, with `None` for a reward that didn't apply.
    """
    _, *batches = Path(partial_results).read_text(encoding="utf-8").splitlines()  # the first says whose they are
    return [group for batch in batches for group in json.loads(batch)]


def _as_samples(trainer: GRPOTrainer, group: list[Any]) -> list[Sample]:
    tokenizer = _tokenizer(trainer)
    ends, special = set(trainer.eos_token_ids), set(tokenizer.all_special_ids)
    rewards = [[math.nan if reward is None else reward for reward in earned] for _, _, earned in group]
    scores = trainer.group_outcomes(torch.tensor(rewards, dtype=torch.float64), len(group))[0].tolist()
    samples = []
    for (completion, ids, _), earned, score in zip(group, rewards, scores, strict=True):
        ended = bool(ids) and ids[-1] in ends
        has_special_tokens = not special.isdisjoint(ids[:-1] if ended else ids)
        samples.append(Sample(completion, ids, earned, score, ended, has_special_tokens))
    return samples


def _tokenizer(trainer: GRPOTrainer) -> Any:
    processing: Any = trainer.processing_class
    return getattr(processing, "tokenizer", processing)


def check_settings(
    samples: int, strategy: str, margin: float, max_pairs: int | None, truncated: str, batch_size: int
) -> None:
    """Raises an error for arguments of [`make_pairs`] that can't work."""
    require_one_of("strategy", strategy, STRATEGIES)
    require_one_of("truncated", truncated, TRUNCATED)
    require_count("num_generations", samples)
    require_number("margin", margin)
    require(
        samples >= 2, f"`num_generations` is {samples}, but a pair takes at least 2 completions of a prompt. Set it."
    )
    require_count("batch_size", batch_size)
    require(margin >= 0, f"`margin` is {margin}, but the better completion can't score lower: set 0 or more.")
    require(
        max_pairs is None or max_pairs >= 1,
        f"`max_pairs` is {max_pairs}, but it must be at least 1, or `None` for no limit.",
    )


def _check_data(trainer: GRPOTrainer, dataset: Dataset) -> None:
    require_type("dataset", dataset, Dataset, "Pass a datasets.Dataset, loaded without streaming.")
    require(
        "prompt" in dataset.column_names and len(dataset) > 0,
        f"dataset has {len(dataset)} rows of {dataset.column_names}. Pass rows with a column `prompt`.",
    )
    check_prompts("dataset", sample_of("dataset", dataset, ["prompt"]).rows)
    require(
        not {"image", "images"} & set(dataset.column_names) and not isinstance(dataset[0]["prompt"], TokenizedPrompt),
        "Pairs are made of text. Remove images, and pass prompts as text or messages.",
    )
    require(
        not trainer.tools and trainer.environments is None,
        "The trainer has tools or environments, which write into completions: DPO would train the policy on "
        "tokens that it didn't write. Make pairs without them.",
    )
