"""What is found of a machine: how a run is spread. CUDA is not read here, where there is none."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from trl_ext.planner.layouts import GIB, LAYOUTS
from trl_ext.run import machine
from trl_ext.run.machine import NotPlanned, Spread, found_spread


@dataclass
class Plugin:
    """What Accelerate's launcher leaves of a DeepSpeed file."""

    zero: dict[str, Any]
    deepspeed_config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.deepspeed_config = {"zero_optimization": self.zero}


@dataclass
class Arguments:
    deepspeed_plugin: Plugin | None = None
    fsdp_plugin_args: dict[str, Any] | None = None


@pytest.mark.parametrize(
    ("zero", "spread"),
    [
        ({"stage": 2}, Spread("zero2")),
        ({"stage": 3, "offload_optimizer": {"device": "none"}}, Spread("zero3")),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, Spread("zero2", "optimizer")),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
            Spread("zero3", "all"),
        ),
    ],
)
def test_deepspeed(zero, spread):
    assert found_spread(Arguments(Plugin(zero))) == spread


@pytest.mark.parametrize(
    ("zero", "why"),
    [
        ({"stage": 1}, "stage 1"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "NVMe"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "keeps the optimizer"),
    ],
)
def test_what_is_not_known_of_deepspeed(zero, why):
    with pytest.raises(NotPlanned, match=why):
        found_spread(Arguments(Plugin(zero)))


def test_fsdp_as_the_launcher_leaves_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NotPlanned, match="version 1"):
        found_spread(Arguments())
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert found_spread(Arguments()) == Spread("fsdp2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(NotPlanned, match="host's memory"):
        found_spread(Arguments())


def test_one_process_without_a_gpu():
    assert found_spread(Arguments()) == Spread("none")
    assert machine.own_gpu() is None and machine.found_layout() is None


def test_gpus_of_another_kind():
    """Their memory is CUDA's; their speed isn't known."""
    h200 = machine.layout_of("NVIDIA H200", 139 * GIB, gpus=8, nodes=2, host=1000 * GIB)
    assert (h200.gpus, h200.nodes, h200.gpus_per_node, h200.gpu_bytes) == (8, 2, 4, 139 * GIB)
    assert h200.name == "2 hosts with 4 x NVIDIA H200" and not machine.speeds_are_known(h200)
    a100 = machine.layout_of("NVIDIA A100-SXM4-80GB", 79 * GIB, gpus=1, nodes=1, host=100 * GIB)
    assert machine.speeds_are_known(a100) and machine.speeds_are_known(LAYOUTS["4xa100-80g"])


def test_a_container_has_what_it_may_use(tmp_path, monkeypatch):
    whole = machine.host_bytes()
    assert whole > 0
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.host_bytes() >= whole
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine.host_bytes() == 1000
