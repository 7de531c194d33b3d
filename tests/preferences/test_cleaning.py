"""Cleaning on pairs whose wrong labels are known."""

import json
import math
import random
from dataclasses import replace

import pytest
from datasets import Dataset

from trl_ext.preferences.cleaning import (
    clean_by_agreement,
    clean_by_cross_fitting,
    clean_by_margin,
    cross_fitted_margins,
    flip_pairs,
    pair_margins,
)
from trl_ext.preferences.flags import flag_pairs


def by_number(prompts, completions):
    """The true reward: completions are numbers."""
    return [None if text == "?" else float(text) for text in completions]


def numbers(*rows: tuple[float | str, float | str]) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"p{i}", "chosen": str(c), "rejected": str(r)} for i, (c, r) in enumerate(rows)]
    )


def sides(pairs: Dataset) -> list[tuple[str, str]]:
    return list(zip(pairs["chosen"], pairs["rejected"], strict=True))


def checked(report, pairs, left):
    """What every report has to say."""
    counts = report.to_dict()
    assert report.pairs == len(pairs) == counts["kept"] + counts["flipped"] + counts["dropped"]
    assert sum(counts["reasons"].values()) == len(pairs)
    assert len(left) == counts["kept"] + counts["flipped"]
    assert len(counts["flipped_rows"]) == counts["flipped"]
    assert json.loads(json.dumps(counts)) == counts
    assert str(report).startswith(f"{len(pairs)} pairs, by")
    return counts


def test_margins():
    found = pair_margins(numbers((3, 1), (1, 3), ("?", 1), (2, 2)), by_number)
    assert found[:2] + found[3:] == [2.0, -2.0, 0.0]
    assert math.isnan(found[2])
    with pytest.raises(ValueError, match="The scorer returned 1 scores for 2 completions"):
        pair_margins(numbers((1, 2)), lambda prompts, completions: [1.0])


def test_turning_around_takes_everything_along():
    pairs = Dataset.from_list(
        [
            {
                "prompt": "p",
                "chosen": "a",
                "rejected": "b",
                "score_chosen": 2.0,
                "score_rejected": 0.5,
                "score_margin": 1.5,
                "chosen_sampled_ids": [1],
                "rejected_sampled_ids": [2, 3],
                "prompt_row": 4,
            }
        ]
        * 2
    )
    turned = flip_pairs(pairs, [1])
    assert turned[0] == pairs[0]
    assert turned[1] == {
        "prompt": "p",
        "chosen": "b",
        "rejected": "a",
        "score_chosen": 0.5,
        "score_rejected": 2.0,
        "score_margin": -1.5,
        "chosen_sampled_ids": [2, 3],
        "rejected_sampled_ids": [1],
        "prompt_row": 4,
    }
    assert flip_pairs(turned, [1])[:] == pairs[:]


def test_by_the_margin_of_a_scorer():
    pairs = numbers((5, 1), (1, 5), (2, 1), (1, 2), ("?", 1), (1, 1))
    left, report = clean_by_margin(pairs, by_number, min_margin=0.0, flip_margin=3.0)
    assert report.actions == ("kept", "flipped", "kept", "dropped", "kept", "kept")
    assert report.reasons[4] == "not scored"
    assert sides(left) == [("5", "1"), ("5", "1"), ("2", "1"), ("?", "1"), ("1", "1")]
    counts = checked(report, pairs, left)
    assert (counts["flipped_rows"], counts["dropped_rows"]) == ([1], [3])
    left, report = clean_by_margin(pairs, by_number, min_margin=1.5)
    assert report.actions == ("kept", "dropped", "dropped", "dropped", "kept", "dropped")
    checked(report, pairs, left)
    for flip in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"`flip_margin` is .*, but must be positive"):
            clean_by_margin(pairs, by_number, flip_margin=flip)
    with pytest.raises(ValueError, match="at least −`min_margin`"):
        clean_by_margin(pairs, by_number, min_margin=-2.0, flip_margin=1.0)


