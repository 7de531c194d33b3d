"""
The files of `recipes/accelerate` and `recipes/deepspeed`: which job each of them is for, and their text, whose
comments are that job's plan. [`~trl_ext.planner.publish`] writes them.

A file is for a layout: other jobs that fit on it start with it, too. The numbers are those of the job that it names.
"""

import json
import shlex
import textwrap
from dataclasses import dataclass, field
from typing import Any

from .job import Job, roles_by_default
from .launch_files import accelerate_config, as_yaml, deepspeed_config, recipe_config, serve_words
from .layouts import GIB, find_layout
from .plan import Plan, make_plan
from .shapes import find_shape
from .speed import forecast, in_words, written
from .text import describe, table, verdict


WIDTH = 118
FIRST_HOST = "10.0.0.1"  # an address to be replaced
HOW_TO_WRITE = "python -m trl_ext.planner.publish"


@dataclass(frozen=True)
class LayoutFile:
    """
    A file of `recipes/accelerate`.

    Attributes:
        about (`str`):
            What it is for, and why so.
        method, model, layout (`str`):
            What is planned.
        settings (`dict`, *optional*):
            Further ones of [`Job`]. What they leave open, the plan chooses.
        deepspeed (`str`, *optional*):
            Its file of `recipes/deepspeed`, which several may have in common.
        beside (`dict`, *optional*):
            Other jobs whose numbers stand beside: what differs, in words, and the settings that do.
    """

    about: str
    method: str
    model: str
    layout: str
    settings: dict[str, Any] = field(default_factory=dict)
    deepspeed: str | None = None
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def job(self) -> Job:
        return job_by_default(self.method, self.model, self.layout, **self.settings)


