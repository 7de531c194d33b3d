"""What looks like a wrong input and isn't: it is trained on, or at least nothing is said about it."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from datasets import Dataset, IterableDataset, IterableDatasetDict
from tokenizers.processors import TemplateProcessing
from transformers import TrainerCallback

from trl_ext import DPOConfig, DPOTrainer, GRPOTrainer, PPOTrainer
from trl_ext.trainers.data_checks import check_inputs
from trl_ext.trainers.pair_checks import check_pairs
from trl_ext.trainers.reward_checks import HIDDEN_NAMES, PASSED_BY_TRL


class OnceOnly:
    """The source of a stream that gives each row once."""

    def __init__(self, rows: int) -> None:
        self.left = iter([{"prompt": f"w{i % 20}"} for i in range(rows)])

    def __call__(self) -> Any:
        return self.left


def rows(**columns: Any) -> Dataset:
    return Dataset.from_dict({"prompt": [f"w{i}" for i in range(16)], **columns})


def messages(*parts: Any) -> Any:
    return [[{"role": "user", "content": part}] for part in parts]


def only_completions(func: Callable[..., Any]) -> Callable[..., Any]:
    """Hands on the one argument that a function takes."""

    @functools.wraps(func)
    def wrapped(**kwargs: Any) -> Any:
        return func(kwargs["completions"])

    return wrapped


@only_completions
def narrow(completions: list[Any]) -> list[float]:
    return [float(len(completion)) for completion in completions]


class Judge:
    def __call__(self, completions: list[Any], bonus: float = 0.0, **kwargs: Any) -> list[float]:
        return [bonus + len(completion) for completion in completions]


def begins_with_bos() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


def made_of_questions() -> Dataset:
    """A data set whose column `prompt` a function makes when a row is read."""
    asked = Dataset.from_dict({"question": [f"w{i}" for i in range(16)]})
    asked.set_transform(lambda batch: {"prompt": [f"w0 {text}" for text in batch["question"]]})
    return asked


GRPO: dict[str, dict[str, Any]] = {
    "messages": {"train_dataset": tiny.prompts(conversational=True)},
    "parts of text": {"train_dataset": rows(prompt=messages(*[[{"type": "text", "text": "w1"}]] * 16))},
    "an answer that called a tool": {
        "train_dataset": rows(
            prompt=[
                [
                    {"role": "user", "content": "w1", "tool_calls": None},
                    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "dice"}}]},
                ]
            ]
            * 16
        )
    },
    "None in a row that was selected away": {"train_dataset": rows(prompt=["w1"] * 15 + [None]).select(range(15))},
    "None in a column that nothing reads": {"train_dataset": rows(note=[None] * 16)},
    "the text of no prompt, and a first token": {
        "train_dataset": rows(prompt=[""] * 16),
        "processing_class": begins_with_bos(),
    },
    "prompts that are made when read": {"train_dataset": made_of_questions()},
    "numpy's format": {"train_dataset": rows().with_format("numpy")},
    "torch's format": {"train_dataset": rows(target=range(16)).with_format("torch")},
    "columns that TRL leaves out": {"train_dataset": rows(completion=["w1"] * 16, completion_ids=[[1]] * 16)},
    "a stream": {"train_dataset": rows().to_iterable_dataset()},
    "a stream without declared columns": {
        "train_dataset": IterableDataset.from_generator(lambda: ({"prompt": f"w{i}"} for i in range(16)))
    },
    "a dict of streams for evaluation": {
        "eval_dataset": IterableDatasetDict(easy=rows().to_iterable_dataset(), hard=rows().to_iterable_dataset())
    },
    "a list for evaluation": {"eval_dataset": [{"prompt": "w1", "target": 4}]},
    "one row for evaluation": {"eval_dataset": tiny.prompts(1)},
    "tokenizers for functions": {"reward_processing_classes": [None]},
    "no optimizer": {"optimizers": (None, None)},
    "a callback's class": {"callbacks": [TrainerCallback]},
}
REWARDS: dict[str, Any] = {
    "a tuple": (tiny.hashed, tiny.low_ids),
    "an object": Judge(),
    "a partial function": functools.partial(Judge(), bonus=1.0),
    "a decorated function": narrow,
    "a reward model": tiny.classifier(),
    "a class in a list with a function": [Judge(), tiny.hashed],
}


@pytest.mark.parametrize("case", GRPO)
def test_arguments(case, tmp_path):
    tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, GRPO[case])


@pytest.mark.parametrize("case", REWARDS)
def test_rewards(case, tmp_path):
    classes = tiny.tokenizer() if case == "a reward model" else None
    trainer = tiny.trainer(GRPOTrainer, tmp_path, REWARDS[case], {"reward_processing_classes": classes})
    assert trainer.roll_out(tiny.prompts(2), 2, seed=0).rewards.isfinite().all()


def test_what_trl_passes_to_a_reward_function(tmp_path):
    """The list against which signatures are checked is TRL's."""
    seen: dict[str, Any] = {}

    def curious(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * len(kwargs["prompts"])

    columns = {name: ["mine"] * 16 for name in ("completion", "completion_ids", "note")}
    tiny.trainer(GRPOTrainer, tmp_path, curious, {"train_dataset": rows()}).roll_out(rows(**columns), 2)
    assert set(seen) == {*PASSED_BY_TRL, "note"}
    assert seen["completion_ids"] != ["mine"] * 32
    assert set(HIDDEN_NAMES) < set(PASSED_BY_TRL)


def test_rows_may_be_a_data_set(tmp_path):
    trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed)
    from_rows = trainer.roll_out(list(tiny.prompts(3)), 2, seed=0).rewards
    assert trainer.roll_out(tiny.prompts(3), 2, seed=0).rewards.equal(from_rows)