def test_by_agreement():
    def first_digit(prompts, completions):
        return [None if text == "?" else float(text[0]) for text in completions]

    def last_digit(prompts, completions):
        return [None if text == "?" else float(text[-1]) for text in completions]

    def never(prompts, completions):
        return [None] * len(prompts)

    pairs = numbers((22, 11), (11, 22), (21, 12), (12, 21), (11, 11), ("?", 11), (12, 11), (11, 12))
    left, report = clean_by_agreement(pairs, [first_digit, last_digit, never])
    assert report.actions == (
        "kept",
        "flipped",
        "kept",
        "kept",
        "kept",
        "kept",
        "kept",
        "dropped",
    )  # one vote: no flip
    assert report.reasons[4] == report.reasons[5] == "no votes"
    assert sides(left)[1] == ("22", "11")
    checked(report, pairs, left)
    left, report = clean_by_agreement(pairs, [first_digit, last_digit], min_agreement=0.6, flip_agreement=None)
    assert report.actions == ("kept", "dropped", "dropped", "dropped", "kept", "kept", "kept", "dropped")
    checked(report, pairs, left)
    with pytest.raises(ValueError, match="`scorers` has 1: agreement takes two"):
        clean_by_agreement(pairs, [by_number])
    with pytest.raises(ValueError, match="`min_agreement` is 2"):
        clean_by_agreement(pairs, [by_number] * 2, min_agreement=2)
    with pytest.raises(ValueError, match=r"`flip_agreement` is 0\.5, but a majority"):
        clean_by_agreement(pairs, [by_number] * 2, flip_agreement=0.5)


class FitsANumber:
    """
    A scorer that learns what it can: whether larger numbers are better, by how often they are called so, seen through
    a fixed error in reading each. It remembers the pairs it was trained on.
    """

    def __init__(self, error: float = 0.1) -> None:
        self.error = error
        self.trained_on: list[set[str]] = []
        self.minorities: list[float] = []

    def __call__(self, pairs):
        seen = set(pairs["prompt"])
        self.trained_on.append(seen)
        wins = sum(float(c) > float(r) for c, r in sides(pairs))
        sign = 1 if wins > len(pairs) / 2 else -1
        self.minorities.append(min(wins, len(pairs) - wins) / len(pairs))
        remembered = set(pairs["chosen"])

        def score(prompts, completions):
            assert not seen & set(prompts), "asked about a prompt that it was trained on"
            noise = [random.Random(text).gauss(0, self.error) for text in completions]
            return [
                sign * (float(text) + e) + (100 if text in remembered else 0)
                for text, e in zip(completions, noise, strict=True)
            ]

        return score


def with_wrong_labels(count: int, share: float, seed: int = 0, larger: bool = True) -> tuple[Dataset, list[int]]:
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        better, worse = sorted((rng.random(), rng.random()), reverse=larger)
        rows.append({"prompt": f"p{i // 2}", "chosen": repr(better), "rejected": repr(worse)})  # two pairs a prompt
    wrong = sorted(rng.sample(range(count), round(share * count)))
    return flip_pairs(Dataset.from_list(rows), wrong), wrong


@pytest.mark.parametrize("larger", [True, False])  # it isn't told what is better
def test_cross_fitting_finds_wrong_labels(larger):
    pairs, wrong = with_wrong_labels(2000, 0.2, larger=larger)
    fit = FitsANumber()
    left, report = clean_by_cross_fitting(pairs, fit, folds=4)
    counts = checked(report, pairs, left)
    assert report.noise.low <= 0.2 <= report.noise.high
    assert abs(report.noise.rate - 0.2) < 0.05
    still_wrong = sum((float(c) > float(r)) != larger for c, r in sides(left)) / len(left)
    assert still_wrong < 0.13 < 0.2
    assert report.noise_left == pytest.approx(still_wrong, abs=0.03)
    assert counts["dropped"] == 0
    assert len(set(counts["flipped_rows"]) & set(wrong)) > 0.8 * counts["flipped"]
    # Each scorer has seen three of four folds, and each prompt was held out once
    assert [len(seen) for seen in fit.trained_on] == [750] * 4
    assert set.union(*fit.trained_on) == set(pairs["prompt"])
    assert set.intersection(*fit.trained_on) == set()
    again, same = clean_by_cross_fitting(pairs, FitsANumber(), folds=4)
    assert (again[:], same) == (left[:], report)
    other = cross_fitted_margins(pairs, FitsANumber(error=0.0), folds=4, seed=1)
    assert len(other) == len(pairs)


def test_a_second_round_learns_from_cleaned_pairs_and_judges_the_given_ones():
    pairs, _ = with_wrong_labels(2000, 0.2)
    fit = FitsANumber()
    left, report = clean_by_cross_fitting(pairs, FitsANumber(), folds=4)
    again, second = clean_by_cross_fitting(pairs, fit, folds=4, rounds=2)
    # What these scorers make of a pair depends on no single label: other labels to learn from, the same judgement
    assert (again[:], replace(second, method=report.method)) == (left[:], report)
    assert second.method == f"{report.method}, 2 rounds"
    assert len(fit.minorities) == 8
    assert min(fit.minorities[:4]) > 0.18
    assert max(fit.minorities[4:]) < 0.13


