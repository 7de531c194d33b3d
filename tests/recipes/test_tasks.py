"""The tasks: what they ask, what counts as right, and that nothing held out is shown."""

import random
from decimal import Decimal

import gsm8k
import kind_sentence
import pytest
import sort_digits
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return sort_digits.build_tokenizer()


@pytest.fixture(scope="module")
def noisy(tokenizer):
    return sort_digits.build_data("N", tokenizer, seed=0, sft_size=2000, train_size=1000, test_size=400)


def digits(prompts: list[str]) -> list[str]:
    assert all(prompt[0] == "s" and prompt[-1] == "=" for prompt in prompts)
    return [prompt[1:-1] for prompt in prompts]


def test_held_out_prompts_are_distinct_and_never_shown(noisy):
    test = set(noisy["test"]["prompt"])
    assert len(test) == 400
    assert not test & set(noisy["train"]["prompt"])
    assert not test & set(noisy["sft"]["prompt"])


def test_half_of_the_short_prompts_stay_in_training(tokenizer):
    data = sort_digits.build_data("N", tokenizer, seed=1, sft_size=10, train_size=4000, test_size=2000)
    assert sum(len(d) == 2 for d in digits(data["test"]["prompt"])) == 50  # of the 100 there are
    assert len({d for d in digits(data["train"]["prompt"]) if len(d) == 2}) == 50


def test_answers_are_sorted_and_end(noisy, tokenizer):
    row = noisy["test"][0]
    assert row["answer"] == "".join(sorted(digits([row["prompt"]])[0]))
    assert row["answer_ids"] == [4 + int(d) for d in row["answer"]] + [tokenizer.eos_token_id]


def test_set_n_has_a_noisy_teacher_for_long_prompts_only(noisy):
    lengths = [len(d) for d in digits(noisy["train"]["prompt"])]
    assert set(lengths) == {2, 3, 4, 5, 8, 9, 10, 11, 12}
    assert sum(n <= 5 for n in lengths) / len(lengths) == pytest.approx(0.5, abs=0.06)
    wrong = total = 0
    for row in noisy["sft"]:
        right = "".join(sorted(row["prompt"][1:-1]))
        if len(right) < 8:
            assert row["completion"] == right
        else:
            wrong += sum(a != b for a, b in zip(row["completion"], right, strict=True))
            total += len(right)
    # 30 % are drawn anew, and of those one in ten comes out as it was
    assert wrong / total == pytest.approx(0.3 * 0.9, abs=0.02)


def test_set_a_asks_for_more_than_it_shows(tokenizer):
    data = sort_digits.build_data("A", tokenizer, seed=0, sft_size=500, train_size=500, test_size=50)
    assert {len(d) for d in digits(data["sft"]["prompt"])} == set(range(3, 9))
    assert {len(d) for d in digits(data["train"]["prompt"])} == set(range(4, 15))
    assert all(row["completion"] == "".join(sorted(row["prompt"][1:-1])) for row in data["sft"])


def test_pairs_have_the_answer_and_a_wrong_one(tokenizer):
    data = sort_digits.build_data("N", tokenizer, 0, 10, 10, test_size=300, pairs_size=1000)
    assert len(data["pairs"]) == 1000
    assert data["pairs_test"]["prompt"] == data["test"]["prompt"]
    assert not set(data["pairs"]["prompt"]) & set(data["test"]["prompt"])
    in_order = same_length = 0
    for row in [*data["pairs"], *data["pairs_test"]]:
        assert row["chosen"] == "".join(sorted(digits([row["prompt"]])[0]))
        assert row["rejected"] != row["chosen"] and row["rejected"].isdigit()
        in_order += row["rejected"] == "".join(sorted(row["rejected"]))
        same_length += len(row["rejected"]) == len(row["chosen"])
    # Half are sorted other digits; of the rest, a fifth each has a digit missing or twice, which stays in order
    assert in_order / 1300 == pytest.approx(0.5 + 0.5 * 0.4 + 0.03, abs=0.06)
    assert same_length / 1300 == pytest.approx(1 - 0.5 * 0.4, abs=0.06)


@pytest.mark.parametrize("fault", sort_digits.FAULTS, ids=lambda fault: fault.__name__)
def test_every_fault_is_one(fault):
    rng = random.Random(0)
    spoilt = {fault("01235679", rng) for _ in range(200)}
    assert len(spoilt - {"01235679"}) > 5
    assert all(set(answer) <= set(sort_digits.DIGITS) for answer in spoilt)


