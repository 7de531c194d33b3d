"""The stream of prompts that refilling draws from."""

import itertools

import pytest
from datasets import Dataset, IterableDataset
from trl.trainer.utils import RepeatSampler

from trl_ext.rollouts.stream import PromptStream, can_be_read_twice, prompt_key


def rows(count: int = 12) -> Dataset:
    return Dataset.from_dict({"prompt": [f"p{i}" for i in range(count)], "answer": list(range(count))})


def generated(count: int):
    yield from ({"prompt": f"p{i}", "answer": i} for i in range(count))


def iterable(count: int = 12) -> IterableDataset:
    return IterableDataset.from_generator(generated, gen_kwargs={"count": count})


def one_shot(texts: list[str]) -> IterableDataset:
    """Whoever reads it takes the rows away, as from a queue or a socket."""
    left = [{"prompt": text} for text in texts]

    def take():
        while left:
            yield left.pop(0)

    return IterableDataset.from_generator(take)


def names(drawn: list[dict]) -> list[str]:
    return [row["prompt"] for row in drawn]


def passes(stream: PromptStream, size: int, number: int) -> list[list[str]]:
    """Whole passes over a data set of `size` rows, one row a draw and nothing excluded."""
    return [[names(stream.draw(1, exclude=set()))[0] for _ in range(size)] for _ in range(number)]


both_kinds = pytest.mark.parametrize("dataset", [rows, iterable])


@both_kinds
def test_every_pass_shows_every_prompt_in_a_new_order(dataset):
    orders = passes(PromptStream(dataset(), seed=1), 12, 3)
    for order in orders:
        assert sorted(order) == sorted(f"p{i}" for i in range(12))
        assert order != [f"p{i}" for i in range(12)]
    assert len({tuple(order) for order in orders}) == 3