OVER_FOUR = {
    "vllm_tensor_parallel_size": 4,
    "vllm_enable_sleep_mode": True,
    "vllm_gpu_memory_utilization": 0.5,
    "ds3_gather_for_generation": None,
}
LONG = {"prompt_tokens": 2048, "completion_tokens": 2048}
FILES: dict[str, LayoutFile] = {
    "1xa100_80g": LayoutFile(
        "PPO of a model of 33B parameters with all four roles on one GPU: the base in 4 bits, everything else by "
        "adapters and a head. DPO fits in bfloat16. One process: nothing is spread.",
        "ppo",
        "33b",
        "1xa100-80g",
        {"quantization": "4bit", "strategy": "none"},
        beside={
            "Base in bfloat16, as many completions at once": {"quantization": None},
            "Base in bfloat16, 2 completions at once": {"quantization": None, "gradient_accumulation_steps": 2},
            "DPO in bfloat16": {"method": "dpo", "quantization": None},
        },
    ),
    "2xa100_80g": LayoutFile(
        "DPO with LoRA of a model of 33B parameters on two GPUs, pairs of 4,096 tokens each: ZeRO-3, half of the base "
        "on each. With shorter pairs the whole base fits on each, and nothing has to be gathered.",
        "dpo",
        "33b",
        "2xa100-80g",
        LONG | {"strategy": "zero3"},
        "zero3",
        {
            "The whole base on each GPU (--num_processes 2 without this file)": {"strategy": "ddp"},
            "The same, pairs of 2,048 tokens": {"strategy": "ddp", "prompt_tokens": 1024, "completion_tokens": 1024},
            "PPO of 1,024 + 1,024 tokens with all four roles": {
                "method": "ppo",
                "prompt_tokens": 1024,
                "completion_tokens": 1024,
            },
        },
    ),
    "2xa100_80g_fsdp2": LayoutFile(
        "The same spread by FSDP2 instead of DeepSpeed: no file of its own, and a layer is gathered as it computes. "
        "Adapters are held, and stepped, in float32.",
        "dpo",
        "33b",
        "2xa100-80g",
        LONG | {"strategy": "fsdp2"},
        beside={"ZeRO-3, 2xa100_80g.yaml": {"strategy": "zero3"}},
    ),
    "2xa100_80g_pcie": LayoutFile(
        "PPO of a model of 33B parameters on two cards that only PCIe links. To generate, ZeRO-3 and FSDP2 gather the "
        "whole base for each token, and PCIe has a tenth of NVLink's bandwidth. In 4 bits each card holds the whole "
        "base, and only gradients of adapters go between them.",
        "ppo",
        "33b",
        "2xa100-80g-pcie",
        {"quantization": "4bit", "strategy": "ddp"},
        beside={
            "Base in bfloat16 under ZeRO-3": {"quantization": None, "strategy": "zero3"},
            "The same over NVLink": {"quantization": None, "strategy": "zero3", "layout": "2xa100-80g"},
        },
    ),
    "4xa100_80g": LayoutFile(
        "PPO of a model of 33B parameters with all four roles on one base and four GPUs: ZeRO-3, a quarter of the "
        "base on each. Generation decides, and takes most of the time: the base is gathered for each token, so that "
        "many completions at once pay. vLLM in the same processes has to share the four GPUs, and to get the adapter "
        "alone: TRL would gather the whole base to merge the adapter into it.",
        "ppo",
        "33b",
        "4xa100-80g",
        {"strategy": "zero3", "ds3_gather_for_generation": False},
        "zero3",
        {
            "The base gathered whole to generate (TRL's default)": {"ds3_gather_for_generation": True},
            "vLLM in the same processes, with all weights sent": {"vllm": "colocate"} | OVER_FOUR,
            "With the adapter alone sent": {"vllm": "colocate", "vllm_sync": "adapter"} | OVER_FOUR,
            "The whole base on each GPU, in 4 bits": {
                "quantization": "4bit",
                "strategy": "ddp",
            },
        },
    ),
    "4xa100_80g_fsdp2": LayoutFile(
        "DPO with LoRA of a model of 70B parameters on four GPUs, by FSDP2.",
        "dpo",
        "70b",
        "4xa100-80g",
        {"strategy": "fsdp2"},
        beside={"ZeRO-3": {"strategy": "zero3"}},
    ),
    "4xa100_80g_pcie": LayoutFile(
        "PPO of a model of 33B parameters on four GPUs, the base in 4 bits and whole on each, for cards that only "
        "PCIe links: what has to be gathered is the gradients of adapters. Beside it stands what a base that is "
        "spread takes, over PCIe and over NVLink.",
        "ppo",
        "33b",
        "4xa100-80g-pcie",
        {"quantization": "4bit", "strategy": "ddp"},
        beside={
            "Base in bfloat16 under ZeRO-3": {"quantization": None, "strategy": "zero3"},
            "The same over NVLink (4xa100_80g.yaml)": {
                "quantization": None,
                "strategy": "zero3",
                "layout": "4xa100-80g",
            },
        },
    ),
    "4xa100_80g_zero2": LayoutFile(
        "DPO of all weights of a model of 7B parameters on four GPUs. ZeRO-2: the weights fit on each GPU, so that "
        "only gradients and the optimizer's states are spread, and no pass waits for weights of other GPUs.",
        "dpo",
        "7b",
        "4xa100-80g",
        {"lora_r": 0, "strategy": "zero2"},
        "zero2",
        {"ZeRO-3": {"strategy": "zero3"}, "Everything on each GPU": {"strategy": "ddp"}},
    ),
    "4xa100_80g_offload": LayoutFile(
        "DPO of all weights of a model of 33B parameters on four GPUs: ZeRO-3, with the optimizer's states and its "
        "step in the host's memory. Watch what the host needs.",
        "dpo",
        "33b",
        "4xa100-80g",
        {"lora_r": 0, "strategy": "zero3", "offload": "optimizer"},
        "zero3_offload",
        {"Without offload": {"offload": "none"}},
    ),
    "4xa100_80g_vllm": LayoutFile(
        "DAPO of all weights of a model of 7B parameters on four GPUs, with vLLM in the same processes, asleep while "
        "the policy learns: ZeRO-2, so that weights are there to be handed over.",
        "dapo",
        "7b",
        "4xa100-80g",
        {
            "lora_r": 0,
            "strategy": "zero2",
            "vllm": "colocate",
            "vllm_enable_sleep_mode": True,
            "gradient_accumulation_steps": 32,
        },
        "zero2",
        {
            "Awake all the time": {"vllm_enable_sleep_mode": False},
            "Without vLLM": {"vllm": "none", "vllm_enable_sleep_mode": False},
        },
    ),
    "4xa100_80g_vllm_server": LayoutFile(
        "DAPO with LoRA of a model of 14B parameters on four GPUs: vLLM serves completions on two of them, and the "
        "policy learns on the other two, which the numbers are of.",
        "dapo",
        "14b",
        "2xa100-80g",
        {"strategy": "ddp", "vllm": "server", "vllm_tensor_parallel_size": 2, "gradient_accumulation_steps": 32},
        beside={"Without vLLM, on these two": {"vllm": "none", "vllm_tensor_parallel_size": 1}},
    ),
    "2x4xa100_80g": LayoutFile(
        "DPO with LoRA of a model of 70B parameters on two hosts with four GPUs each: ZeRO-3 over all eight. On the "
        "second host set machine_rank to 1; on both, main_process_ip to the first one's address. What else changes: "
        "weights are gathered over the network, whose bandwidth for a GPU is a twelfth of NVLink's. Passes of many "
        "tokens hide some of it. Generation by ZeRO-3 doesn't: PPO is better off on one host, in 4 bits, or "
        "with a vLLM server.",
        "dpo",
        "70b",
        "2x4xa100-80g",
        {"strategy": "zero3", **LONG},
        "zero3_70b",
        {
            "On one host with four": {"layout": "4xa100-80g"},
            "PPO of 1,024 + 1,024 tokens": {"method": "ppo", "prompt_tokens": 1024, "completion_tokens": 1024},
            "PPO in 4 bits under DDP": {
                "method": "ppo",
                "quantization": "4bit",
                "strategy": "ddp",
                "prompt_tokens": 1024,
                "completion_tokens": 1024,
            },
        },
    ),
}