def test_dropping_what_is_undecided():
    pairs, _ = with_wrong_labels(2000, 0.2)
    left, report = clean_by_cross_fitting(pairs, FitsANumber(), folds=4, flip_above=0.8, drop_above=0.3)
    counts = checked(report, pairs, left)
    assert counts["flipped"] > 0
    assert counts["dropped"] > 0
    _, flipped = clean_by_cross_fitting(pairs, FitsANumber(), folds=4)
    assert report.noise == flipped.noise
    assert report.noise_left < flipped.noise_left
    left, report = clean_by_cross_fitting(pairs, FitsANumber(), folds=4, flip_above=None, drop_above=0.5)
    counts = checked(report, pairs, left)
    assert counts["flipped"] == 0
    assert counts["dropped_rows"] == flipped.to_dict()["flipped_rows"]


def test_clean_pairs_stay_nearly_as_they_are():
    pairs, _ = with_wrong_labels(1000, 0.0)
    _, report = clean_by_cross_fitting(pairs, FitsANumber(error=0.05), folds=4)
    assert report.noise.low == 0.0
    assert report.noise.rate < 0.03
    assert report.to_dict()["flipped"] < 50


def test_scorers_that_learned_nothing_judge_nothing():
    """Their margins fit a rate of one half with any slope, by which half of the labels would be turned around."""
    pairs, _ = with_wrong_labels(300, 0.0)
    for seed in range(4):
        draw = random.Random(seed)
        for shift in (0.0, 0.18):  # nothing, and next to nothing

            def fit(others, draw=draw, shift=shift):
                return lambda prompts, completions: [
                    draw.gauss(0, 1) + shift * (float(text) > 0.5) for text in completions
                ]

            left, report = clean_by_cross_fitting(pairs, fit, folds=3, rounds=2)
            assert not report.noise.is_reliable and report.noise_left is None
            assert left[:] == pairs[:]
            assert "300 kept: the scorers learned too little" in str(report)
            assert "is uncertain" in str(report)


@pytest.mark.parametrize("score", [0.0, math.nan])
def test_scorers_that_tell_nothing_apart_judge_nothing(score):
    pairs, _ = with_wrong_labels(60, 0.2)
    left, report = clean_by_cross_fitting(pairs, lambda _: lambda prompts, completions: [score] * len(completions))
    assert left[:] == pairs[:]
    assert report.noise is None and "60 kept: the scorers learned too little" in str(report)


def test_the_report_can_be_kept(tmp_path):
    pairs, _ = with_wrong_labels(400, 0.2)
    _, report = clean_by_cross_fitting(pairs, FitsANumber(), folds=2)
    report.save(tmp_path / "deep" / "report.json")
    assert json.loads((tmp_path / "deep" / "report.json").read_text()) == report.to_dict()
    assert "of the labels are wrong (95 % interval" in str(report)


def test_bad_arguments_are_named():
    pairs, _ = with_wrong_labels(100, 0.2)
    for arguments, message in (
        ({"folds": 1}, "`folds` is 1, but must be from 2 to"),
        ({"folds": 51}, "`folds` is 51, but must be from 2 to .* 50"),
        ({"rounds": 0}, "`rounds` is 0, but must be at least 1"),
        ({"flip_above": 0.4}, r"`flip_above` is 0\.4"),
        ({"drop_above": 1.5}, r"`drop_above` is 1\.5"),
        ({"drop_above": 0.7}, r"`drop_above` \(0\.7\) isn't below `flip_above`"),
    ):
        with pytest.raises(ValueError, match=message):
            clean_by_cross_fitting(pairs, FitsANumber(), **arguments)
    with pytest.raises(TypeError, match="The pairs are a IterableDataset"):
        clean_by_margin(pairs.to_iterable_dataset(), by_number)
    fit = FitsANumber()
    with pytest.raises(ValueError, match="There are 49 pairs, but the share of wrong labels can be estimated from 50"):
        clean_by_cross_fitting(pairs.select(range(49)), fit)
    with pytest.raises(ValueError, match="no column prompt"):
        clean_by_margin(pairs.remove_columns("prompt"), by_number)
    with pytest.raises(ValueError, match="pairs has 0 rows"):
        clean_by_margin(pairs.select([]), by_number)


def test_what_is_passed_in_stays_as_it_was():
    pairs, _ = with_wrong_labels(60, 0.2)
    rows, columns, features = pairs[:], list(pairs.column_names), dict(pairs.features)
    assert clean_by_margin(pairs, by_number, flip_margin=0.0001)[1].rows("flipped")
    clean_by_agreement(pairs, [by_number, by_number])
    clean_by_cross_fitting(pairs, FitsANumber())
    flag_pairs(flag_pairs(pairs)[0])
    assert (pairs[:], pairs.column_names, dict(pairs.features)) == (rows, columns, features)
