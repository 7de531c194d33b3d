"""
Preference pairs whose labels can't all be trusted: find those that are probably wrong, turn them around or leave them
out, and say how many.

By the margin of a scorer ([`clean_by_margin`]), by cross-fitting ([`clean_by_cross_fitting`]: scorers trained on the
same noisy pairs, each judging those it wasn't trained on), or by the agreement of several scorers
([`clean_by_agreement`]). All return the cleaned pairs and a [`CleaningReport`] that has an action and a reason for
every pair it was given.

A scorer is called as reward functions are, `scorer(prompts=[...], completions=[...])`, and returns one number for each
completion, `None` or NaN where it doesn't apply.
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

from .noise import FEWEST_PAIRS, NoiseEstimate, estimate_noise, wrong_label_probabilities


Scorer = Callable[..., Sequence[float | None]]
Fit = Callable[[Dataset], Scorer]

KEPT, FLIPPED, DROPPED = "kept", "flipped", "dropped"
NOT_SCORED = "not scored"
NOT_TOLD = "the scorers learned too little to tell wrong labels from their own errors"
# Columns that change their sign when a pair is turned around: ours, and the one that TRL's reward trainer knows
MARGINS = ("score_margin", "margin")


@dataclass(frozen=True)
class CleaningReport:
    """
    What was done to each pair, and why. The counts always add up to the number of pairs.

    Args:
        method (`str`):
            How the pairs were judged.
        actions (`tuple[str, ...]`):
            `"kept"`, `"flipped"` or `"dropped"`, for each pair that was given, in order.
        reasons (`tuple[str, ...]`):
            Why, for each.
        noise (`NoiseEstimate`, *optional*):
            Share of the labels that were wrong before. Only from scorers that didn't train on the pairs they judge.
        noise_left (`float`, *optional*):
            Expected share of wrong labels among the pairs that are left.
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
        """Rows of the pairs that were given for which this was done."""
        return [row for row, done in enumerate(self.actions) if done == action]

    def to_dict(self) -> dict[str, Any]:
        """Counts, the estimate, and which rows were flipped and dropped; as JSON takes it."""
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
            lines.append(f"{self.noise_left:.1%} of the labels that are left are expected to be wrong")
        return "\n".join(lines)


def pair_margins(pairs: Dataset, scorer: Scorer) -> list[float]:
    """
    score(chosen) − score(rejected) of each pair, NaN where the scorer doesn't apply.

    Args:
        pairs ([`~datasets.Dataset`]):
            With `prompt`, `chosen` and `rejected`.
        scorer (`Callable`):
            `scorer(prompts=[...], completions=[...])` to one number a completion. It is called once.

    Raises:
        `ValueError`: if a column is missing, or the scorer returns another number of scores.
    """
    check_pairs(pairs)
    prompts, sides = list(pairs["prompt"]), [list(pairs["chosen"]), list(pairs["rejected"])]
    scores = list(scorer(prompts=prompts + prompts, completions=sides[0] + sides[1]))
    if len(scores) != 2 * len(pairs):
        raise ValueError(
            f"The scorer returned {len(scores)} scores for {2 * len(pairs)} completions. Return one for each, `None` "
            "where it doesn't apply."
        )
    numbers = [math.nan if score is None else float(score) for score in scores]
    return [better - worse for better, worse in zip(numbers[: len(pairs)], numbers[len(pairs) :], strict=True)]


def turn_around(pairs: Dataset, rows: Sequence[int]) -> Dataset:
    """
    Swaps better and worse in some rows: every column with `chosen` in its name with that of `rejected`, and the sign
    of `score_margin` and `margin`.
    """
    turned = set(rows)
    swaps = {
        name: other
        for name in pairs.column_names
        if (other := name.replace("chosen", "rejected")) != name and other in pairs.column_names
    }

    def turn(row: dict[str, Any], index: int) -> dict[str, Any]:
        if index not in turned:
            return {}
        swapped = {name: row[other] for name, other in swaps.items()}
        swapped |= {other: row[name] for name, other in swaps.items()}
        return swapped | {name: -row[name] for name in MARGINS if row.get(name) is not None}

    return pairs.map(turn, with_indices=True, load_from_cache_file=False) if turned else pairs


