"""What a policy wrote: every prompt with its own texts, kept at each measurement, and compared."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import TrainerControl

from trl_ext import DAPOTrainer
from trl_ext.evaluation.held_out import HeldOut, evaluate_policy
from trl_ext.evaluation.held_out_texts import (
    PromptTexts,
    changes,
    plain_text,
    read_texts,
    texts_of,
    write_texts,
)


def rollout(prompt, completion) -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, completion=completion)


def test_each_prompt_has_its_own_texts():
    rollouts = [rollout(f"p{i}", f"c{i}{j}") for i in range(3) for j in range(2)]
    rewards = torch.tensor([[[1.0, math.nan], [0.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0]]])
    scored = SimpleNamespace(rollouts=rollouts, rewards=rewards, reward_func_names=["a", "b"])
    first, second = texts_of(scored, 2)
    assert first == PromptTexts("p0", ["c00", "c01"], {"a": [1.0, 0.0], "b": [None, 2.0]})
    assert second == PromptTexts("p1", ["c10", "c11"], {"a": [3.0, 5.0], "b": [4.0, 6.0]})
    assert (first.mean("a"), first.mean("b"), first.mean("c")) == (0.5, 2.0, None)
    assert [second.typical("a"), first.typical("b")] == [0, 1]


def test_conversations_are_read_as_text():
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": None}]
    assert plain_text(messages) == "user: 2+2?\nassistant: "
    parts = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    assert plain_text([{"role": "user", "content": parts}]) == "user: [image] what is it?"
    assert plain_text("plain") == "plain"


def test_a_measurement_takes_the_place_of_itself(tmp_path):
    """Lines end where JSON ends, whatever separators a completion has."""
    file = tmp_path / "new/texts.jsonl"
    odd = PromptTexts("a\u2028b\n", ["\x85", "\r\n"], {"r": [1.0, None]})
    write_texts(file, 4, [odd])
    write_texts(file, 0, [odd, odd])
    write_texts(file, 4, [odd, odd, odd])
    assert {step: len(texts) for step, texts in read_texts(file).items()} == {0: 2, 4: 3}
    assert list(read_texts(file)) == [0, 4] and read_texts(file)[4][2] == odd
    assert read_texts(tmp_path / "none") == {}


def test_changes_pair_the_prompts():
    before = [PromptTexts(f"p{i}", [f"b{i}", "x"], {"r": [float(i), float(i)]}) for i in range(4)]
    after = [PromptTexts(f"p{i}", ["y", f"a{i}"], {"r": [0.0, 2.0]}) for i in range(4)]
    after[3] = PromptTexts("another", ["y"], {"r": [9.0]})
    found = changes(before, after, "r")
    assert [(change.prompt, change.gain) for change in found] == [("p0", 1.0), ("p1", 0.0), ("p2", -1.0)]
    assert (found[0].before, found[0].after) == ("b0", "y")  # both rewards are as far from the mean: the first one
    assert changes(before, after, "none") == []


@pytest.mark.train
def test_a_run_keeps_what_it_measured(tmp_path):
    """Prompts and completions are those that were scored, and the means are those of the estimates."""
    trainer, rows = tiny.trainer(DAPOTrainer, tmp_path / "out"), list(tiny.prompts(10))
    callback = HeldOut(trainer, rows, num_samples=4, batch_size=4, texts=tmp_path / "texts.jsonl")
    trainer.add_callback(callback)
    trainer.train()
    found = read_texts(tmp_path / "texts.jsonl")
    assert list(found) == [0, 2]
    for step, texts in found.items():
        assert [one.prompt for one in texts] == [row["prompt"] for row in rows]
        (name, estimate), *_ = callback.measured[step].items()
        assert [one.mean(name) for one in texts] == pytest.approx(estimate.per_prompt)
        assert all(len(one.completions) == 4 for one in texts)
        assert len({text for one in texts for text in one.completions}) > 10
    # A second measurement of the same policy, as after a resume
    callback.on_train_end(trainer.args, trainer.state, TrainerControl())
    assert read_texts(tmp_path / "texts.jsonl") == found


def test_only_the_first_prompts_are_kept(tmp_path):
    trainer, texts = tiny.trainer(DAPOTrainer, tmp_path), []
    evaluate_policy(trainer, list(tiny.prompts(70)), num_samples=1, batch_size=33, texts=texts)
    assert [one.prompt for one in texts] == [row["prompt"] for row in tiny.prompts(64)]