def test_the_model_may_be_a_path(tmp_path):
    tiny.stopping().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    given = {"model": tmp_path / "model", "processing_class": None}
    trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, given)
    assert trainer.model.config.name_or_path == str(tmp_path / "model")


def test_a_declared_stream_is_not_read_before_training(tmp_path):
    stream = IterableDataset.from_generator(OnceOnly(8), features=rows().features)
    tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, {"train_dataset": stream})
    assert len(list(stream)) == 8


def test_an_undeclared_stream_loses_one_row(tmp_path):
    stream = IterableDataset.from_generator(OnceOnly(8))
    tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, {"train_dataset": stream})
    assert len(list(stream)) == 7


def test_prompts_with_images():
    """Without a model: there is no tiny one that sees."""
    data = rows(prompt=messages(*[[{"type": "image"}, {"type": "text", "text": "w1"}]] * 16), image=["x"] * 16)
    config = GRPOTrainer.config_class(**tiny.cpu_settings("out"))
    check_inputs(config, {"train_dataset": data, "reward_funcs": tiny.hashed}, None)


def test_environments_may_own_the_prompts():
    config = GRPOTrainer.config_class(**tiny.cpu_settings("out"))
    for data in (None, Dataset.from_dict({"environment": ["dice"] * 16}), rows()):
        check_inputs(config, {"train_dataset": data, "environment_factory": dict}, None)


def test_rollout_functions_may_take_prompts_of_any_form():
    config = GRPOTrainer.config_class(**tiny.cpu_settings("out"))
    data = Dataset.from_dict({"prompt": [[4, 5]] * 16})
    given = {"train_dataset": data, "reward_funcs": Judge(), "rollout_func": print}
    check_inputs(config, given, None)


def test_ppo_takes_ids_as_input_ids(tmp_path):
    data = Dataset.from_dict({"input_ids": [[4, 5], [6]] * 8})
    trainer = tiny.trainer(PPOTrainer, tmp_path, tiny.hashed, {"train_dataset": data})
    assert trainer.train_dataset[0]["prompt"] == "w0 w1"


PAIRS: dict[str, Any] = {
    "text": {"prompt": ["w1"], "chosen": [" w2"], "rejected": [" w3"]},
    "an empty answer": {"prompt": ["w1"], "chosen": [""], "rejected": [" w3"]},
    "no text in the prompt": {"prompt": [""], "chosen": ["w2"], "rejected": ["w3"]},
    "the prompt in both sides": {"chosen": ["w1 w2"], "rejected": ["w1 w3"]},
    "messages": {"prompt": messages("w1"), "chosen": messages("w2"), "rejected": messages("w3")},
    "messages with the prompt in both": {
        "chosen": [messages("w1")[0] + messages("w2")[0]],
        "rejected": [messages("w1")[0] + messages("w3")[0]],
    },
    "template arguments": {
        "prompt": messages("w1"),
        "chosen": messages("w2"),
        "rejected": messages("w3"),
        "chat_template_kwargs": [{"think": True}],
    },
    "more columns": {"prompt": ["w1"], "chosen": [" w2"], "rejected": [" w3"], "note": [None]},
}


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case, as_stream, tmp_path):
    data = Dataset.from_dict({name: values * 4 for name, values in PAIRS[case].items()})
    DPOTrainer(
        tiny.qwen2(),
        ref_model=tiny.qwen2(),
        args=DPOConfig(**tiny.pair_settings(tmp_path)),
        train_dataset=data.to_iterable_dataset() if as_stream else data,
        eval_dataset={"same": data},
        processing_class=tiny.tokenizer(),
    )


def test_pairs_with_images():
    data = Dataset.from_dict({**PAIRS["messages"], "images": [["x"]]})
    check_pairs("train_dataset", data)
    check_pairs("train_dataset", data.remove_columns(["chosen", "prompt"]), own_collator=True)


def test_some_rows_may_be_too_long(tmp_path):
    data = Dataset.from_dict({"prompt": ["w1", "w1 w2 w3"], "chosen": [" w2"] * 2, "rejected": [" w3"] * 2})
    trainer = DPOTrainer(
        tiny.qwen2(),
        ref_model=tiny.qwen2(),
        args=DPOConfig(**tiny.pair_settings(tmp_path, max_length=3)),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
    )
    assert len(trainer.train_dataset) == 1


@pytest.mark.parametrize("trainer_class", [PPOTrainer, DPOTrainer])
def test_the_reference_may_be_a_path(trainer_class, tmp_path):
    tiny.qwen2(seed=3).save_pretrained(tmp_path / "reference")
    given = {"ref_model": str(tmp_path / "reference")}
    if trainer_class is PPOTrainer:
        trainer = tiny.trainer(PPOTrainer, tmp_path, tiny.hashed, given)
    else:
        trainer = DPOTrainer(
            tiny.stopping(),
            args=DPOConfig(**tiny.pair_settings(tmp_path)),
            train_dataset=Dataset.from_dict({name: values * 4 for name, values in PAIRS["text"].items()}),
            processing_class=tiny.tokenizer(),
            **given,
        )
    theirs = tiny.weights(tiny.qwen2(seed=3))
    assert all(theirs[name].equal(weight) for name, weight in tiny.weights(trainer.ref_model).items())