def job_by_default(method: str, model: str, layout: str, **settings: Any) -> Job:
    """A job with the roles that its method has by default, by the names of its model and its layout."""
    roles = roles_by_default(method, is_full=settings.get("lora_r") == 0)
    return Job(method, find_shape(model), find_layout(layout), **{**roles, **settings})


def in_short(plan: Plan) -> str:
    """Memory and time of a plan, or what stands in its way."""
    if not plan.fits:
        return f"doesn't fit: {plan.obstacle}"
    found = forecast(plan.job)
    return (
        f"{plan.peak / GIB:.1f} GiB, decided by {plan.deciding.name}; a step {written(found['step_seconds'])}, "
        f"bottleneck {found['bottleneck']}"
    )


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH - 2, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def words_of_job(job: Job) -> list[str]:
    """The recipe's arguments on a command line."""
    words = []
    for name, value in recipe_config(job).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(one).lower() if isinstance(one, bool) else str(one) for one in values)]
    return words


def _command(words: list[str]) -> list[str]:
    """A command on several lines, each argument beside its name."""
    parts = [shlex.quote(words[0])]
    for word in words[1:]:
        if word.startswith("--"):
            parts.append(shlex.quote(word))
        else:
            parts[-1] += f" {shlex.quote(word)}"
    lines = [f"  {parts[0]}"]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 5 > WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return lines


def comments(name: str, plan: Plan) -> list[str]:
    """The plan of a file: what it is for, the command that starts it, its numbers, and those beside."""
    file, job = FILES[name], plan.job
    start = ["accelerate", "launch", "--config_file", f"recipes/accelerate/{name}.yaml", f"recipes/{job.method}.py"]
    lines = [*_wrapped(file.about), "", "From the root of the repository:", ""]
    if job.vllm == "server":
        lines += [*_command(["CUDA_VISIBLE_DEVICES=2,3", *serve_words(job)]), ""]
        start = ["CUDA_VISIBLE_DEVICES=0,1", *start]
    lines += [*_command([*start, *words_of_job(job)]), ""]
    lines += [line for text in describe(plan) for line in _wrapped(text)]
    lines += ["", *(f"  {line}".rstrip() for line in table(plan)), ""]
    lines += [line for text in [*verdict(plan, None, None), *in_words(forecast(job))] for line in _wrapped(text)]
    for what, changes in file.beside.items():
        lines += _wrapped(f"- {what}: {in_short(make_plan(_changed(file, changes)))}.", "  ")
    return [*lines, "", f"Planned, not measured on a GPU. Written by `{HOW_TO_WRITE}`."]


def _changed(file: LayoutFile, changes: dict[str, Any]) -> Job:
    named = {"method": file.method, "model": file.model, "layout": file.layout}
    return job_by_default(**{**named, **file.settings, **changes})


def accelerate_file(name: str) -> str:
    """The text of `recipes/accelerate/NAME.yaml`."""
    file = FILES[name]
    plan = make_plan(file.job)
    assert plan.fits, f"{name} is to be for a job that fits, but {plan.obstacle}"
    config = accelerate_config(plan.job, f"recipes/deepspeed/{file.deepspeed}.json")
    if file.job.layout.nodes > 1:
        config |= {"main_process_ip": FIRST_HOST, "main_process_port": 29500}
    return "".join(f"# {line}".rstrip() + "\n" for line in comments(name, plan)) + as_yaml(config)


def deepspeed_files() -> dict[str, str]:
    """The texts of `recipes/deepspeed` by name: of each, all jobs that share it want the same."""
    found: dict[str, str] = {}
    for name, file in FILES.items():
        if file.deepspeed is None:
            continue
        text = json.dumps(deepspeed_config(file.job), indent=2) + "\n"
        assert found.setdefault(file.deepspeed, text) == text, f"{name} wants another {file.deepspeed}.json"
    return found
