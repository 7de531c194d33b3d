"""Small jobs for the planner's tests."""

from pathlib import Path
from typing import Any

import tiny

from trl_ext.planner.job import METHODS, Job
from trl_ext.planner.layouts import GIB, Layout
from trl_ext.planner.shapes import Shape


SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 512}


def shape(**overrides: Any) -> Shape:
    return Shape("tiny", tiny.qwen2(**{**SHAPE, **overrides}).config)


def folder(path: Path, **overrides: Any) -> Path:
    """A folder with a configuration and no weights."""
    tiny.qwen2(**{**SHAPE, **overrides}).config.save_pretrained(path)
    return path


def layout(gpus: int = 1, gib: float = 1.2, nodes: int = 1) -> Layout:
    """GPUs of which CUDA leaves little."""
    return Layout(f"{gpus} small", gpus, nodes, gpu_bytes=int(gib * GIB))


def job(method: str = "ppo", **settings: Any) -> Job:
    """With a head as critic and a reference by adapter switch, on one small GPU."""
    roles = {"critic": "head" if METHODS[method].critic else None, "reference": "adapter"}
    sizes = {"prompt_tokens": 32, "completion_tokens": 32, "gradient_accumulation_steps": 2}
    given = {"model": shape(), "layout": layout(), "strategy": "none", **roles, **sizes, **settings}
    return Job(method, **given)
