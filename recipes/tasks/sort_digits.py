"""
Sorting digits: a task small enough for a language model to learn on a laptop, and hard enough to be worth learning.

The prompt `s3142=` asks for `1234`, one character a token, and the reward is 1 exactly when the completion is the
answer followed by the end-of-sequence token. Two sets are worth comparing methods on:

- `N` (noisy teacher): half the prompts have 2 to 5 digits, half 8 to 12. The demonstrations of the long ones have 30 %
  of their digits wrong, so a model that imitates them perfectly is still bad at them, and reinforcement learning has
  something to find that the demonstrations don't show.
- `A` (going further): clean demonstrations of 3 to 8 digits, prompts of 4 to 14 digits. Most groups of completions are
  all right or all wrong, which is what dynamic sampling is for.

Written to `--output_dir`: `data/`, a [`~datasets.DatasetDict`] with the splits `sft` (`prompt`, `completion`), `train`
and `test` (`prompt`, `answer`, `answer_ids`), `pairs` and `pairs_test` (`prompt`, `chosen`, `rejected`: the answer
and a wrong one), and `init/`, the tokenizer and a model of 109k random parameters. The prompts of `pairs_test` are
those of `test`, which no other split has.

```shell
python recipes/tasks/sort_digits.py --output_dir runs/sort_digits --task_set N --seed 0
trl-ext run sort_digits --output_dir runs/sort_digits  # the same where only the wheel is installed
```
"""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

from trl_ext.run.program import Parser, program


SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
DIGITS = "0123456789"
CHARACTERS = f"{DIGITS}+=*srm%,"
VOCABULARY_SIZE = 32  # at least: room for tasks with more symbols, so that their models have the same shape


class TaskSet(NamedTuple):
    """Which prompts a set has. Each tuple is a range of digit counts; a prompt's range is drawn first, evenly."""

    prompt_digits: tuple[range, ...]
    demonstration_digits: tuple[range, ...]
    noise: float  # probability that a digit of a demonstration is replaced by a random one ...
    noisy_from: int  # ... in prompts of at least this many digits


TASK_SETS = {
    "N": TaskSet((range(2, 6), range(8, 13)), (range(2, 6), range(8, 13)), noise=0.3, noisy_from=8),
    "A": TaskSet((range(4, 15),), (range(3, 9),), noise=0.0, noisy_from=0),
}


