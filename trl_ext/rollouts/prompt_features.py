"""
What describes a prompt: its length, and the policy's own hidden states on it, as a few numbers. A policy knows more of
how hard a prompt is for it than a column of the data set says, and it knows it without generating anything.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .stream import prompt_key


Halves = NDArray[np.float16]

# Numbers onto which hidden states are projected
PROJECTED = 64
# The first features stand for themselves: log tokens, and then a critic's value of the prompt, if there is one
PLAIN = 1
# Features are computed anew when they are between once and twice this many ticks old; those with a value sooner,
# because a critic starts at 0 and learns fast
RENEWED_EVERY, VALUES_RENEWED_EVERY = 50, 5
LIMIT = 10.0  # of a feature, in standard deviations


class Projection:
    """
    From what is read of a prompt to its features. Everything is standardised by the mean and the standard deviation
    over the first prompts that it sees. The first `plain` numbers are then features; hidden states are projected onto
    `PROJECTED` further ones by a random matrix that preserves their mean square, unless they are fewer.

    Args:
        seed (`int`):
            Seed of the matrix.

    Attributes:
        plain (`int`):
            `PLAIN`, or one more if a critic's value is read.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.plain = seed, PLAIN
        self._mean = self._scale = torch.zeros(0, dtype=torch.float64)
        self._matrix: torch.Tensor | None = None

    @property
    def fitted(self) -> bool:
        """Whether mean and standard deviation are known."""
        return len(self._mean) > 0

    def fit(self, read: torch.Tensor, plain: int = PLAIN) -> None:
        """
        Take mean and standard deviation from what was read `(N, R)` of the first prompts. A value that is the same for
        all of them, as before a critic has learned, stays in units of reward.
        """
        self._mean, self._scale, self.plain = read.mean(dim=0), read.std(dim=0, correction=0).clamp(min=1e-6), plain
        values = self._scale[PLAIN:plain]
        values[values <= 1e-6] = 1.0

    def __call__(self, read: torch.Tensor) -> Halves:
        """Features `(N, F)` of what was read `(N, R)`, in float64."""
        z = ((read - self._mean) / self._scale).nan_to_num().clamp(-LIMIT, LIMIT)
        plain, states = z[:, : self.plain], z[:, self.plain :]
        size = states.size(1)
        if size > PROJECTED:
            if self._matrix is None:
                generator = torch.Generator().manual_seed(self.seed)
                self._matrix = torch.randn(size, PROJECTED, dtype=torch.float64, generator=generator) / size**0.5
            states = states @ self._matrix
        features: Halves = torch.cat([plain, states], dim=1).to(torch.float16).numpy()
        return features

    def state_dict(self) -> dict[str, Any]:
        """Mean and standard deviation, and what stands for itself."""
        return {"mean": self._mean, "scale": self._scale, "plain": self.plain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        self._mean, self._scale, self._matrix = state["mean"].cpu(), state["scale"].cpu(), None
        self.plain = state["plain"]


class FeatureTable:
    """
    Features by key. Rows are added and never change, so that a moment to go back to is a number of rows.

    Args:
        state ([`FeatureState`], *optional*):
            What to start with.
    """

    def __init__(self, state: "FeatureState | None" = None) -> None:
        count = 0 if state is None else len(state)
        self._keys: list[str] = state.keys[:count] if state else []
        self._rows: list[Halves] = state.rows[:count] if state else []
        self._places = {key: place for place, key in enumerate(self._keys)}

    def get(self, key: str) -> Halves | None:
        place = self._places.get(key)
        return None if place is None else self._rows[place]

    def add(self, key: str, row: Halves) -> None:
        self._places[key] = len(self._keys)
        self._keys.append(key)
        self._rows.append(row)

    def state(self) -> "FeatureState":
        """What the table holds now."""
        return FeatureState(self._keys, self._rows, len(self._keys))


class FeatureState:
    """
    What a [`FeatureTable`] held at a moment. It never changes, so that a deep copy of it is the state itself.

    Args:
        keys (`list[str]`), rows (`list[np.ndarray]`):
            Of the table, which may have more by now.
        count (`int`):
            How many there were.
    """

    def __init__(self, keys: list[str], rows: list[Halves], count: int) -> None:
        self.keys, self.rows, self._count = keys, rows, count

    def __len__(self) -> int:
        return self._count

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, FeatureState) or self.keys[: len(self)] != other.keys[: len(other)]:
            return False
        return all(
            np.array_equal(*pair) for pair in zip(self.rows[: len(self)], other.rows[: len(other)], strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureState":
        return self

    def __reduce__(self) -> Any:
        rows = np.stack(self.rows[: len(self)]) if len(self) else np.zeros((0, 0), dtype=np.float16)
        return read_features, (self.keys[: len(self)], torch.from_numpy(rows))


def read_features(keys: list[str], rows: torch.Tensor) -> FeatureState:
    """The reverse of saving a [`FeatureState`], which files of state name as its maker."""
    return FeatureState(keys, list(rows.cpu().numpy()), len(keys))


# From data set rows, the same on every rank, to their features (N, F) and the number of tokens that this took. Called
# on every rank. `None`: there are none.
Reader = Callable[[Sequence[dict[str, Any]], Projection], tuple[Halves, int] | None]


class PromptFeatures:
    """
    The features of the prompts that were met. They are kept for a while, because reading them costs a forward pass:
    features are forgotten when they are `renewed_every` to 2 `renewed_every` ticks old. A prompt that is met again
    after that is read anew, by the policy as it is then.

    Args:
        read (`Reader`):
            Reads features.
        seed (`int`):
            Seed of the projection.
        renewed_every (`int`, *optional*):
            Ticks, where no value is among the features.

    Attributes:
        tokens (`int`):
            Tokens for which forward passes were made so far.
    """

    def __init__(self, read: Reader, seed: int, renewed_every: int = RENEWED_EVERY) -> None:
        self.read, self.renewed_every = read, renewed_every
        self.projection = Projection(seed)
        self.tokens = 0
        self.available = True
        self._now = 0
        self._young, self._old = FeatureTable(), FeatureTable()

    def tick(self) -> None:
        """Called once for each generation batch."""
        self._now += 1
        if self._now % (VALUES_RENEWED_EVERY if self.projection.plain > PLAIN else self.renewed_every) == 0:
            self._old, self._young = self._young, FeatureTable()

    def of(self, rows: Sequence[dict[str, Any]]) -> NDArray[np.float64] | None:
        """
        Features `(N, F)` of data set rows. Must be called on every rank with the same rows. `None`: there are none.
        """
        if not self.available or not rows:
            return None
        keys = [prompt_key(row) for row in rows]
        known = {key: found for key in keys if (found := self._known(key)) is not None}
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        if new:
            read = self.read(list(new.values()), self.projection)
            if read is None:
                self.available = False
                return None
            features, tokens = read
            self.tokens += tokens
            for key, feature in zip(new, features, strict=True):
                self._young.add(key, feature)
                known[key] = feature
        return np.stack([known[key] for key in keys]).astype(np.float64)

    def _known(self, key: str) -> Halves | None:
        found = self._young.get(key)
        return self._old.get(key) if found is None else found

    def state_dict(self) -> dict[str, Any]:
        """Everything that is kept. It doesn't change when further prompts are met."""
        return {
            "now": self._now,
            "tokens": self.tokens,
            "projection": self.projection.state_dict(),
            "young": self._young.state(),
            "old": self._old.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        self._now, self.tokens = state["now"], state["tokens"]
        self.projection.load_state_dict(state["projection"])
        self._young, self._old = FeatureTable(state["young"]), FeatureTable(state["old"])
