"""The DPO recipe, run as a user runs it, on the quickstart's task made small."""

import json
from pathlib import Path

import common
import dpo
import pytest
import sort_digits
from datasets import load_from_disk


ROOT = Path(common.__file__).parents[1]


@pytest.mark.parametrize("peft", ["true", "false"])
def test_it_reports_pairs_and_prompts_before_and_after(peft, tmp_path, monkeypatch):
    sizes = ["--sft_size", "8", "--train_size", "8", "--test_size", "40", "--pairs_size", "256"]
    monkeypatch.setattr("sys.argv", ["sort_digits.py", "--output_dir", str(tmp_path), *sizes])
    sort_digits.main()
    argv = [
        *("--config", str(ROOT / "recipes/configs/quickstart_dpo.yaml"), "--use_peft", peft),
        *("--model_name_or_path", str(tmp_path / "init"), "--dataset_name", str(tmp_path / "data")),
        *("--output_dir", str(tmp_path / "dpo"), "--max_steps", "6", "--eval_steps", "3"),
        *("--per_device_train_batch_size", "16", "--held_out_prompts", "8", "--held_out_samples", "2"),
        *("--reward_funcs", str(ROOT / "tests/tiny.py:first_token_even")),
    ]
    monkeypatch.setattr("sys.argv", ["dpo.py", *argv])
    dpo.main()
    summary = json.loads((tmp_path / "dpo" / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == ("DPO", 6)
    assert summary["before"]["pair_accuracy"] == 0 < summary["after"]["pair_accuracy"] <= 1
    for side in ("before", "after"):
        assert 0 < summary[side]["first_token_even"] < 1
        low, high = summary[side]["intervals"]["first_token_even"]
        assert low < high
    assert (tmp_path / "dpo" / ("adapter_model.safetensors" if peft == "true" else "model.safetensors")).is_file()
    assert (tmp_path / "dpo" / "README.md").is_file()


def test_a_stream(tmp_path, monkeypatch):
    """Nobody counts its pairs, and the model is there all the same."""
    sizes = ["--sft_size", "8", "--train_size", "8", "--test_size", "40", "--pairs_size", "256"]
    monkeypatch.setattr("sys.argv", ["sort_digits.py", "--output_dir", str(tmp_path), *sizes])
    sort_digits.main()
    for split in ("train", "test"):
        load_from_disk(str(tmp_path / "data"))["pairs"].to_json(tmp_path / f"files/{split}.jsonl")
    argv = [
        *("--config", str(ROOT / "recipes/configs/quickstart_dpo.yaml")),
        *("--model_name_or_path", str(tmp_path / "init"), "--dataset_name", str(tmp_path / "files")),
        *("--dataset_train_split", "train", "--dataset_test_split", "test", "--held_out_split", "test"),
        *("--output_dir", str(tmp_path / "dpo"), "--max_steps", "2", "--eval_steps", "2"),
        *("--per_device_train_batch_size", "16", "--held_out_prompts", "8", "--held_out_samples", "1"),
        *("--reward_funcs", str(ROOT / "tests/tiny.py:first_token_even"), "--dataset_streaming", "true"),
    ]
    monkeypatch.setattr("sys.argv", ["dpo.py", *argv])
    dpo.main()
    summary = json.loads((tmp_path / "dpo" / "summary.json").read_text())
    assert "pair_accuracy" not in summary["after"]
    assert summary["after"]["prompts"] == 8
