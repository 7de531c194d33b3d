"""A dry run under the launcher, spread by ZeRO-3: the first process plans, as in a process of its own, and speaks."""

from pathlib import Path

import pytest
import trl
import yaml
from datasets import Dataset
from processes import run
from run.weightless import without_weights


ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
def test_two_processes_speak_once(tmp_path: Path) -> None:
    config = yaml.safe_load((Path(trl.__file__).parent / "accelerate_configs" / "zero3.yaml").read_text())
    file = tmp_path / "zero3.yaml"
    file.write_text(yaml.safe_dump(config | {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}))
    rows = {"prompt": ["s12="] * 16, "chosen": ["12"] * 16, "rejected": ["1"] * 16}
    Dataset.from_dict(rows).to_json(tmp_path / "pairs.jsonl")
    model = without_weights(tmp_path / "model", vocab_size=32)
    launch = ["-m", "accelerate.commands.launch", "--config_file", file, ROOT / "recipes" / "dpo.py"]
    words = ["--model_name_or_path", model, "--dataset_name", tmp_path / "pairs.jsonl", "--report_to", "none"]
    words += ["--output_dir", tmp_path / "out", "--layout", "4xa100-80g", "--dry_run"]
    said = run([*launch, *words], {"DS_ACCELERATOR": "cpu"})
    assert said.count("Dry run: ") == said.count("All is well.") == 1
    assert "DPO of" in said and "on 4xa100-80g" in said and "zero3" in said
    assert not (tmp_path / "out").exists()
