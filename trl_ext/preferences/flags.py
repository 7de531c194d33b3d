"""
Finds what is suspicious about a set of preference pairs without any scorer: pairs that occur twice, perhaps with
opposite labels, and labels that can be predicted from length alone. Pairs are flagged; none is changed or left out.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from scipy import stats

from ..errors import require
from .cleaning import check_pairs


DUPLICATE, CONTRADICTION, LENGTH_ONLY = "near_duplicate_of", "contradicts_it", "length_only"


@dataclass(frozen=True)
class FlagReport:
    """
    What [`flag_pairs`] found.

    Args:
        pairs (`int`):
            Number of pairs.
        near_duplicates (`int`):
            Number of pairs that nearly equal an earlier one, whichever completion is the chosen one.
        contradictions (`int`):
            Number of near duplicates whose label is opposite to that of the earlier pair.
        length_only (`int`):
            Number of pairs of which one completion is the beginning of the other.
        longer_is_better, longer_low, longer_high (`float`, *optional*):
            Among the pairs whose completions have different lengths (in characters, without punctuation), the share in
            which the longer completion is the chosen one, and its 95 % interval (Clopper and Pearson). `None` if there
            are no such pairs.
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
        """Share of labels that length predicts where lengths differ, by the better of the two possible rules."""
        return None if self.longer_is_better is None else max(self.longer_is_better, 1 - self.longer_is_better)

    @property
    def length_predicts(self) -> bool:
        """Whether labels depend on length significantly: the interval doesn't contain ½."""
        if self.longer_low is None or self.longer_high is None:
            return False
        return not self.longer_low <= 0.5 <= self.longer_high

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "length_accuracy": self.length_accuracy, "length_predicts": self.length_predicts}

    def __str__(self) -> str:
        lines = [
            f"{self.pairs} pairs",
            f"{self.near_duplicates:>8} nearly equal an earlier one, {self.contradictions} with the opposite label",
            f"{self.length_only:>8} differ only in where they end",
        ]
        if self.longer_is_better is not None:
            lines.append(
                f"the longer completion is better in {self.longer_is_better:.1%} of those that differ in length "
                f"({self.longer_low:.1%} to {self.longer_high:.1%})"
                + ("; a model may learn only that" if self.length_predicts else "")
            )
        return "\n".join(lines)


def flag_pairs(pairs: Dataset, similarity: float = 0.9, ngram: int = 5) -> tuple[Dataset, FlagReport]:
    """
    Adds three columns to a copy of the data set: `near_duplicate_of`, the row of the earliest pair that this one
    nearly equals, or `None`; `contradicts_it`, whether the labels of these two are opposite; and `length_only`,
    whether one completion is the beginning of the other.

    Two pairs are near duplicates if the character n-grams of each of their three texts (the prompt and the two
    completions, in either order) have a Jaccard similarity of at least `similarity`, disregarding case, punctuation
    and white space. The search is exact, and avoids comparing all pairs with each other by prefix filtering
    (Chaudhuri, Ganti and Kaushik, ICDE 2006): two sets that are this similar share at least one of their rarest
    n-grams.

    Args:
        pairs ([`~datasets.Dataset`]):
            Rows with `prompt`, `chosen` and `rejected`.
        similarity (`float`, *optional*, defaults to `0.9`):
            The smallest Jaccard similarity of near duplicates, in (0, 1].
        ngram (`int`, *optional*, defaults to `5`):
            Number of characters of an n-gram.

    Returns:
        [`~datasets.Dataset`] and [`FlagReport`].

    Raises:
        ValueError: if a column is missing, or if an argument is out of range.
    """
    require(
        0 < similarity <= 1,
        f"`similarity` is {similarity}, but a Jaccard similarity that tells pairs apart is in (0, 1].",
    )
    require(ngram >= 1, f"`ngram` is {ngram}, but an n-gram has at least 1 character.")
    check_pairs(pairs)
    written = [tuple(_spaced(row[name]) for name in ("prompt", "chosen", "rejected")) for row in pairs]
    rows = [tuple(map(_plain, row)) for row in written]
    earlier, opposite = _near_duplicates(rows, written, similarity, ngram)
    # With punctuation, because −3 and 3 differ in more than their length
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
    For each row, the first row that it nearly equals, and whether its completions are in the opposite order. If
    n-grams can't decide the order, the texts with punctuation do.
    """
    # The mark tells n-grams of prompts from those of completions. Both completions have the same mark, because the
    # labels of near duplicates may differ.
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
        # If all parts of two rows have a similarity of s, the unions of the parts have at least 2s − 1: of each part
        # at most a share 1 − s is missing in the other row, and what is missing in both completions can be the same.
        # Two sets that share this many n-grams share one within their prefixes.
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
    """`count` rounded up, but not to 10 if rounding errors have made 9 slightly larger. At least 1."""
    return max(1, -int(-(count - 1e-9) // 1))


def _grams(text: str, ngram: int) -> set[str]:
    return {text[i : i + ngram] for i in range(max(1, len(text) - ngram + 1))}


def _spaced(text: Any) -> str:
    """A text in lower case with single spaces; of messages, their roles and contents."""
    if not isinstance(text, str):
        text = "\n".join(f"{message['role']} {message['content']}" for message in text)
    return re.sub(r"\s+", " ", text.casefold()).strip()


def _plain(text: str) -> str:
    """The words of a text with single spaces, without punctuation."""
    return re.sub(r"\W+", " ", text).strip()
