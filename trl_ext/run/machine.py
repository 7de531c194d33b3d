"""
What a run is about to use, before a model is loaded: the GPUs that CUDA reports, and how Accelerate spreads the run
over them.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from transformers.integrations import set_hf_deepspeed_config

from ..planner.job import OFFLOADS
from ..planner.layouts import LAYOUTS, Layout
from ..planner.phases import CUDA_BYTES


DATA_SHEET = "A100"  # of which GPUs the layouts hold the speeds
CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may use of its host


class NotPlanned(Exception):
    """What the planner doesn't know of a run. It stops none."""


@dataclass(frozen=True)
class Spread:
    """
    How a run is spread over processes.

    Attributes:
        strategy (`str`, *optional*):
            One of [`~trl_ext.planner.job.STRATEGIES`]. `None`: the planner chooses.
        offload (`str`):
            One of [`~trl_ext.planner.job.OFFLOADS`].
    """

    strategy: str | None = None
    offload: str = OFFLOADS[0]


def give_back_deepspeed(training_args: Any) -> None:
    """Makes the DeepSpeed configuration of a run the one that transformers builds models with, if it has one."""
    plugin = training_args.deepspeed_plugin
    kept = getattr(training_args, "hf_deepspeed_config", None) or getattr(plugin, "dschf", None)
    if kept is not None:
        set_hf_deepspeed_config(kept)


def own_gpu() -> tuple[str, int] | None:
    """
    The name of this process's GPU, and the bytes that the process can have of it: those that are free, and what it
    holds itself since CUDA has started, which plans count. `None` without CUDA.
    """
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.get_device_name(), int(min(total, free + CUDA_BYTES))


def host_bytes() -> int:
    """The memory of this host, or of the container that this process runs in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else ""
    return min(total, int(limit)) if limit.isdigit() else total


def layout_of(name: str, gpu_bytes: int, gpus: int, nodes: int, host: int) -> Layout:
    """
    A layout of GPUs as CUDA reports them. Speeds are an A100's: of other kinds, only the memory is planned.

    Args:
        name (`str`):
            Of a GPU.
        gpu_bytes (`int`):
            What a process can have of the GPU that has least.
        gpus, nodes (`int`):
            GPUs of all hosts together, and hosts.
        host (`int`):
            Bytes of a host's memory.
    """
    shown = f"{gpus} x {name}" if nodes == 1 else f"{nodes} hosts with {gpus // nodes} x {name}"
    like = next(iter(LAYOUTS.values()))
    return replace(like, name=shown, gpus=gpus, nodes=nodes, gpu_bytes=gpu_bytes, host_bytes=host)


def speeds_are_known(layout: Layout) -> bool:
    """Whether a layout's speeds are those of its GPUs."""
    return layout.name in LAYOUTS or DATA_SHEET in layout.name


def found_layout() -> Layout | None:
    """The GPUs of all processes, of which each has one; the same answer in all of them. `None` without GPUs."""
    state: Any = PartialState()
    if state.device.type != "cuda":
        return None
    found = [gpu for gpu in gather_object([own_gpu()]) if gpu is not None]
    names, sizes = zip(*found, strict=True)
    gpus = state.num_processes
    nodes = max(1, gpus // int(os.environ.get("LOCAL_WORLD_SIZE", gpus)))
    return layout_of(" or ".join(dict.fromkeys(names)), min(sizes), gpus, nodes, host_bytes())


def found_spread(training_args: Any) -> Spread:
    """
    How Accelerate's launcher and the arguments spread a run.

    Raises:
        NotPlanned: for a way that the planner doesn't know.
    """
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise NotPlanned("the run has a parallelism configuration (tensor, context or sequence parallelism)")
    plugin = training_args.deepspeed_plugin
    if plugin is not None:
        return _of_deepspeed(plugin.deepspeed_config.get("zero_optimization", {}))
    fsdp = training_args.fsdp_plugin_args or {}
    if fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        version = int(fsdp.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1"))
        if version != 2:
            raise NotPlanned("FSDP of version 1 spreads the run; FSDP2 is known")
        if fsdp.get("cpu_offload") or parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
            raise NotPlanned("FSDP2 keeps weights in the host's memory")
        return Spread("fsdp2")
    state: Any = PartialState()
    return Spread("ddp" if state.num_processes > 1 else "none")


def _of_deepspeed(zero: dict[str, Any]) -> Spread:
    stage = int(zero.get("stage", 0))
    if stage not in (2, 3):
        raise NotPlanned(f"DeepSpeed's ZeRO is at stage {stage}; 2 and 3 are known")
    where = {part: (zero.get(f"offload_{part}") or {}).get("device") for part in ("optimizer", "param")}
    if "nvme" in where.values():
        raise NotPlanned("DeepSpeed offloads to NVMe")
    offloads = {part for part, device in where.items() if device == "cpu"}
    if offloads == {"param"}:
        raise NotPlanned("DeepSpeed offloads weights and keeps the optimizer on the GPU")
    return Spread(f"zero{stage}", "all" if "param" in offloads else "optimizer" if offloads else "none")