def test_pairs_change_nothing_else(tokenizer):
    without, with_pairs = (sort_digits.build_data("N", tokenizer, 0, 20, 20, 20, size) for size in (0, 50))
    for split in ("sft", "train", "test"):
        assert without[split].to_dict() == with_pairs[split].to_dict()
    assert set(with_pairs) - set(without) == {"pairs", "pairs_test"}


def test_the_seed_decides(tokenizer):
    def built(seed):
        return sort_digits.build_data("N", tokenizer, seed, sft_size=20, train_size=20, test_size=20, pairs_size=20)

    for split in ("sft", "pairs"):
        assert built(3)[split].to_dict() == built(3)[split].to_dict()
    assert built(3)["train"]["prompt"] != built(4)["train"]["prompt"]


def test_reward_counts_ids_not_text(tokenizer):
    answer = tokenizer("134<eos>")["input_ids"]
    stray = tokenizer("1<bos>34<eos>")["input_ids"]
    # Decoded, the stray token disappears: by its text this completion would be right
    assert tokenizer.decode(stray, skip_special_tokens=True) == "134"
    completions = [answer, stray, answer[:-1], tokenizer("143<eos>")["input_ids"], [*answer, 2]]
    assert sort_digits.exact_match(completions, [answer] * 5, prompts=["s413="] * 5) == [1, 0, 0, 0, 0]
    # Of the four tokens of the answer, at their places: all; the first; all but the end; the first and the end; all
    assert sort_digits.digits_in_place(completions, [answer] * 5) == [1, 0.25, 0.75, 0.5, 1]


def test_what_is_saved_is_what_loads(tmp_path, monkeypatch, tokenizer):
    arguments = [
        "sort_digits.py",
        "--output_dir",
        str(tmp_path),
        "--sft_size",
        "8",
        "--train_size",
        "8",
        "--test_size",
        "8",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    sort_digits.main()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "init")
    text = "s3142=1234<eos>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"] == [17, 7, 5, 8, 6, 15, 5, 6, 7, 8, 2]
    assert loaded.padding_side == "left"
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "init")
    assert model.num_parameters() == 109_248
    assert model.config.vocab_size >= len(loaded)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 40 + 2\n#### 42", 42),
        ("#### 1,234.50", Decimal("1234.5")),
        ("#### $18.", 18),
        ("#### 3\nno, wait\n#### **-4**", -4),
        ("the answer is 42", None),
        ("#### forty-two", None),
        ("####", None),
    ],
)
def test_gsm8k_numbers(text, number):
    assert gsm8k.read_number(text) == number


def test_gsm8k_rows_and_reward():
    row = gsm8k.prepare_row({"question": "6 * 7?", "answer": "It is 6 * 7 = <<6*7=42>>42\n#### 42"})
    assert row["prompt"][0]["role"] == "user"
    assert row["prompt"][0]["content"].startswith("6 * 7?\n")
    completions = [[{"role": "assistant", "content": text}] for text in ("#### 42.0", "#### 41", "42")]
    assert gsm8k.correct_answer(completions, [row["final_answer"]] * 3, prompts=[]) == [1, 0, 0]


# One short, kind sentence


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_a_sentence_that_is_kind_earns_more_than_one_that_is_not():
    kind, plain, hostile = kind_sentence.kind_sentence(
        [said("What a lovely old bicycle!"), said("It is a bicycle."), said("I hate that awful bicycle.")]
    )
    assert kind > 0.5 and plain == 0.0 and hostile < -0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A lovely",
        "Lovely. Wonderful.",
        "Lovely and\nwonderful.",
        " ".join(["lovely"] * (kind_sentence.WORDS + 1)) + ".",
        "Lovely! and",
    ],
)
def test_what_is_not_one_finished_sentence_earns_the_least(text):
    assert kind_sentence.kind_sentence([said(text)]) == [-1.0]
    assert kind_sentence.is_one_sentence("It costs 3.50 a day, and it is lovely!")


def test_held_out_subjects_are_in_no_training_prompt():
    data = kind_sentence.build_data(seed=0, test_size=96)
    texts = {name: [row["prompt"][0]["content"] for row in data[name]] for name in data}
    assert len(texts["test"]) == 96 and len(set(texts["train"])) == len(texts["train"]) == 6 * 8 * 24
    held_out = {thing for thing in kind_sentence.THINGS if any(thing in text for text in texts["test"])}
    assert held_out and not any(thing in text for text in texts["train"] for thing in held_out)
    assert (
        kind_sentence.build_data(seed=0)["train"][:5] == data["train"][:5] != kind_sentence.build_data(1)["train"][:5]
    )