def clean_by_margin(
    pairs: Dataset, scorer: Scorer, min_margin: float = 0.0, flip_margin: float | None = None
) -> tuple[Dataset, CleaningReport]:
    """
    Judges pairs by a scorer that can be trusted: a function, a reward model trained on other data.

    Args:
        pairs ([`~datasets.Dataset`]):
            With `prompt`, `chosen` and `rejected`.
        scorer (`Callable`):
            Scores completions; see the module.
        min_margin (`float`, *optional*, defaults to `0.0`):
            Pairs with a margin score(chosen) − score(rejected) below it are dropped. In the scorer's units.
        flip_margin (`float`, *optional*):
            Pairs whose label it contradicts by at least this margin are turned around instead. `None`: none.

    Returns:
        The pairs that are left, in order, and the [`CleaningReport`]. Pairs that aren't scored stay.

    Raises:
        `ValueError`: if `flip_margin` isn't positive or −`flip_margin` lies above `min_margin`.
    """
    if flip_margin is not None and (flip_margin <= 0 or -flip_margin > min_margin):
        raise ValueError(
            f"`flip_margin` is {flip_margin}, but must be positive and at least −`min_margin` ({-min_margin}): pairs "
            "that are good enough to stay can't be turned around."
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
    Judges pairs by the votes of several scorers. One that scores both completions alike, or doesn't apply, abstains.

    Args:
        pairs ([`~datasets.Dataset`]):
            With `prompt`, `chosen` and `rejected`.
        scorers (`Sequence[Callable]`):
            At least two; their units don't matter.
        min_agreement (`float`, *optional*, defaults to `0.5`):
            Pairs are dropped if a smaller share of the votes is for their label.
        flip_agreement (`float`, *optional*, defaults to `1.0`):
            Pairs are turned around if at least this share of the votes, and two of them, is against their label.
            `None`: none.

    Returns:
        The pairs that are left, in order, and the [`CleaningReport`]. Pairs on which nobody votes stay.

    Raises:
        `ValueError`: with fewer than two scorers, or shares that aren't in [0, 1] or (0.5, 1].
    """
    if len(scorers) < 2:
        raise ValueError(f"`scorers` has {len(scorers)}: agreement takes two. For one, use `clean_by_margin`.")
    if not 0 <= min_agreement <= 1:
        raise ValueError(f"`min_agreement` is {min_agreement}, but it is a share of the votes: in [0, 1].")
    if flip_agreement is not None and not 0.5 < flip_agreement <= 1:
        raise ValueError(f"`flip_agreement` is {flip_agreement}, but a majority is a share in (0.5, 1].")
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
    fit: Fit,
    folds: int = 5,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """
    The margin of each pair by a scorer that was trained on the other folds. All pairs of a prompt are in one fold:
    they share completions, and a scorer would remember them.

    Args:
        pairs ([`~datasets.Dataset`]):
            With `prompt`, `chosen` and `rejected`.
        fit (`Callable[[Dataset], Scorer]`):
            Trains a scorer on pairs, e.g. [`~trl_ext.preferences.scorers.RewardModelFit`].
        folds (`int`, *optional*, defaults to `5`):
            K. Each scorer trains on (K − 1)/K of the pairs.
        seed (`int`, *optional*, defaults to `0`):
            Deals prompts to folds.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called with (folds done, folds in all) after each.

    Raises:
        `ValueError`: with fewer than two folds, or more of them than prompts.
    """
    check_pairs(pairs)
    prompts = [_key(prompt) for prompt in pairs["prompt"]]
    distinct = list(dict.fromkeys(prompts))
    if not 2 <= folds <= len(distinct):
        raise ValueError(
            f"`folds` is {folds}, but must be from 2 to the number of different prompts, {len(distinct)}."
        )
    random.Random(seed).shuffle(distinct)
    fold_of = {prompt: place % folds for place, prompt in enumerate(distinct)}
    margins = [math.nan] * len(pairs)
    for fold in range(folds):
        held_out = [row for row, prompt in enumerate(prompts) if fold_of[prompt] == fold]
        others = [row for row, prompt in enumerate(prompts) if fold_of[prompt] != fold]
        scorer = fit(pairs.select(others))
        for row, margin in zip(held_out, pair_margins(pairs.select(held_out), scorer), strict=True):
            margins[row] = margin
        if on_progress is not None:
            on_progress(fold + 1, folds)
    return margins


def clean_by_cross_fitting(
    pairs: Dataset,
    fit: Fit,
    folds: int = 5,
    flip_above: float | None = 0.5,
    drop_above: float | None = None,
    seed: int = 0,
    rounds: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Dataset, CleaningReport]:
    """
    Cleans pairs with nothing but the pairs: each is judged by a scorer that was trained on the others, wrong labels
    included. The noise rate ε is estimated from all margins ([`estimate_noise`]), and with it the probability that
    each single label is wrong (confident learning, https://huggingface.co/papers/1911.00068, with a calibrated model
    in place of its thresholds).

    Args:
        pairs ([`~datasets.Dataset`]):
            With `prompt`, `chosen` and `rejected`; at least 50.
        fit (`Callable[[Dataset], Scorer]`):
            Trains a scorer on pairs.
        folds (`int`, *optional*, defaults to `5`):
            K.
        flip_above (`float`, *optional*, defaults to `0.5`):
            Pairs whose label is wrong with a higher probability are turned around. `None`: none.
        drop_above (`float`, *optional*):
            Of the others, pairs whose label is wrong with a higher probability are dropped. `None`: none.
        seed (`int`, *optional*, defaults to `0`):
            Deals prompts to folds.
        rounds (`int`, *optional*, defaults to `1`):
            With more, scorers are trained anew on the other folds' pairs with the labels that the round before takes
            for right, and judge the labels as they were given. They see fewer wrong labels; but a pair's own label
            has had its part in what the first ones made of the others.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called with (folds done, folds in all) after each fold of a round.

    Returns:
        The pairs that are left, in order, and the [`CleaningReport`], whose `noise.label_smoothing` is for a DPO on
        the pairs as they were, and `noise_left` for one on those that are left. Pairs that aren't scored stay, and all
        do where the noise rate can't be told ([`NoiseEstimate`]'s `is_told`).

    Raises:
        `ValueError`: before a scorer is trained, with too few pairs, if a probability is out of range, or `drop_above`
            isn't below `flip_above`.
    """
    check_pairs(pairs)
    if len(pairs) < FEWEST_PAIRS:
        raise ValueError(
            f"There are {len(pairs)} pairs, but the share of wrong labels can be told from {FEWEST_PAIRS} on. Make "
            "more, or clean them with a scorer that can be trusted (clean_by_margin)."
        )
    if flip_above is not None and not 0.5 <= flip_above <= 1:
        raise ValueError(f"`flip_above` is {flip_above}. Labels that are more likely right stay: take [0.5, 1].")
    if drop_above is not None and not 0 <= drop_above <= 1:
        raise ValueError(f"`drop_above` is {drop_above}, but it is a probability: in [0, 1].")
    if flip_above is not None and drop_above is not None and drop_above >= flip_above:
        raise ValueError(
            f"`drop_above` ({drop_above}) isn't below `flip_above` ({flip_above}), so that it would drop nothing."
        )
    if rounds < 1:
        raise ValueError(f"`rounds` is {rounds}, but must be at least 1.")
    turned: set[int] = set()
    for _ in range(rounds):
        margins = cross_fitted_margins(turn_around(pairs, sorted(turned)), fit, folds, seed, on_progress)
        margins = [-margin if row in turned else margin for row, margin in enumerate(margins)]
        scored = [margin for margin in margins if not math.isnan(margin)]
        noise = estimate_noise(scored) if len(scored) >= FEWEST_PAIRS and any(scored) else None
        if noise is None or not noise.is_told:
            break
        wrong = wrong_label_probabilities(margins, noise)
        turned = {row for row, probability in enumerate(wrong) if probability > 0.5}
    method = f"by cross-fitting in {folds} folds" + (f", {rounds} rounds" if rounds > 1 else "")
    if noise is None or not noise.is_told:
        return _apply(pairs, [(KEPT, NOT_TOLD)] * len(pairs), method, noise, None)
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
    turned = turn_around(pairs, report.rows(FLIPPED))
    return turned if len(left) == len(turned) else turned.select(left), report


def check_pairs(pairs: Dataset) -> None:
    if not isinstance(pairs, Dataset):
        raise TypeError(f"The pairs are a {type(pairs).__name__}. Load them as a datasets.Dataset, not streamed.")
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in pairs.column_names]
    if missing:
        raise ValueError(
            f"The pairs have no column {', '.join(missing)} (they have {pairs.column_names}). Where prompts are part "
            "of the completions, `trl.data_utils.extract_prompt` takes them apart."
        )
    if len(pairs) == 0:
        raise ValueError("There are no pairs to clean.")


def _key(prompt: Any) -> str:
    """Messages as text, so that prompts can be compared."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
