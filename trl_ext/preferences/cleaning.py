"""
Cleans preference pairs whose labels can't all be trusted: finds labels that are probably wrong, flips or drops their
pairs, and reports how many there were.

Labels are judged by the margin of a scorer ([`clean_by_margin`]), by cross-fitting ([`clean_by_cross_fitting`]:
scorers are trained on the same noisy pairs, and each judges the pairs on which it wasn't trained), or by the agreement
of several scorers ([`clean_by_agreement`]). All three return the cleaned pairs and a [`CleaningReport`] with an action
and a reason for every pair.

A scorer is called as reward functions are, `scorer(prompts=[...], completions=[...])`, and returns one number for each
completion, or `None` or NaN if it doesn't apply.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..errors import require
from ..trainers.samples import sample_of
from .noise import FEWEST_PAIRS, NoiseEstimate, estimate_noise, wrong_label_probabilities


Scorer = Callable[..., Sequence[float | None]]
TrainScorer = Callable[[Dataset], Scorer]

KEPT, FLIPPED, DROPPED = "kept", "flipped", "dropped"
NOT_SCORED = "not scored"
UNRELIABLE = "the scorers learned too little to tell wrong labels from their own errors"
# Columns whose sign changes when a pair is flipped: ours, and the one that TRL's reward trainer reads
MARGINS = ("score_margin", "margin")


@dataclass(frozen=True)
class CleaningReport:
    """
    What was done to each pair, and why. The counts always add up to the number of pairs.

    Args:
        method (`str`):
            How the pairs were judged.
        actions (`tuple[str, ...]`):
            `"kept"`, `"flipped"` or `"dropped"` for each pair before cleaning, in order.
        reasons (`tuple[str, ...]`):
            The reason for each action.
        noise (`NoiseEstimate`, *optional*):
            Estimated share of wrong labels before cleaning. Only cross-fitting gives one.
        noise_left (`float`, *optional*):
            Expected share of wrong labels after cleaning.
    """

    method: str
    actions: tuple[str, ...]
    reasons: tuple[str, ...]
    noise: NoiseEstimate | None = None
    noise_left: float | None = None

    @property
    def pairs(self) -> int:
        return len(self.actions)

    def rows(self, action: str) -> list[int]:
        """Rows, before cleaning, of the pairs with this action."""
        return [row for row, done in enumerate(self.actions) if done == action]

    def to_dict(self) -> dict[str, Any]:
        """Counts, the noise estimate, and the rows that were flipped and dropped, in types that JSON has."""
        counts = Counter(zip(self.actions, self.reasons, strict=True))
        noise = self.noise
        return {
            "method": self.method,
            "pairs": self.pairs,
            **{action: len(self.rows(action)) for action in (KEPT, FLIPPED, DROPPED)},
            "reasons": {f"{action}: {reason}": count for (action, reason), count in sorted(counts.items())},
            "noise": None if noise is None else {"rate": noise.rate, "low": noise.low, "high": noise.high},
            "noise_left": self.noise_left,
            "flipped_rows": self.rows(FLIPPED),
            "dropped_rows": self.rows(DROPPED),
        }

    def save(self, path: str | Path) -> None:
        """Writes [`~CleaningReport.to_dict`] as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        counts = self.to_dict()
        lines = [f"{self.pairs} pairs, {self.method}"]
        lines += [f"{count:>8} {reason}" for reason, count in counts["reasons"].items()]
        if self.noise is not None:
            lines.append(str(self.noise))
        if self.noise_left is not None:
            lines.append(f"{self.noise_left:.1%} of the remaining labels are expected to be wrong")
        return "\n".join(lines)


def pair_margins(pairs: Dataset, scorer: Scorer) -> list[float]:
    """
    The margin score(chosen) − score(rejected) of each pair, NaN if the scorer doesn't apply.

    Args:
        pairs ([`~datasets.Dataset`]):
            Rows with `prompt`, `chosen` and `rejected`.
        scorer (`Callable`):
            From `scorer(prompts=[...], completions=[...])` to one number per completion. It is called once.

    Raises:
        ValueError: if a column is missing, or if the scorer doesn't return one score per completion.
    """
    check_pairs(pairs)
    prompts, sides = list(pairs["prompt"]), [list(pairs["chosen"]), list(pairs["rejected"])]
    scores = list(scorer(prompts=prompts + prompts, completions=sides[0] + sides[1]))
    require(
        len(scores) == 2 * len(pairs),
        f"The scorer returned {len(scores)} scores for {2 * len(pairs)} completions. Return one for each, `None` "
        "where it doesn't apply.",
    )
    numbers = [math.nan if score is None else float(score) for score in scores]
    return [better - worse for better, worse in zip(numbers[: len(pairs)], numbers[len(pairs) :], strict=True)]


