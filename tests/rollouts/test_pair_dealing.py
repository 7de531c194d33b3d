"""Which pairs come into which micro-batch, and that a pair takes everything along that belongs to it."""

from typing import Any

import pytest
import torch

from trl_ext.rollouts.pair_dealing import can_be_dealt, deal_pairs, dealt_anew
from trl_ext.rollouts.prefix_trees import Cost
from trl_ext.rollouts.shared_pass import Sharing


# How pairs are dealt


def test_pairs_of_one_prompt_meet():
    dealt = deal_pairs(prompts="abcdabcd", prompt_sizes=[9] * 8, sizes=[2] * 8, count=4)
    assert sorted("".join(sorted("abcdabcd"[pair] for pair in batch)) for batch in dealt) == ["aabb", "ccdd"]


def test_pairs_of_about_the_same_length_meet():
    dealt = deal_pairs(prompts=range(6), prompt_sizes=[4, 90, 5, 80, 6, 70], sizes=[3] * 6, count=3)
    assert dealt == [[1, 3, 5], [0, 2, 4]]


def test_every_pair_has_one_place_whatever_prompts_they_have():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 5):
        for kinds in (1, 3, 40):
            prompts = torch.randint(kinds, (count * 4,), generator=generator).tolist()
            dealt = deal_pairs(
                prompts, [7 + prompt for prompt in prompts], [1 + i % 5 for i in range(count * 4)], count
            )
            assert [len(batch) for batch in dealt] == [count] * 4
            assert sorted(pair for batch in dealt for pair in batch) == list(range(count * 4))


def test_no_more_pairs_are_parted_than_must_be():
    """Three prompts of three pairs each, in micro-batches of four: one prompt is in two, for each of two."""
    prompts = [0, 1, 2] * 3 + [3, 4, 5]
    dealt = deal_pairs(prompts, [8] * 12, [2] * 12, 4)
    assert sorted(len({prompts[pair] for pair in batch}) for batch in dealt) == [2, 2, 2]


# Tensors

PADDING, LENGTHS = 3, [9, 4, 6, 9, 4, 7, 5, 8]


def batches(count: int = 2) -> list[dict[str, Any]]:
    """
    As TRL collates them: pair i has a prompt of `LENGTHS[i]` tokens, so that two of one length are the same; its
    chosen completion is 1 + i % 3 times the token 200 + i, its rejected one twice the token 300 + i.
    """
    found = []
    for start in range(0, len(LENGTHS), count):
        numbers = range(start, start + count)
        prompts = [[100 + LENGTHS[i]] * LENGTHS[i] for i in numbers]
        answers = [[200 + i] * (1 + i % 3) for i in numbers], [[300 + i] * 2 for i in numbers]
        rows = [(prompt, answer) for half in answers for prompt, answer in zip(prompts, half, strict=True)]
        width = max(len(prompt + answer) for prompt, answer in rows)
        found.append(
            {
                "input_ids": torch.tensor([(p + a + [PADDING] * width)[:width] for p, a in rows]),
                "attention_mask": torch.tensor([([1] * len(p + a) + [0] * width)[:width] for p, a in rows]),
                "completion_mask": torch.tensor(
                    [([0] * len(p) + [1] * len(a) + [0] * width)[:width] for p, a in rows]
                ),
                "ref_chosen_logps": torch.tensor([float(200 + i) for i in numbers]),
                "ref_rejected_logps": torch.tensor([float(300 + i) for i in numbers]),
                "pair_weights": torch.tensor([float(400 + i) for i in numbers]),
            }
        )
    return found


def read(found: list[dict[str, Any]]) -> dict[int, Any]:
    """What belongs to each pair, by its number, read from wherever it is now."""
    pairs = {}
    for batch in found:
        chosen, rejected = ([], [])
        for i, (ids, mask, answer) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True)
        ):
            half = chosen if i < len(batch["input_ids"]) // 2 else rejected
            half.append((ids[mask & ~answer].tolist(), ids[answer].tolist()))
            assert not (answer & ~mask).any()
        names = ("ref_chosen_logps", "ref_rejected_logps", "pair_weights")
        of_reference = zip(*(batch[name].tolist() for name in names), strict=True)
        for first, second, numbers in zip(chosen, rejected, of_reference, strict=True):
            pairs[first[1][0] - 200] = (first, second, numbers)
    return pairs


def test_a_pair_takes_along_what_belongs_to_it(subtests):
    for count in (2, 4):
        with subtests.test(count):
            sharing = Sharing(Cost(0.0), always=True)
            given = batches(count)
            dealt = dealt_anew(given, sharing)
            assert read(dealt) == read(given) and len(read(given)) == len(LENGTHS)
            assert [len(batch["input_ids"]) for batch in dealt] == [2 * count] * (len(LENGTHS) // count)
            assert (sharing.dealt_steps, sharing.met_pairs) == (1, 2)  # the two of 9 tokens, and the two of 4
            for batch in dealt:
                assert batch["attention_mask"].any(dim=0).all()  # no column of padding alone


def test_columns_are_a_multiple():
    def columns(multiple):
        dealt = dealt_anew(batches(), Sharing(Cost(0.0), always=True, multiple=multiple))
        return [batch["input_ids"].size(1) for batch in dealt]

    # The prompts of 9 tokens, 7 and 8, both of 4, 6 and 5; TRL's widest has 11
    assert columns(1) == [11, 10, 6, 9]
    assert columns(4) == [11, 11, 8, 11]


def test_where_it_is_no_cheaper_nothing_is_dealt():
    given = batches(4)
    for batch in given:  # other tokens in every prompt, rows of equal length
        batch["input_ids"] = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"])
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    sharing = Sharing(Cost(0.0))
    assert dealt_anew(given, sharing) is given
    assert (sharing.dealt_steps, sharing.met_pairs) == (0, 0)


def changed(i: int, **tensors: Any) -> list[dict[str, Any]]:
    found = batches()
    return [{**batch, **(tensors if k == i else {})} for k, batch in enumerate(found)]


@pytest.mark.parametrize(
    ("given", "full_width_from"),
    [
        (batches()[:1], None),
        (batches(1), None),
        ([*batches(), batches(4)[0]], None),
        (changed(1, pixel_values=torch.zeros(4)), None),
        ([{**batch, "pixel_values": torch.zeros(4)} for batch in batches()], None),
        ([{**batch, "attention_mask": batch["attention_mask"].flip(1)} for batch in batches()], None),
        (batches(), 11),
    ],
    ids=["one", "single_pairs", "a_larger_one", "another_tensor", "images", "left_padding", "width_counts"],
)
def test_what_cannot_be_dealt_stays_as_it_is(given, full_width_from):
    assert not can_be_dealt(given, full_width_from)
    sharing = Sharing(Cost(0.0), always=True, full_width_from=full_width_from)
    assert dealt_anew(given, sharing) is given


def test_what_can():
    assert can_be_dealt(batches(), None) and can_be_dealt(batches(), 12)
