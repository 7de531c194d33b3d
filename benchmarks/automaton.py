"""
The second task of the learning studies: walking through an automaton. All prompts have the same length and look; what
makes some hard is which letters they hold, and no column says so.

The automaton has the ten digits as states and 24 letters, whose transitions were drawn at random (`TRANSITIONS`). The
prompt `r4DPADDP=` holds a state and a word of six letters, three different ones. The completion is the state after
each letter, and its end. The reward is 1 exactly when all of that is right.

The demonstrations of a supervised start know 14 letters. Of the transitions by the other ten, 40 to 90 % lead to a
random state (`NOISE`). A right state is then still more likely than any wrong one, but six of them in a row are rare:
from such a start, prompts are solved from always to hardly ever.
"""

import random
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict
from task import TrainingTask

from recipes.tasks.sort_digits import DIGITS, build_model, build_tokenizer


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWX"
KNOWN = 14
STEPS, DIFFERENT = 6, 3


def draw_transitions() -> dict[str, list[str]]:
    """For each letter, the state after each state."""
    rng = random.Random(0)
    return {letter: rng.choices(DIGITS, k=10) for letter in LETTERS}


TRANSITIONS = draw_transitions()
# Share of random states in the demonstrations, by letter
NOISE = {letter: 0.4 + 0.5 * i / 9 for i, letter in enumerate(LETTERS[KNOWN:])}


def walk(state: str, word: str, noise: dict[str, float], rng: random.Random) -> str:
    """The state after each letter of a word. With its probability in `noise`, a letter leads to a random one."""
    states = ""
    for letter in word:
        state = TRANSITIONS[letter][int(state)]
        if rng.random() < noise.get(letter, 0.0):
            state = rng.choice(DIGITS)
        states += state
    return states


def draw(rng: random.Random) -> tuple[str, str]:
    """A state, and a word of exactly `DIFFERENT` letters."""
    letters = rng.sample(LETTERS, DIFFERENT)
    word = ""
    while len(set(word)) < DIFFERENT:
        word = "".join(rng.choices(letters, k=STEPS))
    return rng.choice(DIGITS), word


def prompt(pair: tuple[str, str]) -> str:
    return f"r{pair[0]}{pair[1]}="


class AutomatonTask(TrainingTask):
    """What [`TrainingTask`] is, for the automaton. There is one set."""

    completion_tokens = 10  # a right completion has 7

    def __post_init__(self) -> None:
        self.tokenizer = build_tokenizer(LETTERS)
        self.rng = random.Random(self.seed)
        held_out: dict[tuple[str, str], None] = {}  # a dictionary, because it keeps the order of the draws
        while len(held_out) < self.test_size:
            held_out[draw(self.rng)] = None
        self.held_out = set(held_out)
        train = self.with_answers(self.others(self.train_size))
        self.data = DatasetDict(train=train, test=self.with_answers(held_out))

    def others(self, count: int) -> list[tuple[str, str]]:
        """Pairs that are not held out, repetitions allowed."""
        drawn: list[tuple[str, str]] = []
        while len(drawn) < count:
            drawn += [pair for pair in [draw(self.rng)] if pair not in self.held_out]
        return drawn

    def with_answers(self, pairs: Iterable[tuple[str, str]]) -> Dataset:
        answers = [walk(*pair, {}, self.rng) for pair in pairs]
        ids = self.tokenizer([answer + self.tokenizer.eos_token for answer in answers])["input_ids"]
        return Dataset.from_dict({"prompt": list(map(prompt, pairs)), "answer": answers, "answer_ids": ids})

    def demonstrations(self, count: int) -> Dataset:
        """For the supervised start."""
        pairs = self.others(count)
        completions = [walk(*pair, NOISE, self.rng) for pair in pairs]
        return Dataset.from_dict({"prompt": list(map(prompt, pairs)), "completion": completions})

    def write(self, directory: Path, demonstrations: int) -> None:
        """`data/` and `init/`, like `recipes/tasks/sort_digits.py`."""
        DatasetDict(sft=self.demonstrations(demonstrations), **self.data).save_to_disk(directory / "data")
        build_model(self.tokenizer, self.seed).save_pretrained(directory / "init")
        self.tokenizer.save_pretrained(directory / "init")
