"""
The files for the machines that recipes are written for, loaded through Accelerate and DeepSpeed: on fewer processes,
without a GPU, one step of a tiny model. `make test-distributed` starts all of them; `make test` one of each kind that
starts processes quickly.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from processes import free_port, run
from safetensors.torch import load_file

from trl_ext.planner.launch_files import deepspeed_config
from trl_ext.planner.layout_files import FILES


ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("recipes_worker.py")
KINDS = {"none": "NO", "ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
OFTEN = ("2xa100_80g", "4xa100_80g", "2xa100_80g_fsdp2")


def a_step(tmp_path: Path, name: str, processes: int) -> dict[str, Any]:
    """With the file as it is, but for the number of processes and the device."""
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{name}.yaml").read_text())
    config |= {"num_processes": processes, "num_machines": 1, "use_cpu": True}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    tiny.stopping().save_pretrained(tmp_path / "base")
    launch = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "accelerate.yaml"]
    # From where the files name each other
    run([*launch, WORKER, name, tmp_path], {"DS_ACCELERATOR": "cpu"}, cwd=ROOT)
    found: dict[str, Any] = torch.load(tmp_path / "found.pt")
    return found


def check(tmp_path: Path, name: str, processes: int) -> None:
    found, job = a_step(tmp_path, name, processes), FILES[name].job
    assert (found["processes"], found["step"]) == (processes, 1)
    # On a CPU, Accelerate calls DDP MULTI_CPU
    assert found["kind"].replace("CPU", "GPU") == KINDS[str(job.strategy)]
    if job.is_deepspeed:
        wanted = deepspeed_config(job)["zero_optimization"]
        assert {key: found["zero"][key] for key in wanted} == wanted
    assert found["bf16"] in (True, "bf16")  # the trainer's, where the file leaves it open
    assert found["sharded"] == (job.strategy == "zero3")
    assert found["fsdp"] == (job.strategy == "fsdp2")
    assert found["host_optimizer"] == (job.offload != "none")
    assert math.isfinite(found["log"]["loss"])
    assert found["log"]["grad_norm"] > 0
    if not job.is_full:
        adapter = load_file(tmp_path / "trained" / "adapter_model.safetensors")
        assert any(weight.abs().sum() > 0 for key, weight in adapter.items() if "lora_B" in key)  # which starts at 0


@pytest.mark.distributed
@pytest.mark.parametrize("name", OFTEN)
def test_a_tiny_model_takes_a_step(tmp_path, name):
    check(tmp_path, name, 2)


@pytest.mark.distributed
@pytest.mark.engines
@pytest.mark.parametrize("name", [name for name in FILES if name not in OFTEN])
def test_a_tiny_model_takes_a_step_with_every_other_file(tmp_path, name):
    check(tmp_path, name, min(2, FILES[name].job.layout.gpus))


@pytest.mark.distributed
@pytest.mark.engines
def test_two_launchers_as_on_two_hosts(tmp_path):
    """As docs/launching.md has it: one command, with the number of the host and the first one's address."""
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / "2x4xa100_80g.yaml").read_text())
    assert config["num_machines"] == 2
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config | {"num_processes": 2, "use_cpu": True}))
    tiny.stopping().save_pretrained(tmp_path / "base")
    # Accelerate's own launcher, which the tests' stand-in for one machine isn't
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "accelerate.yaml"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    printed = [tmp_path / f"host_{rank}.txt" for rank in range(2)]
    hosts = []
    try:
        for rank, file in enumerate(printed):
            command = [*launch, "--machine_rank", str(rank), WORKER, "2x4xa100_80g", tmp_path]
            with file.open("w") as output:
                hosts.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
        for host, file in zip(hosts, printed, strict=True):
            assert host.wait(timeout=300) == 0, file.read_text()
    finally:
        for host in hosts:
            host.kill()
    found = torch.load(tmp_path / "found.pt")
    assert (found["processes"], found["step"], found["sharded"]) == (2, 1, True)