def flip_pairs(pairs: Dataset, rows: Sequence[int]) -> Dataset:
    """
    A copy of the data set in which some rows are flipped: each column with `chosen` in its name is swapped with the
    corresponding one with `rejected`, and `score_margin` and `margin` change their sign.
    """
    flipped = set(rows)
    swaps = {
        name: other
        for name in pairs.column_names
        if (other := name.replace("chosen", "rejected")) != name and other in pairs.column_names
    }

    def flip(row: dict[str, Any], index: int) -> dict[str, Any]:
        if index not in flipped:
            return {}
        swapped = {name: row[other] for name, other in swaps.items()}
        swapped |= {other: row[name] for name, other in swaps.items()}
        return swapped | {name: -row[name] for name in MARGINS if row.get(name) is not None}

    return pairs.map(flip, with_indices=True, load_from_cache_file=False) if flipped else pairs


def clean_by_margin(
    pairs: Dataset, scorer: Scorer, min_margin: float = 0.0, flip_margin: float | None = None
) -> tuple[Dataset, CleaningReport]:
    """
    Judges pairs by a scorer that can be trusted, for example a function, or a reward model trained on different data.

    Args:
        pairs ([`~datasets.Dataset`]):
            Rows with `prompt`, `chosen` and `rejected`. The data set stays as it is.
        scorer (`Callable`):
            Scores completions; see the module's documentation.
        min_margin (`float`, *optional*, defaults to `0.0`):
            Pairs whose margin score(chosen) − score(rejected) is below it are dropped. In the scorer's units.
        flip_margin (`float`, *optional*):
            Pairs whose label the scorer contradicts by at least this margin are flipped instead. `None`: no pair is.

    Returns:
        [`~datasets.Dataset`] and [`CleaningReport`]: the remaining pairs, in order. Pairs without scores are kept.

    Raises:
        ValueError: if `flip_margin` isn't positive, or if −`flip_margin` is above `min_margin`.
    """
    require(
        flip_margin is None or (flip_margin > 0 and -flip_margin <= min_margin),
        f"`flip_margin` is {flip_margin}, but must be positive and at least −`min_margin` ({-min_margin}): pairs "
        "that are good enough to be kept can't be flipped.",
    )
    decisions = []
    for margin in pair_margins(pairs, scorer):
        if math.isnan(margin):
            decisions.append((KEPT, NOT_SCORED))
        elif flip_margin is not None and margin <= -flip_margin:
            decisions.append((FLIPPED, f"contradicted by a margin of at least {flip_margin:g}"))
        elif margin < min_margin:
            decisions.append((DROPPED, f"margin below {min_margin:g}"))
        else:
            decisions.append((KEPT, f"margin of at least {min_margin:g}"))
    return _apply(pairs, decisions, "by the margin of a scorer")


def clean_by_agreement(
    pairs: Dataset, scorers: Sequence[Scorer], min_agreement: float = 0.5, flip_agreement: float | None = 1.0
) -> tuple[Dataset, CleaningReport]:
    """
    Judges pairs by the votes of several scorers. A scorer abstains if it gives both completions the same score, or if
    it doesn't apply.

    Args:
        pairs ([`~datasets.Dataset`]):
            Rows with `prompt`, `chosen` and `rejected`. The data set stays as it is.
        scorers (`Sequence[Callable]`):
            At least two. Their scores may have different units.
        min_agreement (`float`, *optional*, defaults to `0.5`):
            A pair is dropped if the share of votes for its label is smaller.
        flip_agreement (`float`, *optional*, defaults to `1.0`):
            A pair is flipped if the share of votes against its label is at least this, with at least two such votes.
            `None`: no pair is flipped.

    Returns:
        [`~datasets.Dataset`] and [`CleaningReport`]: the remaining pairs, in order. Pairs without votes are kept.

    Raises:
        ValueError: with fewer than two scorers, if `min_agreement` isn't in [0, 1], or `flip_agreement` in (0.5, 1].
    """
    require(len(scorers) >= 2, f"`scorers` has {len(scorers)}: agreement takes two. For one, use `clean_by_margin`.")
    require(
        0 <= min_agreement <= 1,
        f"`min_agreement` is {min_agreement}, but it is a share of the votes: set it in [0, 1].",
    )
    require(
        flip_agreement is None or 0.5 < flip_agreement <= 1,
        f"`flip_agreement` is {flip_agreement}, but a majority is a share in (0.5, 1].",
    )
    decisions = []
    for margins in zip(*(pair_margins(pairs, scorer) for scorer in scorers), strict=True):
        good, bad = sum(margin > 0 for margin in margins), sum(margin < 0 for margin in margins)
        if good + bad == 0:
            decisions.append((KEPT, "no votes"))
        elif flip_agreement is not None and bad >= 2 and bad / (good + bad) >= flip_agreement:
            decisions.append((FLIPPED, f"at least {flip_agreement:.0%} of the votes against it"))
        elif good / (good + bad) < min_agreement:
            decisions.append((DROPPED, f"less than {min_agreement:.0%} of the votes for it"))
        else:
            decisions.append((KEPT, f"at least {min_agreement:.0%} of the votes for it"))
    return _apply(pairs, decisions, f"by the agreement of {len(scorers)} scorers")