def exact_match(completion_ids: list[list[int]], answer_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """
    Reward function: 1.0 when the completion is the answer and its end, 0.0 otherwise.

    It compares token ids. Decoded text hides special tokens, and would score an answer with a stray one inside, or one
    that doesn't stop, as right.

    Args:
        completion_ids (`list[list[int]]`):
            Token ids of each completion, up to and including the end-of-sequence token if there is one.
        answer_ids (`list[list[int]]`):
            Column of the data set: the answer's token ids with the end-of-sequence token.

    Returns:
        `list[float]`: one reward per completion.
    """
    return [float(ids == answer) for ids, answer in zip(completion_ids, answer_ids, strict=True)]


def digits_in_place(completion_ids: list[list[int]], answer_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """
    Reward function: the share of the answer's tokens, its end among them, that the completion has at their place. It
    tells completions of an untrained model apart, which [`exact_match`] doesn't.

    Args:
        completion_ids, answer_ids (`list[list[int]]`):
            As in [`exact_match`].

    Returns:
        `list[float]`: one reward per completion, in [0, 1].
    """
    return [
        sum(token == right for token, right in zip(ids, answer, strict=False)) / len(answer)
        for ids, answer in zip(completion_ids, answer_ids, strict=True)
    ]


def build_tokenizer(more: str = "") -> Qwen2Tokenizer:
    """
    One character, one token; four special tokens first. It is the tokenizer class of the model's own type, with no
    merges, because `AutoTokenizer` turns any other kind saved beside a Qwen2 model into this one.

    Args:
        more (`str`, *optional*):
            Characters of another task.
    """
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *CHARACTERS, *more])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], padding_side="left", **SPECIAL_TOKENS)


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """A two-layer Qwen2 with random weights. The short rope period suits sequences of at most 30 tokens."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=max(VOCABULARY_SIZE, len(tokenizer)),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def draw_digits(ranges: tuple[range, ...], rng: random.Random) -> str:
    length = rng.choice(rng.choice(ranges))
    return "".join(rng.choices(DIGITS, k=length))


def draw_held_out(count: int, ranges: tuple[range, ...], rng: random.Random) -> list[str]:
    """
    `count` distinct prompts. Of each length at most half of all possible ones are taken, so that the 100 prompts of
    two digits don't all end up held out, and the search ends.
    """
    held_out: dict[str, None] = {}  # a dictionary, because it keeps the order of the draws
    taken: Counter[int] = Counter()
    while len(held_out) < count:
        digits = draw_digits(ranges, rng)
        if digits not in held_out and taken[len(digits)] < 10 ** len(digits) // 2:
            held_out[digits] = None
            taken[len(digits)] += 1
    return list(held_out)


def draw_others(count: int, ranges: tuple[range, ...], rng: random.Random, held_out: set[str]) -> list[str]:
    """`count` prompts, repetitions allowed, none of them held out."""
    drawn: list[str] = []
    while len(drawn) < count:
        digits = draw_digits(ranges, rng)
        if digits not in held_out:
            drawn.append(digits)
    return drawn


def with_random_digits(answer: str, share: float, rng: random.Random) -> str:
    """Each digit is replaced by a random one with probability `share`."""
    return "".join(rng.choice(DIGITS) if rng.random() < share else digit for digit in answer)


def with_another_digit(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer))
    return answer[:place] + rng.choice(DIGITS) + answer[place + 1 :]


def with_neighbours_swapped(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer) - 1)
    return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]


def with_a_digit_missing(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer))
    return answer[:place] + answer[place + 1 :]


def with_a_digit_twice(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer))
    return answer[:place] + answer[place] + answer[place:]


def of_the_noisy_teacher(answer: str, rng: random.Random) -> str:
    return with_random_digits(answer, 0.3, rng)


def sorted_but_of_other_digits(answer: str, rng: random.Random) -> str:
    return "".join(sorted(of_the_noisy_teacher(answer, rng)))


# How answers go wrong
FAULTS: tuple[Callable[[str, random.Random], str], ...] = (
    with_another_digit,
    with_neighbours_swapped,
    with_a_digit_missing,
    with_a_digit_twice,
    of_the_noisy_teacher,
)


def spoil(answer: str, rng: random.Random) -> str:
    """
    A wrong answer. Half are in order, but of other digits: with few of those among its pairs, a reward model likes
    whatever is in order, and a policy that maximises it finds that out. A fault that changes nothing is drawn again.
    """
    wrong = answer
    while wrong == answer:
        fault = sorted_but_of_other_digits if rng.random() < 0.5 else rng.choice(FAULTS)
        wrong = fault(answer, rng)
    return wrong


def build_data(
    task_set: str,
    tokenizer: Qwen2Tokenizer,
    seed: int,
    sft_size: int,
    train_size: int,
    test_size: int,
    pairs_size: int = 0,
) -> DatasetDict:
    """
    Builds the splits.

    Args:
        task_set (`str`):
            `"N"` or `"A"`.
        tokenizer ([`~transformers.Qwen2Tokenizer`]):
            Turns answers into `answer_ids`.
        seed (`int`):
            Seed of all draws.
        sft_size (`int`):
            Number of demonstrations.
        train_size (`int`):
            Number of training prompts.
        test_size (`int`):
            Number of distinct held-out prompts.
        pairs_size (`int`, *optional*, defaults to `0`):
            Number of preference pairs. 0: no such splits. The others don't depend on it.

    Returns:
        [`~datasets.DatasetDict`]: `sft`, `train`, `test`, and with pairs `pairs` and `pairs_test`.
    """
    task, rng = TASK_SETS[task_set], random.Random(seed)
    test = draw_held_out(test_size, task.prompt_digits, rng)
    train = draw_others(train_size, task.prompt_digits, rng, set(test))
    demonstrated = draw_others(sft_size, task.demonstration_digits, rng, set(test))

    def demonstrate(digits: str) -> str:
        answer = "".join(sorted(digits))
        return with_random_digits(answer, task.noise, rng) if len(digits) >= task.noisy_from else answer

    def with_answers(prompts: list[str]) -> Dataset:
        answers = ["".join(sorted(digits)) for digits in prompts]
        ids = tokenizer([answer + tokenizer.eos_token for answer in answers])["input_ids"]
        return Dataset.from_dict(
            {"prompt": [f"s{digits}=" for digits in prompts], "answer": answers, "answer_ids": ids}
        )

    def in_pairs(prompts: list[str]) -> Dataset:
        chosen = ["".join(sorted(digits)) for digits in prompts]
        rejected = [spoil(answer, rng) for answer in chosen]
        return Dataset.from_dict(
            {"prompt": [f"s{digits}=" for digits in prompts], "chosen": chosen, "rejected": rejected}
        )

    sft = {"prompt": [f"s{digits}=" for digits in demonstrated], "completion": list(map(demonstrate, demonstrated))}
    data = DatasetDict(sft=Dataset.from_dict(sft), train=with_answers(train), test=with_answers(test))
    if pairs_size > 0:  # an empty split could be written, but not read again
        data["pairs"] = in_pairs(draw_others(pairs_size, task.prompt_digits, rng, set(test)))
        data["pairs_test"] = in_pairs(test)
    return data


@program
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Write the digit-sorting task: data sets, tokenizer, untrained model.")
    parser.add_argument("--output_dir", type=Path, required=True, help="data/ and init/ are written here")
    parser.add_argument("--task_set", choices=sorted(TASK_SETS), default="N", help="which set (default: N)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of the initial weights (default: 0)")
    parser.add_argument("--sft_size", type=int, default=12_800, help="demonstrations (default: 12800)")
    parser.add_argument("--train_size", type=int, default=8_192, help="training prompts (default: 8192)")
    parser.add_argument("--test_size", type=int, default=512, help="held-out prompts (default: 512)")
    parser.add_argument("--pairs_size", type=int, default=64_000, help="preference pairs; 0: none (default: 64000)")
    args = parser.parse_args(argv)
    disable_progress_bars()  # of steps that take less than a second
    disable_progress_bar()

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    sizes = args.sft_size, args.train_size, args.test_size, args.pairs_size
    data = build_data(args.task_set, tokenizer, args.seed, *sizes)
    data.save_to_disk(args.output_dir / "data")
    model.save_pretrained(args.output_dir / "init")
    tokenizer.save_pretrained(args.output_dir / "init")
    print(
        f"Task set {args.task_set} in {args.output_dir}: {len(data['sft'])} demonstrations, {len(data['train'])} "
        f"training and {len(data['test'])} held-out prompts, {args.pairs_size} pairs, a model of "
        f"{model.num_parameters():,} parameters."
    )


if __name__ == "__main__":
    main()
