"""Features of prompts: how they are made of what is read, how long they are kept, and that they are kept exactly."""

import pickle

import numpy as np
import pytest
import torch

from trl_ext.rollouts.prompt_features import PLAIN, PROJECTED, Projection, PromptFeatures


class Reader:
    """Reads four numbers, which say how often it was called."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, rows, projection):
        self.calls.append([row["prompt"] for row in rows])
        numbers = [[len(row["prompt"]), float(len(self.calls)), 0.5, i] for i, row in enumerate(rows)]
        return np.array(numbers, dtype=np.float16), 10 * len(rows)


def rows(*prompts: str) -> list[dict]:
    return [{"prompt": prompt} for prompt in prompts]


def test_standardised_and_projected(subtests):
    generator = torch.Generator().manual_seed(0)
    read = 50 + torch.randn(200, 300, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, 300)
    projection = Projection(seed=1)
    projection.fit(read[:32])
    features = projection(read).astype(np.float64)
    assert features.shape == (200, PLAIN + PROJECTED)
    with subtests.test("a plain number is only standardised"):
        column = read[:, 0]
        expected = (column - column[:32].mean()) / column[:32].std(correction=0)
        assert features[:, 0] == pytest.approx(expected.numpy(), abs=0.01)
    with subtests.test("of similar size, whatever the size of what was read"):
        assert 0.5 < features[:, PLAIN:].std(axis=0).min() < features[:, PLAIN:].std(axis=0).max() < 2
    with subtests.test("lengths are preserved"):
        z = (read - read[:32].mean(dim=0)) / read[:32].std(dim=0, correction=0)
        ratio = (features[:, PLAIN:] ** 2).mean(axis=1) / (z[:, PLAIN:] ** 2).mean(dim=1).numpy() * PROJECTED
        assert ratio.mean() == pytest.approx(PROJECTED, rel=0.1)
    with subtests.test("the same of the same"):
        copied = Projection(seed=1)
        copied.load_state_dict(projection.state_dict())
        assert np.array_equal(copied(read[:3]), projection(read)[:3])
    with subtests.test("few are not projected"):
        small = Projection(seed=1)
        small.fit(read[:, :5])
        assert small(read[:, :5]).shape == (200, 5)


def test_each_prompt_is_read_once_until_it_is_old(subtests):
    reader = Reader()
    features = PromptFeatures(reader, seed=0, renewed_every=3)
    first = features.of(rows("a", "bb", "a"))
    assert reader.calls == [["a", "bb"]]
    assert first.tolist()[0] == first.tolist()[2] == [1.0, 1.0, 0.5, 0.0]
    again = features.of(rows("bb", "ccc"))
    assert reader.calls[1:] == [["ccc"]]
    assert again.tolist() == [[2.0, 1.0, 0.5, 1.0], [3.0, 2.0, 0.5, 0.0]]
    assert features.tokens == 30
    for _ in range(5):
        features.tick()
    assert features.of(rows("a")).tolist() == [first.tolist()[0]]
    features.tick()
    features.of(rows("a", "bb"))
    assert reader.calls[2:] == [["a", "bb"]]
    assert features.of([]) is None


def test_without_features():
    calls = []
    features = PromptFeatures(lambda rows, projection: calls.append(rows), seed=0)
    assert features.of(rows("a")) is None and features.of(rows("b")) is None
    assert len(calls) == 1


def test_goes_on_where_it_was():
    whole, reader = PromptFeatures(Reader(), seed=0, renewed_every=4), Reader()
    for prompt in ("a", "bb", "ccc"):
        whole.of(rows(prompt))
        whole.tick()
    state = pickle.loads(pickle.dumps(whole.state_dict()))
    moment = whole.state_dict()
    expected = whole.of(rows("a", "bb", "ccc"))
    for kept in (state, moment):
        copied = PromptFeatures(reader, seed=0, renewed_every=4)
        copied.load_state_dict(kept)
        assert np.array_equal(copied.of(rows("a", "bb", "ccc")), expected)
        assert copied.tokens == whole.tokens == 30
    assert not reader.calls
