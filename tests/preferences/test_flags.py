"""Duplicates and lengths, on pairs in which they are known."""

import random

import pytest
from datasets import Dataset

from trl_ext.preferences.flags import flag_pairs


def pairs(*rows: tuple[str, str, str]) -> Dataset:
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


SKY = ("Why is the sky blue?", "Because of Rayleigh scattering of sunlight.", "Because it mirrors the sea.")


def test_near_duplicates_and_contradictions():
    prompt, chosen, rejected = SKY
    flagged, report = flag_pairs(
        pairs(
            SKY,
            ("Why is the grass green?", "Because of its chlorophyll.", "Because cows like it."),
            ("why is the  sky BLUE", "because of rayleigh scattering of sunlight", rejected),
            (prompt, rejected, chosen),
            (prompt, chosen, "Because blue is a nice colour."),  # another pair of the same prompt
        )
    )
    assert flagged["near_duplicate_of"] == [None, None, 0, 0, None]
    assert flagged["contradicts_it"] == [False, False, False, True, False]
    assert (report.pairs, report.near_duplicates, report.contradictions) == (5, 2, 1)
    assert len(flagged) == 5  # nothing is left out
    assert flagged["chosen"][3] == rejected
    again, _ = flag_pairs(flagged)
    assert again.column_names == flagged.column_names


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.6, 0.8, 0.95])
def test_the_filter_misses_nothing(similarity):
    """Against all pairs compared with all, on texts in which words are exchanged at random."""
    rng = random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    rows = []
    for _ in range(40):
        texts = [" ".join(rng.choices(words, k=6)) for _ in range(3)]
        for _ in range(3):
            texts = [
                " ".join(word if rng.random() > 0.05 else rng.choice(words) for word in text.split()) for text in texts
            ]
            if rng.random() < 0.3:
                texts[1:] = texts[:0:-1]
            rows.append(tuple(texts))

    def jaccard(one: str, other: str) -> float:
        grams = [{text[i : i + 3] for i in range(len(text) - 2)} for text in (one, other)]
        return len(grams[0] & grams[1]) / len(grams[0] | grams[1])

    def alike(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
        straight = min(jaccard(x, y) for x, y in zip(one, other, strict=True))
        turned = min(jaccard(x, y) for x, y in zip(one, (other[0], other[2], other[1]), strict=True))
        return max(straight, turned) >= similarity

    expected = [next((j for j in range(i) if alike(row, rows[j])), None) for i, row in enumerate(rows)]
    flagged, report = flag_pairs(pairs(*rows), similarity, ngram=3)
    assert flagged["near_duplicate_of"] == expected
    assert 0 < report.near_duplicates == sum(row is not None for row in expected) < len(rows)


def test_the_filter_counts_what_both_sides_share_once():
    """The sides of the second pair have 8 of 16 letters from the first, the same 8: of all 24 that is only a third."""
    flagged, _ = flag_pairs(
        pairs(("z", "abcdefgh", "hgfedcba"), ("z", "abcdefghijklmnop", "abcdefghqrstuvwx")), 0.5, 1
    )
    assert flagged["near_duplicate_of"] == [None, 0]


def test_lengths_that_decide():
    longer = [("p", "w" * (20 + i), "v" * (10 + i)) for i in range(20)]
    shorter = [("p", "w" * (10 + i), "v" * (20 + i)) for i in range(4)]
    equal = [("p", "w" * 5, "v" * 5)]
    _, report = flag_pairs(pairs(*longer, *shorter, *equal))
    assert report.longer_is_better == pytest.approx(20 / 24)
    # Clopper and Pearson's interval for 20 of 24, from a table
    assert (report.longer_low, report.longer_high) == pytest.approx((0.626, 0.953), abs=1e-3)
    assert report.length_predicts
    assert report.length_accuracy == pytest.approx(20 / 24)
    _, turned = flag_pairs(pairs(*[(p, r, c) for p, c, r in (*longer, *shorter, *equal)]))
    assert turned.longer_is_better == pytest.approx(4 / 24)
    assert turned.length_accuracy == pytest.approx(20 / 24)
    assert turned.length_predicts
    _, balanced = flag_pairs(pairs(*longer[:4], *shorter))
    assert not balanced.length_predicts
    _, none = flag_pairs(pairs(*equal))
    assert none.longer_is_better is None
    assert not none.length_predicts
    assert none.to_dict()["length_accuracy"] is None


def test_pairs_that_differ_in_their_end_only():
    flagged, report = flag_pairs(pairs(("p", "a b c", "a b"), ("p", "a b", "a b c"), ("p", "a b c", "a c")))
    assert flagged["length_only"] == [True, True, False]
    assert report.length_only == 2
    assert "2 differ only in where they end" in str(report)


def test_punctuation_that_means_something():
    """Signs and comparisons: evened out for near duplicates, and not where labels and ends are compared."""
    flagged, _ = flag_pairs(pairs(("2 - 5 =", "-3", "3"), ("2 - 5 =", "3", "-3"), ("is 1 < 2?", "x<y", "x>y")))
    assert flagged["length_only"] == [False, False, False]
    assert flagged["near_duplicate_of"] == [None, 0, None]
    assert flagged["contradicts_it"] == [False, True, False]


def test_conversations():
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    prompt, chosen, rejected = turn("user", SKY[0]), turn("assistant", SKY[1]), turn("assistant", SKY[2])
    data = Dataset.from_list(
        [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected},
            {"prompt": prompt, "chosen": rejected, "rejected": chosen},
        ]
    )
    flagged, _ = flag_pairs(data)
    assert flagged["near_duplicate_of"] == [None, 0]
    assert flagged["contradicts_it"] == [False, True]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`similarity` is 0"):
        flag_pairs(pairs(SKY), similarity=0)
    with pytest.raises(ValueError, match="`ngram` is 0"):
        flag_pairs(pairs(SKY), ngram=0)
    with pytest.raises(ValueError, match=r"The pairs have no column rejected \(they have"):
        flag_pairs(pairs(SKY).remove_columns("rejected"))
