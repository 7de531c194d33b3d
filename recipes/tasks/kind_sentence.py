"""
One short, kind sentence: a task for a real instruct model that a laptop can train. The prompt asks for a sentence on
an everyday subject; the reward is how kind its tone is, if it is one finished sentence.

Tone is VADER's (C. J. Hutto and E. Gilbert, ICWSM 2014; the package `vaderSentiment`): a lexicon with rules, not a
model, so that anyone can see what earns a reward. A row of friendly words fools it: that is what the penalty for
moving away from the reference is for.

Written to `--output_dir`: a [`~datasets.DatasetDict`] with the splits `train` and `test`, whose subjects differ, and
the column `prompt`, a conversation of one message.

```shell
python recipes/tasks/kind_sentence.py --output_dir runs/kind_sentence
```
"""

import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from trl_ext.errors import UserError
from trl_ext.run.program import Parser, program


REQUESTS = (
    "Write one short sentence about {}.",
    "What do you think of {}? Answer in one short sentence.",
    "My neighbour talks about {} all day. Reply in one short sentence.",
    "Tell me one thing about {}, in one short sentence.",
    "I have to deal with {} today. Say something in one short sentence.",
    "Describe {} in one short sentence.",
)
KINDS = ("old", "new", "small", "loud", "quiet", "broken", "heavy", "cheap")
THINGS = (
    *("bicycles", "umbrellas", "kitchens", "trains", "gardens", "radios", "shoes", "printers", "bridges", "maps"),
    *("libraries", "markets", "clocks", "chairs", "offices", "phones", "boats", "bakeries", "parks", "letters"),
    *("buses", "ladders", "windows", "suitcases", "stairs", "lamps", "museums", "keyboards", "dogs", "fountains"),
)
WORDS = 25  # the most that a short sentence has
END = re.compile(r"[.!?]+[\"'”)]*(?=\s|$)")


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError("vaderSentiment is not installed. Run: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()


def is_one_sentence(text: str) -> bool:
    """Whether a text is one finished sentence, on one line, of at most 25 words."""
    text = text.strip()
    ends = list(END.finditer(text))
    return len(ends) == 1 and ends[0].end() == len(text) and "\n" not in text and len(text.split()) <= WORDS


def kind_sentence(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """
    Reward function: the tone of a sentence, from -1 (hostile) to 1 (kind); -1 for what isn't one finished sentence.

    Args:
        completions (`list[list[dict[str, str]]]`):
            Conversations of one assistant message each.
    """
    texts = [completion[-1]["content"] for completion in completions]
    return [_analyzer().polarity_scores(text)["compound"] if is_one_sentence(text) else -1.0 for text in texts]


def build_data(seed: int = 0, test_size: int = 96) -> DatasetDict:
    """All prompts, in random order. The things of the test prompts are in no training prompt."""
    draw = random.Random(seed)
    things = draw.sample(THINGS, len(THINGS))
    held_out, trained = things[: len(THINGS) // 5], things[len(THINGS) // 5 :]
    splits = {}
    for name, chosen in (("train", trained), ("test", held_out)):
        subjects = [f"{kind} {thing}" for kind in KINDS for thing in chosen]
        prompts = [request.format(subject) for request in REQUESTS for subject in subjects]
        draw.shuffle(prompts)
        rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
        splits[name] = Dataset.from_list(rows if name == "train" else rows[:test_size])
    return DatasetDict(splits)


@program
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Write the prompts of the task 'one short, kind sentence'.")
    parser.add_argument("--output_dir", type=Path, required=True, help="the data set is written here")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order and of the split (default: 0)")
    parser.add_argument("--test_size", type=int, default=96, help="held-out prompts (default: 96)")
    args = parser.parse_args(argv)
    _analyzer()  # rather a missing package now than in a run
    data = build_data(args.seed, args.test_size)
    data.save_to_disk(args.output_dir)
    print(f"{len(data['train'])} training and {len(data['test'])} held-out prompts in {args.output_dir}.")


if __name__ == "__main__":
    main()
