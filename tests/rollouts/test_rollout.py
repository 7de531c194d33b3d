"""TRL's generation, taken apart and put together again."""

import copy
import math
from itertools import pairwise, product
from typing import Any

import pytest

from trl_ext.rollouts.rollout import generation_of, joined_generation, rollouts_of


ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}, {"prompt": "a", "answer": 1}]
PROMPTS = ["A", "B", "A"]


def generation(**changed: Any) -> tuple[Any, ...]:
    """What TRL's `_generate` returns for three rows, with everything that may be there."""
    parts = {
        "prompt_ids": [[1, 4], [5], [1, 4]],
        "completion_ids": [[6, 7, 2], [8], [9, 9]],
        "tool_mask": [[1, 0, 1], [1], [1, 1]],
        "completions": ["x y", "z", "v v"],
        "logprobs": [[-0.1, 0.0, -0.3], [-0.4], [-0.5, -0.6]],
        "extra_fields": {},
        "images": [["image 1"], None, ["image 3"]],
        "tool_images": [[], ["tool image"], []],
    }
    return tuple({**parts, **changed}.values())


def round_trip(made: tuple[Any, ...]) -> tuple[Any, ...]:
    rollouts = rollouts_of(copy.deepcopy(ROWS), PROMPTS, made)
    return generation_of(rollouts, rollouts)


def test_round_trip_is_the_identity():
    assert round_trip(generation()) == generation()


@pytest.mark.parametrize("absent", ["tool_mask", "logprobs", "images"])
def test_what_is_absent_stays_absent(absent):
    assert round_trip(generation(**{absent: None})) == generation(**{absent: None})


def test_no_tool_images():
    assert round_trip(generation(tool_images=[])) == generation(tool_images=[])


def test_extra_fields_go_into_the_rows_once():
    rows = copy.deepcopy(ROWS)
    made = generation(extra_fields={"score": [0.1, 0.2, 0.3], "where": "here"})
    rollouts = rollouts_of(rows, PROMPTS, made)
    # Reward functions look for them in the rows
    assert [row["score"] for row in rows] == [0.1, 0.2, 0.3]
    assert [rollout.row["where"] for rollout in rollouts] == ["here"] * 3
    # and TRL must not merge the fields of one selection into the rows of another
    assert generation_of(rollouts, rollouts)[5] == {}


def test_copies_are_trained_on_and_originals_are_logged():
    rollouts = rollouts_of(copy.deepcopy(ROWS), PROMPTS, generation())
    made = generation_of(logged=rollouts, trained=[rollouts[0], rollouts[2], rollouts[2]])
    assert made[0] == [[1, 4], [1, 4], [1, 4]]
    assert made[1] == [[6, 7, 2], [9, 9], [9, 9]]
    assert made[2] == [[1, 0, 1], [1, 1], [1, 1]]
    assert made[3] == ["x y", "z", "v v"]
    assert made[4][1] == made[4][2] == [-0.5, -0.6]


def test_rounds_with_and_without_a_tool_mask_mix():
    with_mask = rollouts_of(copy.deepcopy(ROWS), PROMPTS, generation())
    without = rollouts_of(copy.deepcopy(ROWS), PROMPTS, generation(tool_mask=None, logprobs=None))
    mixed = [with_mask[0], without[0], without[1]]
    made = generation_of(mixed, mixed)
    # The policy wrote every token of a completion that has no mask
    assert made[2] == [[1, 0, 1], [1, 1, 1], [1]]
    assert [len(logps) for logps in made[4]] == [3, 3, 1]


# Chunks of a generation


FIELDS = {"score": [0.1, 0.2, 0.3], "where": "here"}


def chunk(whole: tuple[Any, ...], start: int, stop: int) -> tuple[Any, ...]:
    """What `_generate` would have returned for some of the rows."""
    fields = {name: values[start:stop] if isinstance(values, list) else values for name, values in whole[5].items()}
    parts = [part[start:stop] if isinstance(part, list) else part for part in whole]
    return (*parts[:5], fields, *parts[6:])


def test_chunks_joined_are_the_whole(subtests):
    for cuts, changed in product(
        [[0, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2, 3]],
        [{}, {"tool_mask": None}, {"logprobs": None}, {"images": None}, {"tool_images": []}],
    ):
        with subtests.test(cuts=cuts, changed=changed):
            whole = generation(extra_fields=FIELDS, **changed)
            chunks = [chunk(whole, start, stop) for start, stop in pairwise(cuts)]
            assert joined_generation(copy.deepcopy(chunks)) == whole


def test_a_chunk_without_images_beside_one_with():
    # TRL leaves them out of a call in which no row has any
    chunks = [chunk(generation(images=None, tool_images=[]), 0, 1), chunk(generation(), 1, 3)]
    joined = joined_generation(chunks)
    assert joined[6] == [None, None, ["image 3"]]
    assert joined[7] == [[], ["tool image"], []]
    joined = joined_generation([chunk(generation(), 0, 2), chunk(generation(images=None, tool_images=[]), 2, 3)])
    assert joined[6] == [["image 1"], None, None]
    assert joined[7] == [[], ["tool image"], []]


def test_a_chunk_without_masks_beside_one_with():
    # The policy wrote every token of a completion that has no mask
    chunks = [chunk(generation(tool_mask=None, logprobs=None), 0, 2), chunk(generation(), 2, 3)]
    joined = joined_generation(chunks)
    assert joined[2] == [[1, 1, 1], [1], [1, 1]]
    assert [len(logprobs) for logprobs in joined[4]] == [3, 1, 2]
    assert all(math.isnan(value) for logprobs in joined[4][:2] for value in logprobs)
    assert joined[4][2] == [-0.5, -0.6]


def test_joining_leaves_the_chunks_alone():
    # Their rewards may still be computed
    chunks = [chunk(generation(extra_fields=FIELDS), 0, 1), chunk(generation(extra_fields=FIELDS), 1, 3)]
    before = copy.deepcopy(chunks)
    joined = joined_generation(chunks)
    joined[0].clear()
    joined[5]["score"].clear()
    assert chunks == before
