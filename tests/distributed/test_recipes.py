"""
The files for the machines that recipes are written for, loaded through Accelerate and DeepSpeed: on fewer processes,
without a GPU, one step of a tiny model.
"""

import math
import re
import shlex
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from processes import run
from safetensors.torch import load_file

import trl_ext
from trl_ext.run import arguments


ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("recipes_worker.py")
FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_for_its_machine(file):
    config = yaml.safe_load(file.read_text())
    assert config["num_processes"] == int(file.stem.split("x")[0])
    assert config["distributed_type"] == "DEEPSPEED"
    assert (ROOT / config["deepspeed_config"]["deepspeed_config_file"]).is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_memory_in_a_comment_adds_up(file):
    table = file.read_text().split("#   Base weights")[1].split(" of 79\n")[0]
    *parts, together = map(float, re.findall(r" (\d+\.\d)$", table, re.MULTILINE))
    assert len(parts) >= 8
    assert sum(parts) == pytest.approx(together, abs=0.05)


@pytest.mark.parametrize(
    ("file", "method"), [("2xa100_80g", "DPO"), ("4xa100_80g", "PPO")], ids=["2xa100_80g", "4xa100_80g"]
)
def test_the_command_in_a_comment_is_one(file, method, tmp_path):
    comment = [line.removeprefix("#") for line in (ROOT / f"recipes/accelerate/{file}.yaml").read_text().splitlines()]
    start = next(i for i, line in enumerate(comment) if "accelerate launch" in line)
    command = shlex.split(" ".join(comment[start : comment.index("", start)]).replace("\\", ""))
    assert command[:4] == ["accelerate", "launch", "--config_file", f"recipes/accelerate/{file}.yaml"]
    assert command[4] == f"recipes/{method.lower()}.py" and (ROOT / command[4]).is_file()
    script_class, config_class = getattr(arguments, f"{method}Arguments"), getattr(trl_ext, f"{method}Config")
    argv = [*command[5:], "--output_dir", str(tmp_path)]
    _, args, model_args, _ = arguments.parse_arguments(script_class, config_class, argv)
    assert (model_args.use_peft, model_args.lora_r, model_args.dtype) == (True, 16, "bfloat16")
    if method == "PPO":
        assert not args.ds3_gather_for_generation
        assert args.per_device_train_batch_size * args.steps_per_generation == 32  # generated at once


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("file", "method", "processes"), [("2xa100_80g", "dpo", 1), ("2xa100_80g", "dpo", 2), ("4xa100_80g", "ppo", 2)]
)
def test_a_tiny_model_takes_a_step(tmp_path: Path, file: str, method: str, processes: int) -> None:
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{file}.yaml").read_text())
    config |= {"num_processes": processes, "use_cpu": True}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    tiny.stopping().save_pretrained(tmp_path / "base")
    launch = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "accelerate.yaml"]
    # From where the files name each other
    run([*launch, WORKER, method, tmp_path], {"DS_ACCELERATOR": "cpu"}, cwd=ROOT)
    found = torch.load(tmp_path / "found.pt")
    assert (found["processes"], found["stage"], found["step"]) == (processes, 3, 1)
    assert found["live"] == 1.1e9  # of the file
    assert found["bf16"]  # the trainer's, where the file leaves it open
    assert found["sharded"]
    assert math.isfinite(found["log"]["loss"])
    assert found["log"]["grad_norm"] > 0
    adapter = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert any(weight.abs().sum() > 0 for name, weight in adapter.items() if "lora_B" in name)  # which starts at 0