def cross_fitted_margins(
    pairs: Dataset,
    train_scorer: TrainScorer,
    folds: int = 5,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """
    The margin of each pair by a scorer that was trained on the other folds. All pairs of a prompt are in the same
    fold, because they can share completions, which a scorer would remember.

    Args:
        pairs ([`~datasets.Dataset`]):
            Rows with `prompt`, `chosen` and `rejected`.
        train_scorer (`Callable[[Dataset], Scorer]`):
            Trains a scorer on pairs, for example [`~trl_ext.preferences.scorers.RewardModelTraining`].
        folds (`int`, *optional*, defaults to `5`):
            Number of folds K. Each scorer is trained on about (K − 1)/K of the pairs.
        seed (`int`, *optional*, defaults to `0`):
            Seed with which prompts are dealt to folds.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called after each fold with the number of finished folds and the number of all folds.

    Raises:
        ValueError: with fewer than two folds, or more folds than prompts.
    """
    check_pairs(pairs)
    prompts = [_key(prompt) for prompt in pairs["prompt"]]
    distinct = list(dict.fromkeys(prompts))
    require(
        2 <= folds <= len(distinct),
        f"`folds` is {folds}, but must be from 2 to the number of different prompts, {len(distinct)}.",
    )
    random.Random(seed).shuffle(distinct)
    fold_of = {prompt: place % folds for place, prompt in enumerate(distinct)}
    margins = [math.nan] * len(pairs)
    for fold in range(folds):
        held_out = [row for row, prompt in enumerate(prompts) if fold_of[prompt] == fold]
        others = [row for row, prompt in enumerate(prompts) if fold_of[prompt] != fold]
        scorer = train_scorer(pairs.select(others))
        for row, margin in zip(held_out, pair_margins(pairs.select(held_out), scorer), strict=True):
            margins[row] = margin
        if on_progress is not None:
            on_progress(fold + 1, folds)
    return margins


def clean_by_cross_fitting(
    pairs: Dataset,
    train_scorer: TrainScorer,
    folds: int = 5,
    flip_above: float | None = 0.5,
    drop_above: float | None = None,
    seed: int = 0,
    rounds: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Dataset, CleaningReport]:
    """
    Cleans pairs without any source other than the pairs themselves: each pair is judged by a scorer that was trained
    on the others, including their wrong labels. The share of wrong labels ε is estimated from all margins
    ([`~trl_ext.preferences.noise.estimate_noise`]), and with it the probability that each single label is wrong. (This
    is confident learning, https://huggingface.co/papers/1911.00068, with a calibrated model instead of thresholds.)

    Args:
        pairs ([`~datasets.Dataset`]):
            At least 50 rows with `prompt`, `chosen` and `rejected`. The data set stays as it is.
        train_scorer (`Callable[[Dataset], Scorer]`):
            Trains a scorer on pairs, for example [`~trl_ext.preferences.scorers.RewardModelTraining`].
        folds (`int`, *optional*, defaults to `5`):
            Number of folds.
        flip_above (`float`, *optional*, defaults to `0.5`):
            A pair is flipped if its label is wrong with a higher probability than this. `None`: no pair is flipped.
        drop_above (`float`, *optional*):
            Among the other pairs, a pair is dropped if its label is wrong with a higher probability than this. `None`:
            no pair is dropped.
        seed (`int`, *optional*, defaults to `0`):
            Seed with which prompts are dealt to folds.
        rounds (`int`, *optional*, defaults to `1`):
            In each further round, scorers are trained on pairs with the labels that the round before found more likely
            right, and judge the original labels. They see fewer wrong labels; on the other hand, the label of a pair
            has influenced, through the scorers of the round before, the labels on which its own scorer is trained.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called after each fold of a round with the number of finished folds and the number of all folds.

    Returns:
        [`~datasets.Dataset`] and [`CleaningReport`]: the remaining pairs, in order. The report's
        `noise.label_smoothing` is meant for DPO on the original pairs, its `noise_left` for DPO on the remaining ones.
        Pairs without scores are kept, and all pairs are if the estimate is not reliable
        ([`~trl_ext.preferences.noise.NoiseEstimate`]'s `is_reliable`).

    Raises:
        ValueError: before a scorer is trained, with too few pairs, if a probability is out of range, or if
            `drop_above` isn't below `flip_above`.
    """
    _check_cross_fitting(pairs, flip_above, drop_above, rounds)
    flipped: set[int] = set()
    for _ in range(rounds):
        margins = cross_fitted_margins(flip_pairs(pairs, sorted(flipped)), train_scorer, folds, seed, on_progress)
        margins = [-margin if row in flipped else margin for row, margin in enumerate(margins)]
        scored = [margin for margin in margins if not math.isnan(margin)]
        noise = estimate_noise(scored) if len(scored) >= FEWEST_PAIRS and any(scored) else None
        if noise is None or not noise.is_reliable:
            break
        wrong = wrong_label_probabilities(margins, noise)
        flipped = {row for row, probability in enumerate(wrong) if probability > 0.5}
    method = f"by cross-fitting in {folds} folds" + (f", {rounds} rounds" if rounds > 1 else "")
    if noise is None or not noise.is_reliable:
        return _apply(pairs, [(KEPT, UNRELIABLE)] * len(pairs), method, noise, None)
    decisions, left = [], []
    for margin, probability in zip(margins, wrong, strict=True):
        if math.isnan(margin):
            decisions.append((KEPT, NOT_SCORED))
            left.append(probability)
        elif flip_above is not None and probability > flip_above:
            decisions.append((FLIPPED, f"wrong with a probability above {flip_above:g}"))
            left.append(1 - probability)
        elif drop_above is not None and probability > drop_above:
            decisions.append((DROPPED, f"wrong with a probability above {drop_above:g}"))
        else:
            decisions.append((KEPT, "more likely right"))
            left.append(probability)
    noise_left = sum(left) / len(left) if left else None
    return _apply(pairs, decisions, method, noise, noise_left)


def _check_cross_fitting(pairs: Dataset, flip_above: float | None, drop_above: float | None, rounds: int) -> None:
    check_pairs(pairs)
    require(
        len(pairs) >= FEWEST_PAIRS,
        f"There are {len(pairs)} pairs, but the share of wrong labels can be estimated from {FEWEST_PAIRS} on. Make "
        "more, or clean them with a scorer that can be trusted (clean_by_margin).",
    )
    require(
        flip_above is None or 0.5 <= flip_above <= 1,
        f"`flip_above` is {flip_above}. A label that is more likely right must not be flipped: set it in [0.5, 1].",
    )
    require(
        drop_above is None or 0 <= drop_above <= 1,
        f"`drop_above` is {drop_above}, but it is a probability: set it in [0, 1].",
    )
    require(
        flip_above is None or drop_above is None or drop_above < flip_above,
        f"`drop_above` ({drop_above}) isn't below `flip_above` ({flip_above}), so that it would drop nothing.",
    )
    require(rounds >= 1, f"`rounds` is {rounds}, but must be at least 1.")


def _apply(
    pairs: Dataset,
    decisions: Sequence[tuple[str, str]],
    method: str,
    noise: NoiseEstimate | None = None,
    noise_left: float | None = None,
) -> tuple[Dataset, CleaningReport]:
    actions, reasons = zip(*decisions, strict=True)
    report = CleaningReport(method, actions, reasons, noise, noise_left)
    left = [row for row, action in enumerate(actions) if action != DROPPED]
    flipped = flip_pairs(pairs, report.rows(FLIPPED))
    return flipped if len(left) == len(flipped) else flipped.select(left), report


def check_pairs(pairs: Dataset) -> None:
    """Raises an error for pairs that are no data set, lack a column or have no rows."""
    if not isinstance(pairs, Dataset):
        raise TypeError(f"The pairs are a {type(pairs).__name__}. Load them as a datasets.Dataset, without streaming.")
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in pairs.column_names]
    require(
        not missing,
        f"The pairs have no column {', '.join(missing)} (they have {pairs.column_names}). If prompts are part of the "
        "completions, separate them with `trl.data_utils.extract_prompt`.",
    )
    require(len(pairs) > 0, "pairs has 0 rows: there is nothing to clean. Pass some pairs.")
    sample_of("pairs", pairs, ("prompt", "chosen", "rejected"))  # refuses missing values


def _key(prompt: Any) -> str:
    """A text by which prompts can be compared, also those that are messages."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
