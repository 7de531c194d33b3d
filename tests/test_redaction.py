"""Access tokens stay at home: out of texts that are published, and out of files that are pickled."""

import os
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset

from trl_ext import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from trl_ext.redaction import redact


TOKEN = "hf_" + "aBcDeFgH" * 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--hub_token hf_x --seed 1", "--hub_token *** --seed 1"),
        ("--hub-token hf_x --seed 1", "--hub-token *** --seed 1"),
        ("--hub_token=hf_x", "--hub_token=***"),
        ("--hub-token=hf_x", "--hub-token=***"),
        (
            "env:\n  WANDB_API_KEY: abc\n  HF_TOKEN: hf_x\nseed: 0",
            "env:\n  WANDB_API_KEY: ***\n  HF_TOKEN: ***\nseed: 0",
        ),
        ("model_init_kwargs:\n  token: hf_x\nseed: 0", "model_init_kwargs:\n  token: ***\nseed: 0"),
        ("model_init_kwargs: {token: hf_x, dtype: auto}", "model_init_kwargs: {token: ***, dtype: auto}"),
        ('{"token": "hf_x", "dtype": "auto"}', '{"token": "***", "dtype": "auto"}'),
        (f"a note with {TOKEN} in it", "a note with *** in it"),
        ("hub_token:\nseed: 0", "hub_token:\nseed: 0"),
        ("eos_token: <|im_end|>\nmax_tokens: 5", "eos_token: <|im_end|>\nmax_tokens: 5"),
        ("one token a step, every token counts", "one token a step, every token counts"),
    ],
)
def test_texts(text, shown):
    assert redact(text) == shown


def test_values_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "nothing-to-see")
    monkeypatch.setenv("OTHER_TOKEN", "short")
    assert redact("called with nothing-to-see, in short") == "called with ***, in short"


@pytest.mark.parametrize("kind", [GRPOConfig, PPOConfig, DPOConfig])
def test_what_loggers_write_of_a_configuration(kind, tmp_path):
    given = {"token": TOKEN, "torch_dtype": "auto"}
    args = kind(str(tmp_path), use_cpu=True, bf16=False, hub_token=TOKEN, model_init_kwargs=given)
    for written in (args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict())):
        assert TOKEN not in written and "***" in written
    assert given == {"token": TOKEN, "torch_dtype": "auto"}
    assert args.model_init_kwargs["token"] == TOKEN and args.hub_token == TOKEN


def holds(folder: Path, secret: str) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("kind", [GRPOTrainer, PPOTrainer, DPOTrainer])
def test_nothing_that_a_trainer_writes_holds_a_token(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "before")
    policy = tmp_path / "policy"
    tiny.stopping().save_pretrained(policy)
    settings = {"hub_token": TOKEN, "model_init_kwargs": {"token": TOKEN}, "save_strategy": "steps", "save_steps": 1}
    if kind is DPOTrainer:
        rows = Dataset.from_dict({"prompt": ["w0 w1"] * 8, "chosen": [" w2"] * 8, "rejected": [" w3 w4"] * 8})
        args = DPOConfig(**tiny.pair_settings(tmp_path / "out", max_steps=1, **settings))
        trainer = DPOTrainer(str(policy), args=args, train_dataset=rows, processing_class=tiny.tokenizer())
    else:
        given = {"model": str(policy)}
        trainer = tiny.trainer(kind, tmp_path / "out", tiny.hashed, given, max_steps=1, num_iterations=1, **settings)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "training_args.bin").exists() and (tmp_path / "out" / "checkpoint-1").exists()
    assert holds(tmp_path / "out", TOKEN) == []
    # What the trainer uses is as it was
    assert trainer.args.hub_token == TOKEN and trainer.args.model_init_kwargs == {"token": TOKEN}
    assert os.environ["HF_TOKEN"] == TOKEN
    assert torch.load(tmp_path / "out" / "training_args.bin", weights_only=False).hub_token is None
