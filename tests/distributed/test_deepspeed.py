"""
Selection with DeepSpeed ZeRO, under which the rounds of a refill generate with gathered weights. The first run on a
machine compiles DeepSpeed's operators, which takes a minute.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from safetensors.torch import load_file


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("deepspeed_worker.py")


def launch(tmp_path: Path, stage: int, selection: str, checkpoint: Path | None = None) -> dict[str, Any]:
    """Trains and returns what the worker saved. TRL's own configuration, on two processes without a GPU."""
    config = yaml.safe_load((Path(trl.__file__).parent / "accelerate_configs" / f"zero{stage}.yaml").read_text())
    config |= {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    file = tmp_path / f"zero{stage}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = ["-m", "accelerate.commands.launch", "--config_file", file, WORKER, tmp_path, selection]
    # DeepSpeed looks for ninja and its own programs beside the interpreter
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    run = subprocess.run(
        [sys.executable, *map(str, command), *([str(checkpoint)] if checkpoint else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    target = tmp_path / ("resumed" if checkpoint else "whole")
    result: dict[str, Any] = torch.load(target / "result.pt")
    assert result["stage"] == stage
    assert result["rewards"].shape == (3, 2, 2)  # prompts, completions, the reward and the overlong punishment
    return result | {"weights": load_file(target / "model.safetensors")}


def test_zero_3_refills_and_resumes(tmp_path: Path) -> None:
    whole = launch(tmp_path, 3, "refill")
    assert whole["counters"]["generation_rounds"] > 3  # three steps, and rounds beside them
    resumed = launch(tmp_path, 3, "refill", tmp_path / "checkpoint-2")
    assert resumed["counters"] == whole["counters"]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight)
    assert torch.equal(resumed["rewards"], whole["rewards"])


def test_zero_2_duplicates(tmp_path: Path) -> None:
    result = launch(tmp_path, 2, "duplicate")
    assert result["counters"]["generation_rounds"] == 3
