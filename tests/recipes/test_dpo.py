"""The DPO recipe, run as a user runs it, on the quickstart's task made small."""

import json

import pytest
import quickstart
from datasets import load_from_disk


pytestmark = pytest.mark.train
ROOT = quickstart.ROOT


@pytest.mark.parametrize("peft", ["true", "false"])
def test_it_reports_pairs_and_prompts_before_and_after(peft, task, tmp_path):
    argv = [
        *("--config", str(ROOT / "recipes/configs/quickstart_dpo.yaml"), "--use_peft", peft),
        *("--model_name_or_path", str(task / "init"), "--dataset_name", str(task / "data")),
        *("--output_dir", str(tmp_path / "dpo"), "--max_steps", "6", "--eval_steps", "3"),
        *("--per_device_train_batch_size", "16", "--held_out_prompts", "8", "--held_out_samples", "2"),
        *("--reward_funcs", str(ROOT / "tests/tiny.py:first_token_even")),
    ]
    quickstart.start("dpo", argv)
    summary = json.loads((tmp_path / "dpo" / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == ("DPO", 6)
    assert summary["before"]["pair_accuracy"] == 0 < summary["after"]["pair_accuracy"] <= 1
    for side in ("before", "after"):
        assert 0 < summary[side]["first_token_even"] < 1
        low, high = summary[side]["intervals"]["first_token_even"]
        assert low < high
    assert (tmp_path / "dpo" / ("adapter_model.safetensors" if peft == "true" else "model.safetensors")).is_file()
    assert (tmp_path / "dpo" / "README.md").is_file()


def test_a_stream(task, tmp_path):
    """Nobody counts its pairs, and the model is there all the same."""
    for split in ("train", "test"):
        load_from_disk(str(task / "data"))["pairs"].to_json(tmp_path / f"files/{split}.jsonl")
    argv = [
        *("--config", str(ROOT / "recipes/configs/quickstart_dpo.yaml")),
        *("--model_name_or_path", str(task / "init"), "--dataset_name", str(tmp_path / "files")),
        *("--dataset_train_split", "train", "--dataset_test_split", "test", "--held_out_split", "test"),
        *("--output_dir", str(tmp_path / "dpo"), "--max_steps", "2", "--eval_steps", "2"),
        *("--per_device_train_batch_size", "16", "--held_out_prompts", "8", "--held_out_samples", "1"),
        *("--reward_funcs", str(ROOT / "tests/tiny.py:first_token_even"), "--dataset_streaming", "true"),
    ]
    quickstart.start("dpo", argv)
    summary = json.loads((tmp_path / "dpo" / "summary.json").read_text())
    assert "pair_accuracy" not in summary["after"]
    assert summary["after"]["prompts"] == 8
