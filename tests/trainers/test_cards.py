"""Model cards: what they say is so, and their example runs as it is written."""

import re
import sys
from pathlib import Path

import pytest
import quickstart
import tiny
import trl
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import Qwen2Config, Qwen2ForSequenceClassification
from trl.trainer.utils import generate_model_card

import trl_ext
from trl_ext.run.supervised import RewardTrainer, SFTTrainer
from trl_ext.trainers.cards import CardFacts, as_written, base_of, completed, example_of


sys.path.insert(0, str(quickstart.RECIPES / "tasks"))
import sort_digits


PAIRS = [{"prompt": f"s{i}1=", "chosen": f"1{i}", "rejected": "9"} for i in range(2, 9)]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def card(facts: CardFacts, base_model: str | None = None, dataset: str | None = None) -> ModelCard:
    text = generate_model_card(base_model, "tiny", None, dataset, [], None, None, "GRPO", trainer_citation="")
    return ModelCard(completed(str(text), facts))


def trained(kind: str, folder: Path, adapter: bool, chat: bool):
    """A trainer whose model was never trained, in a folder of its own."""
    settings = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none"}
    tokenizer = sort_digits.build_tokenizer()
    base = sort_digits.build_model(tokenizer, seed=0)
    if kind == "reward":
        base = Qwen2ForSequenceClassification(Qwen2Config(**base.config.to_dict() | {"num_labels": 1}))
    base.save_pretrained(folder.parent / "base")
    tokenizer.save_pretrained(folder.parent / "base")
    tokenizer.chat_template = tiny.tokenizer().chat_template if chat else None
    given = {"model": str(folder.parent / "base"), "processing_class": tokenizer}
    given["peft_config"] = tiny.lora(task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM") if adapter else None
    given["train_dataset"] = Dataset.from_list(PAIRS)
    if kind == "grpo":
        sampling = trl_ext.GRPOConfig(**settings, num_generations=2, per_device_train_batch_size=4)
        return trl_ext.GRPOTrainer(reward_funcs=tiny.first_token_even, args=sampling, **given)
    if kind == "dpo":
        return trl_ext.DPOTrainer(args=trl_ext.DPOConfig(**settings), **given)
    if kind == "reward":
        return RewardTrainer(args=trl.RewardConfig(**settings), **given)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    return SFTTrainer(args=trl.SFTConfig(**settings), **given | {"train_dataset": Dataset.from_list(rows)})


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("kind", ["grpo", "dpo", "reward", "sft"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_the_example_runs_as_written(kind, adapter, chat, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer = trained(kind, tmp_path / "model", adapter, chat)
    trainer.save_model(str(tmp_path / "model"))
    trainer.create_model_card(model_name="tiny")
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    found = ModelCard(text).data
    assert found.library_name == ("peft" if adapter else "transformers")
    assert found.pipeline_tag == ("text-classification" if kind == "reward" else "text-generation")
    assert "None" not in text and "licence" not in text
    assert ("question =" in text) == (chat and kind != "reward")
    capsys.readouterr()
    exec(PYTHON.search(text)[1], {})
    said = capsys.readouterr().out.strip()
    assert set(said) <= set(sort_digits.CHARACTERS) if kind != "reward" else float(said)


def test_what_the_hub_reads():
    data = card(
        CardFacts("me/mine", False, False, base_model="org/base", metrics={"right": 0.5}), dataset="org/rows"
    ).data
    assert (data.base_model, data.datasets, data.get("licence")) == ("org/base", "org/rows", None)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("right", 0.5, "org/rows")
    nothing = card(CardFacts("mine", False, False)).data
    assert nothing.base_model is None and not nothing.eval_results


def test_hub_ids_stay_and_none_is_said_in_words():
    text = str(card(CardFacts("me/mine", False, True), base_model="org/base"))
    assert "[org/base](https://huggingface.co/org/base)" in text and 'model="me/mine"' in text
    text = str(card(CardFacts("mine", False, True)))
    assert "None" not in text and "fine-tuned version of a model without a Hub id." in text
    text = str(card(CardFacts("mine", False, True, base_model="org/base")))  # that of the folder it came from
    assert "fine-tuned version of [org/base](https://huggingface.co/org/base)." in text


def test_where_a_folder_came_from(tmp_path):
    assert base_of("") is None and base_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nbase_model: org/base\n---\n\nText")
    assert base_of(str(tmp_path)) == "org/base"


def test_folders_are_named_without_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert as_written(Path("runs/a")) == as_written(tmp_path / "runs" / "a") == "runs/a"
    assert as_written(tmp_path.parent / "b") == "b"


def test_examples_of_data_sets():
    tokenizer = tiny.tokenizer()
    assert example_of(tiny.prompts(), tokenizer) == "w0 w0"
    assert example_of(Dataset.from_dict({"prompt_ids": [[4, 5]]}), tokenizer) == "w0 w1"
    assert example_of(tiny.prompts(conversational=True), tokenizer) == "w0 w0"  # of a conversation, what was asked
    for nothing in (
        None,
        Dataset.from_list([{"prompt": [{"role": role, "content": "w1"} for role in ("system", "user")]}]),
        tiny.prompts().to_iterable_dataset(),
        Dataset.from_dict({}),
    ):
        assert example_of(nothing, tokenizer) == "The capital of France is"


def test_a_chat_model_is_asked_what_it_was_trained_on():
    asked = str(card(CardFacts("mine", False, True, example='What is "1 + 1"?\nSay it.')))
    assert 'question = "What is \\"1 + 1\\"?\\nSay it."' in asked
    assert 'question = "If you had a time machine' in str(card(CardFacts("mine", False, True)))
