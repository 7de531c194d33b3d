"""
What is odd about a set of preference pairs without asking any scorer: pairs that are there twice, perhaps with
opposite labels, and labels that the length alone predicts. Pairs are flagged, none is changed or left out.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from scipy import stats

from .cleaning import check_pairs


DUPLICATE, CONTRADICTION, LENGTH_ONLY = "near_duplicate_of", "contradicts_it", "length_only"


@dataclass(frozen=True)
class FlagReport:
    """
    Args:
        pairs (`int`):
            How many.
        near_duplicates (`int`):
            Pairs that nearly equal an earlier one, whichever side is called better.
        contradictions (`int`):
            Those of them whose label is the other way round.
        length_only (`int`):
            Pairs of which one completion is the beginning of the other.
        longer_is_better, longer_low, longer_high (`float`, *optional*):
            Share of the pairs with completions of different lengths (in characters, punctuation aside) in which the
            longer is the better one, and its 95 % interval (Clopper and Pearson). `None`: all are equally long.
    """

    pairs: int
    near_duplicates: int
    contradictions: int
    length_only: int
    longer_is_better: float | None = None
    longer_low: float | None = None
    longer_high: float | None = None

    @property
    def length_accuracy(self) -> float | None:
        """How many labels the better of "the longer" and "the shorter" gets right, where lengths differ."""
        return None if self.longer_is_better is None else max(self.longer_is_better, 1 - self.longer_is_better)

    @property
    def length_predicts(self) -> bool:
        """Whether the labels depend on the length beyond chance: the interval leaves ½ out."""
        if self.longer_low is None or self.longer_high is None:
            return False
        return not self.longer_low <= 0.5 <= self.longer_high

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "length_accuracy": self.length_accuracy, "length_predicts": self.length_predicts}

    def __str__(self) -> str:
        lines = [
            f"{self.pairs} pairs",
            f"{self.near_duplicates:>8} nearly equal an earlier one, {self.contradictions} with the opposite label",
            f"{self.length_only:>8} differ in nothing but where they end",
        ]
        if self.longer_is_better is not None:
            lines.append(
                f"the longer completion is better in {self.longer_is_better:.1%} of those that differ in length "
                f"({self.longer_low:.1%} to {self.longer_high:.1%})"
                + ("; a model may learn just that" if self.length_predicts else "")
            )
        return "\n".join(lines)


def flag_pairs(pairs: Dataset, similarity: float = 0.9, ngram: int = 5) -> tuple[Dataset, FlagReport]:
    """
    Adds three columns: `near_duplicate_of`, the row of the earliest pair that this one nearly equals, or `None`;
    `contradicts_it`, whether their labels are opposite; and `length_only`, whether one completion is the beginning of
    the other.

    Two pairs are near duplicates if the n-grams of characters of each of their texts (prompt, one completion, the
    other one, either way round) have a Jaccard similarity of at least `similarity`, after case, punctuation and white
    space are evened out. Found exactly and without comparing all with all, by prefix filtering
    (Chaudhuri, Ganti and Kaushik, ICDE 2006): two sets this similar share one of their few rarest n-grams.

    Args:
        pairs ([`~datasets.Dataset`]):
            With `prompt`, `chosen` and `rejected`.
        similarity (`float`, *optional*, defaults to `0.9`):
            In (0, 1].
        ngram (`int`, *optional*, defaults to `5`):
            Characters of an n-gram.

    Raises:
        `ValueError`: if a column is missing, or an argument out of range.
    """
    if not 0 < similarity <= 1:
        raise ValueError(
            f"`similarity` is {similarity}, but a Jaccard similarity that tells pairs apart is in (0, 1]."
        )
    if ngram < 1:
        raise ValueError(f"`ngram` is {ngram}, but an n-gram has at least 1 character.")
    check_pairs(pairs)
    written = [tuple(_spaced(row[name]) for name in ("prompt", "chosen", "rejected")) for row in pairs]
    rows = [tuple(map(_plain, row)) for row in written]
    earlier, opposite = _near_duplicates(rows, written, similarity, ngram)
    # With punctuation: −3 and 3 differ in more than their length
    starts = [chosen.startswith(rejected) or rejected.startswith(chosen) for _, chosen, rejected in written]
    longer = [len(chosen) > len(rejected) for _, chosen, rejected in rows if len(chosen) != len(rejected)]
    share: dict[str, float] = {}
    if longer:
        interval = stats.binomtest(sum(longer), len(longer)).proportion_ci(0.95)
        share = {
            "longer_is_better": sum(longer) / len(longer),
            "longer_low": float(interval.low),
            "longer_high": float(interval.high),
        }
    found = sum(row is not None for row in earlier)
    report = FlagReport(len(pairs), found, sum(opposite), sum(starts), **share)
    columns = {DUPLICATE: earlier, CONTRADICTION: opposite, LENGTH_ONLY: starts}
    flagged = pairs.remove_columns([name for name in columns if name in pairs.column_names])
    for name, values in columns.items():
        flagged = flagged.add_column(name, values)
    return flagged, report


def _near_duplicates(
    rows: Sequence[tuple[str, ...]], written: Sequence[tuple[str, ...]], similarity: float, ngram: int
) -> tuple[list[int | None], list[bool]]:
    """
    For each row the first one it nearly equals, and whether the other way round: where n-grams can't tell that, by the
    rows as they are written, with punctuation.
    """
    # Marked by their part, so that a word of the prompt isn't one of a completion; sides alike, as labels may differ
    texts = [
        [{mark + gram for gram in _grams(text, ngram)} for mark, text in zip("pcc", row, strict=True)] for row in rows
    ]
    wholes = [set().union(*parts) for parts in texts]
    counts = Counter(gram for whole in wholes for gram in whole)
    by_rarest: defaultdict[str, list[int]] = defaultdict(list)
    earlier: list[int | None] = []
    opposite: list[bool] = []
    for row, whole in enumerate(wholes):
        rarest = sorted(whole, key=lambda gram: (counts[gram], gram))
        # Where all parts have a similarity of s, their unions have 2s − 1 or more: the n-grams that one lacks are at
        # most a share 1 − s of each part, and those of both sides can be the same. Sets that share that many n-grams
        # can't have them all beyond their prefixes.
        prefix = rarest[: len(rarest) - _at_least((2 * similarity - 1) * len(rarest)) + 1]
        candidates = sorted({other for gram in prefix for other in by_rarest[gram]})
        match = next((found for other in candidates if (found := _compare(texts, row, other, similarity))), None)
        earlier.append(None if match is None else match[0])
        opposite.append(match is not None and (match[1] or written[row][1:] == written[match[0]][:0:-1]))
        for gram in prefix:
            by_rarest[gram].append(row)
    return earlier, opposite


def _compare(texts: list[list[set[str]]], row: int, other: int, similarity: float) -> tuple[int, bool] | None:
    (prompt, chosen, rejected), (prompt_, chosen_, rejected_) = texts[row], texts[other]
    if _jaccard(prompt, prompt_) < similarity:
        return None
    same = min(_jaccard(chosen, chosen_), _jaccard(rejected, rejected_))
    turned = min(_jaccard(chosen, rejected_), _jaccard(rejected, chosen_))
    return None if max(same, turned) < similarity else (other, turned > same)


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def _at_least(count: float) -> int:
    """The next whole number, but not one too many because 0.9 × 10 isn't quite 9."""
    return max(1, -int(-(count - 1e-9) // 1))


def _grams(text: str, ngram: int) -> set[str]:
    return {text[i : i + ngram] for i in range(max(1, len(text) - ngram + 1))}


def _spaced(text: Any) -> str:
    """Lower case with single spaces; of messages, roles and contents."""
    if not isinstance(text, str):
        text = "\n".join(f"{message['role']} {message['content']}" for message in text)
    return re.sub(r"\s+", " ", text.casefold()).strip()


def _plain(text: str) -> str:
    """Words with single spaces."""
    return re.sub(r"\W+", " ", text).strip()
