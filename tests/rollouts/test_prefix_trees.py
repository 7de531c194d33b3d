"""How rows that begin with the same tokens lie in packed rows."""

import pytest
import torch

from trl_ext.rollouts.prefix_trees import (
    Cost,
    PackedRows,
    SortedRows,
    bins,
    common_prefix,
    cut_by_cost,
    packed_rows,
)


def rows_of(*texts: str) -> list[torch.Tensor]:
    """One token a letter."""
    return [torch.tensor([ord(letter) for letter in text]) for text in texts]


def text_of(tokens: torch.Tensor) -> str:
    return "".join(chr(token) for token in tokens.tolist())


def sees(packed: PackedRows, row: int, place: int) -> str:
    """What the token at a place sees, itself included."""
    return text_of(packed.input_ids[row][packed.visible[row, place]])


def test_common_prefix():
    a, b, c = rows_of("abcd", "abx", "ab")
    assert (common_prefix(a, b), common_prefix(a, c), common_prefix(b, b), common_prefix(c, a)) == (2, 2, 3, 2)


class TestLayout:
    """A prompt `pqr` with the completions `ab`, `c` and none."""

    rows = rows_of("pqrab", "pqrc", "pqr")

    @pytest.fixture
    def packed(self):
        ordered = SortedRows(self.rows, fewest=2)
        return PackedRows(self.rows, [ordered.segments(0, 3)])

    def test_the_prompt_stands_once_and_its_last_token_at_the_head_of_each_branch(self, packed):
        # Sorted: "pqr", "pqrab", "pqrc"
        assert text_of(packed.input_ids[0]) == "pqr" + "r" + "rab" + "rc"
        assert packed.positions[0].tolist() == [0, 1, 2, 2, 2, 3, 4, 2, 3]

    def test_a_branch_sees_the_prompt_and_itself(self, packed):
        # Each sees one r: its own, not the one at the prompt's end
        assert sees(packed, 0, 6) == "pqrab"
        assert sees(packed, 0, 5) == "pqra"
        assert sees(packed, 0, 8) == "pqrc"
        assert sees(packed, 0, 3) == "pqr" == sees(packed, 0, 4)
        assert not packed.visible[0, 6, 2] and packed.visible[0, 6, 4]
        assert sees(packed, 0, 1) == "pq"

    def test_every_token_of_a_row_has_its_place(self, packed):
        for i, row in enumerate(self.rows):
            places = packed.places(i)
            assert text_of(packed.input_ids.flatten()[places]) == text_of(row)
            assert packed.positions.flatten()[places].tolist() == list(range(len(row)))


def test_turns_that_some_rows_share_stand_once():
    rows = rows_of("system-one-a", "system-one-bc", "system-two-d", "other")
    packed = packed_rows(rows, Cost(0.0), fewest=4)
    whole = text_of(packed.input_ids.flatten())
    assert whole.count("system") == 1 and whole.count("one") == 1
    for i, row in enumerate(rows):
        assert text_of(packed.input_ids.flatten()[packed.places(i)]) == text_of(row)
        last = int(packed.places(i)[-1])
        assert sees(packed, last // packed.width, last % packed.width) == text_of(row)


def test_few_shared_tokens_are_not_worth_a_segment():
    ordered = SortedRows(rows_of("abcx", "abcy"), fewest=4)
    assert [segment.parent for segment in ordered.segments(0, 2)] == [-1, -1]


def test_padding_sees_padding_alone():
    packed = PackedRows(
        rows_of("abc", "d"), [[s] for row in (0, 1) for s in SortedRows(rows_of("abc", "d")).segments(row, row + 1)]
    )
    assert packed.visible[1].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_packed_rows_are_padded_to_a_multiple():
    rows = rows_of("abc", "d")
    assert packed_rows(rows, Cost(0.0), multiple=8).width == 8
    assert packed_rows(rows, Cost(0.0)).width == 4


def test_random_rows_see_exactly_themselves(subtests):
    """
    Whatever is shared: a token sees the tokens of its row up to itself, each once, in its order of positions. In a
    window it sees the last of them.
    """
    generator = torch.Generator().manual_seed(0)
    for trial in range(30):
        with subtests.test(trial=trial):
            alphabet, count = 1 + trial % 3, 2 + trial % 7
            lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
            rows = [torch.randint(97, 98 + alphabet, (n,), generator=generator) for n in lengths]
            packed = packed_rows(rows, Cost(0.05 * (trial % 4)), fewest=2 + trial % 3)
            for i, row in enumerate(rows):
                places = packed.places(i)
                assert packed.input_ids.flatten()[places].tolist() == row.tolist()
                for t, place in enumerate(places.tolist()):
                    r, column = divmod(place, packed.width)
                    seen = packed.visible[r, column]
                    assert packed.positions[r][seen].sort().values.tolist() == list(range(t + 1))
                    order = packed.positions[r][seen].argsort()
                    assert packed.input_ids[r][seen][order].tolist() == row[: t + 1].tolist()
                    near = packed.positions[r][packed.visible_within(3)[r, column]]
                    assert near.sort().values.tolist() == list(range(max(0, t - 2), t + 1))


class TestCost:
    # Four rows of 6 tokens, of which the first 4 are the same
    rows = SortedRows(rows_of("ppppab", "ppppcd", "ppppef", "ppppgh"), fewest=2)

    def test_without_attention_all_share(self):
        assert cut_by_cost(self.rows, Cost(0.0)) == [(0, 4)]

    def test_where_attention_is_all_that_costs_none_share(self):
        # One row: 6 · (1 + 6c); two: 9 tokens, 9 · (1 + 9c) against 2 · 6 · (1 + 6c): worth it while 3 > 9c
        assert cut_by_cost(self.rows, Cost(1.0)) == [(0, 1), (1, 2), (2, 3), (3, 4)]

    def test_between_them_some_share(self):
        # c = 0.2: pairs cost 2 · 9 · 2.8 = 50.4, all together 15 · 4 = 60, each alone 4 · 6 · 2.2 = 52.8
        assert cut_by_cost(self.rows, Cost(0.2)) == [(0, 2), (2, 4)]

    def test_of_a_pass(self):
        assert Cost(0.5).of(2, 4) == 2 * 4 * 3.0
        assert Cost(0.5).of(2, 4, seen=10) == 2 * 4 * 6.0


def test_packed_rows_lie_in_one_where_padding_costs_more():
    # Three rows of 5 without padding; in one of 15, attention would cost 15 · 15 and not 3 · 5 · 5
    assert [sorted(b) for b in bins([5, 2, 4, 1, 3], Cost(0.1))] == [[0], [2, 3], [1, 4]]
    # 5, 4 and 4: one row of 13 costs 13 · 1.13, two of 8 and 5 cost 16 · 1.08, three cost 15 · 1.05
    assert bins([5, 4, 4], Cost(0.01)) == [[0, 1, 2]]
    assert bins([5, 4, 4], Cost(0.1)) == [[0], [1], [2]]