@both_kinds
def test_seed_decides_the_order(dataset):
    orders = [passes(PromptStream(dataset(), seed), 12, 2) for seed in (1, 1, 2)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


@both_kinds
def test_order_does_not_depend_on_how_much_is_drawn_at_once(dataset):
    one_by_one = PromptStream(dataset(), seed=1)
    at_once = PromptStream(dataset(), seed=1)
    assert [names(one_by_one.draw(1, set()))[0] for _ in range(7)] == names(at_once.draw(7, set()))


@both_kinds
def test_draws_nothing_excluded_and_nothing_twice(dataset):
    stream = PromptStream(dataset(), seed=1)
    exclude = {prompt_key({"prompt": f"p{i}"}) for i in (0, 5)}
    drawn = []
    for _ in range(5):  # 12 rows, 2 excluded: draws cross the end of the pass
        drawn += names(stream.draw(2, exclude))
    assert len(set(drawn)) == 10
    assert not {"p0", "p5"} & set(drawn)
    assert stream.draw(2, exclude) == []


@both_kinds
def test_ends_when_all_other_prompts_are_drawn(dataset):
    stream = PromptStream(dataset(), seed=1)
    stream.draw(5, set())  # in mid-pass: the rest of this pass, then a whole one
    exclude = {prompt_key({"prompt": "p3"})}
    assert sorted(names(stream.draw(100, exclude))) == sorted(f"p{i}" for i in range(12) if i != 3)


def test_an_empty_data_set_ends_too():
    assert PromptStream(rows(0), seed=0).draw(1, set()) == []


def test_a_prompt_that_occurs_twice_is_drawn_once():
    dataset = Dataset.from_dict({"prompt": ["a", "b", "a", "a"], "answer": [1, 2, 3, 4]})
    assert sorted(names(PromptStream(dataset, seed=0).draw(4, set()))) == ["a", "b"]


@both_kinds
def test_resumes_at_any_position(subtests, dataset):
    for position in [0, 1, 11, 12, 13, 17, 24, 30]:
        with subtests.test(position=position):
            stream = PromptStream(dataset(), seed=1)
            for _ in range(position):
                stream.draw(1, set())
            resumed = PromptStream(dataset(), seed=1)
            resumed.load_state_dict(stream.state_dict())
            assert passes(resumed, 9, 1) == passes(stream, 9, 1)
            assert resumed.state_dict() == stream.state_dict()


@both_kinds
def test_loading_a_state_starts_over_from_it(dataset):
    # also in a stream that is already being read
    stream = PromptStream(dataset(), seed=1)
    start = stream.state_dict()
    first = names(stream.draw(4, set()))
    stream.load_state_dict(start)
    assert names(stream.draw(4, set())) == first


def test_rows_come_with_all_their_columns():
    row = PromptStream(rows(), seed=0).draw(1, set())[0]
    assert row["prompt"] == f"p{row['answer']}"


class TestChoice:
    """Draws that choose among rows further on."""

    @staticmethod
    def last(count: int):
        """Chooses the last `count` rows, and remembers what it was offered."""
        offered: list[list[str]] = []

        def choose(candidates: list[dict]) -> list[int]:
            offered.append(names(candidates))
            return list(range(len(candidates)))[-count:]

        return choose, offered

    @both_kinds
    def test_among_the_next_rows(self, dataset):
        order = passes(PromptStream(dataset(), seed=1), 12, 1)[0]
        stream = PromptStream(dataset(), seed=1)
        choose, offered = self.last(2)
        exclude = {prompt_key({"prompt": order[1]})}
        assert names(stream.draw(2, exclude, choose, lookahead=3)) == order[5:7]
        assert offered == [[order[0], *order[2:7]]]
        assert exclude == {prompt_key({"prompt": order[i]}) for i in (1, 5, 6)}
        # The stream goes on behind what was offered
        assert names(stream.draw(1, set())) == [order[7]]

    @both_kinds
    def test_rows_passed_over_come_again_in_the_next_pass(self, dataset):
        stream = PromptStream(dataset(), seed=1)
        choose, offered = self.last(1)
        exclude: set[str] = set()
        chosen = [names(stream.draw(1, exclude, choose, lookahead=4))[0] for _ in range(6)]
        first, second = [name for offer in offered[:3] for name in offer], [n for offer in offered[3:] for n in offer]
        assert len(set(first)) == 12
        assert not set(second) & set(chosen[:3])
        assert set(first) - set(chosen[:3]) <= set(second)

    @both_kinds
    def test_offers_nothing_twice(self, dataset):
        stream = PromptStream(dataset(), seed=1)
        stream.draw(5, set())  # in mid-pass: the search goes on in the next pass
        choose, offered = self.last(4)
        assert len(stream.draw(4, set(), choose, lookahead=100)) == 4
        assert sorted(offered[0]) == sorted(f"p{i}" for i in range(12))

    @both_kinds
    def test_takes_all_if_there_are_no_more(self, dataset):
        stream = PromptStream(dataset(), seed=1)
        exclude = {prompt_key({"prompt": f"p{i}"}) for i in range(9)}
        choose, offered = self.last(1)
        assert sorted(names(stream.draw(3, exclude, choose))) == ["p10", "p11", "p9"]
        assert offered == []
        assert len(exclude) == 12
        assert stream.draw(3, exclude, choose) == []

    def test_in_the_order_chosen(self):
        order = passes(PromptStream(rows(), seed=1), 12, 1)[0]
        drawn = PromptStream(rows(), seed=1).draw(2, set(), choose=lambda candidates: [3, 0])
        assert names(drawn) == [order[3], order[0]]

    @both_kinds
    def test_resumes(self, dataset):
        stream, resumed = PromptStream(dataset(), seed=1), PromptStream(dataset(), seed=1)
        choose, _ = self.last(1)
        stream.draw(1, set(), choose, lookahead=5)
        resumed.load_state_dict(stream.state_dict())
        for lookahead in (3, 4, 5):
            assert stream.draw(1, set(), choose, lookahead) == resumed.draw(1, set(), choose, lookahead)


class TestPromptKey:
    def test_only_what_the_policy_sees_counts(self):
        assert prompt_key({"prompt": "a", "answer": 1}) == prompt_key({"prompt": "a", "answer": 2})
        assert prompt_key({"prompt": "a"}) != prompt_key({"prompt": "b"})
        assert prompt_key({"prompt": "a", "image": 1}) != prompt_key({"prompt": "a", "image": 2})

    def test_conversations_count_by_content(self):
        def message(content: str) -> dict:
            return {"prompt": [{"role": "user", "content": content}]}

        assert prompt_key(message("a")) == prompt_key(message("a"))
        assert prompt_key(message("a")) != prompt_key(message("b"))

    def test_without_a_prompt_the_whole_row_counts(self):
        assert prompt_key({"environment": "x", "level": 1}) != prompt_key({"environment": "x", "level": 2})


class TestCanBeReadTwice:
    def test_what_opens_its_source_anew(self):
        assert can_be_read_twice(iterable())
        assert can_be_read_twice(rows().to_iterable_dataset())

    def test_one_shot_generator(self):
        assert not can_be_read_twice(one_shot(["a", "b", "c"]))

    def test_empty(self):
        assert not can_be_read_twice(iterable(0))

    def test_one_shot_generator_whose_rows_start_alike(self):
        # Many data sets sort equal prompts together; that the second pass starts one row later must still show
        assert not can_be_read_twice(one_shot(["a", "a", "b", "c"]))

    def test_takes_no_more_than_it_needs(self):
        def endless():
            yield from ({"prompt": f"p{i}"} for i in itertools.count())

        assert can_be_read_twice(IterableDataset.from_generator(endless))


def test_the_order_is_not_the_loaders():
    """TRL shuffles by the same seed; drawn in its order, a prompt would be generated for twice in a row."""
    dataset = rows(24)
    dealt = list(RepeatSampler(dataset, mini_repeat_count=1, batch_size=1, shuffle=True, seed=3))
    drawn = [row["answer"] for row in PromptStream(dataset, seed=3).draw(24, exclude=set())]
    assert sorted(drawn) == sorted(dealt) == list(range(24))
    assert drawn != dealt


def test_keys_of_text_and_of_anything_else():
    chat = [{"role": "user", "content": "p"}]
    picture = [{"role": "user", "content": [{"type": "image", "image": b"1"}]}]
    prompts = ["p", "q", chat, [{"role": "user", "content": "q"}], [], picture, None]
    keys = [prompt_key({"prompt": prompt}) for prompt in prompts]
    assert len(set(keys)) == len(prompts)
    assert keys == [prompt_key({"answer": 1, "prompt": prompt}) for prompt in prompts]
    assert prompt_key({"prompt": "p", "image": b"1"}) not in {keys[0], prompt_key({"prompt": "p", "image": b"2"})}
