"""The command `trl-ext plan`: its arguments, and what it prints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..planner.job import (
    CRITICS,
    METHODS,
    OFFLOADS,
    QUANTIZATIONS,
    ROLES,
    STRATEGIES,
    VLLM_MODES,
    Job,
    roles_by_default,
)
from ..planner.launch_files import write_files
from ..planner.layouts import GIB, LAYOUTS, find_layout
from ..planner.plan import as_json, cheapest_change, largest_micro_batch, make_plan
from ..planner.shapes import SHAPES, find_shape
from ..planner.speed import forecast, in_words
from ..planner.states import OPTIMIZERS
from ..planner.text import describe, table, verdict
from ..trainers.engine_checks import VLLM_SYNCS
from .program import Parser, preparing


DOES_NOT_FIT = 1
NO_ROLE = ("none", "functions")


def plan_parser(program: str, description: str) -> Parser:
    """The arguments of `trl-ext plan`."""
    parser = Parser(program, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--method", required=True, choices=METHODS)
    add("--model", required=True, metavar="MODEL", help=f"{', '.join(SHAPES)}, or a folder with a config.json")
    add("--layout", required=True, metavar="LAYOUT", help=", ".join(LAYOUTS))
    add("--host_gib", type=float, metavar="GIB", help="memory of a host (default: 170 for each of its GPUs)")
    add("--strategy", choices=STRATEGIES, help="default: the fastest that fits")
    add("--roles", choices=ROLES, help="shared: one trunk (default); separate: a model for each role")
    add("--critic", choices=CRITICS)
    add("--critic_head", choices=("linear", "mlp"), default="linear")
    add("--reward", metavar="REWARD", help="functions, adapter, model, or the shape of a reward model")
    add("--reference", choices=("none", "adapter", "model"))
    add("--lora_r", type=int, default=16)
    add("--lora_target_modules", nargs="+", default=["all-linear"])
    add("--full", action="store_true", help="train all weights: no adapters")
    add("--quantization", choices=QUANTIZATIONS, help="of the base weights")
    add("--load_in_4bit", action="store_const", const="4bit", dest="quantization", help="--quantization 4bit")
    add("--prompt_tokens", type=int, default=1024)
    add("--completion_tokens", type=int, default=1024)
    add("--per_device_train_batch_size", "--batch", type=int, default=1)
    add("--gradient_accumulation_steps", type=int, default=8)
    add("--updates_per_generation", type=int, help="optimizer steps for which is generated at once (the method's)")
    add("--num_generations", type=int, default=8)
    add("--share_prefixes", action="store_true", help="the rows of a micro-batch have one prompt, computed once")
    add("--no_gradient_checkpointing", action="store_false", dest="gradient_checkpointing")
    add("--ds3_gather_for_generation", choices=("true", "false"), help="default: if it fits")
    add("--optimizer", choices=OPTIMIZERS, default="adamw")
    add("--offload", choices=OFFLOADS, default="none")
    add("--vllm", choices=VLLM_MODES, default="none")
    add("--vllm_gpu_memory_utilization", type=float, default=0.3)
    add("--vllm_tensor_parallel_size", type=int, default=1)
    add("--vllm_enable_sleep_mode", action="store_true")
    add("--vllm_sync", choices=VLLM_SYNCS, default="weights", help="what vLLM gets when the policy has changed")
    add("--dtype", choices=("bfloat16", "float32"))
    add("--json", action="store_true", help="print the plan as one JSON object")
    add("--picture", metavar="FILE", type=Path, help="draw the plan, as PNG")
    add("--write", metavar="DIR", type=Path, help="write the files that start it, if it fits")
    return parser


def _role(given: str | None, default: str | None) -> str | None:
    return default if given is None else None if given in NO_ROLE else given


def job_of(given: Any) -> Job:
    """
    The job that the arguments of `trl-ext plan` describe.

    Raises:
        UserError: if they can't go together.
    """
    is_full = given.full or given.lora_r == 0
    by_default = roles_by_default(given.method, given.roles, is_full)
    targets = given.lora_target_modules
    settings = (
        *("critic_head", "quantization", "prompt_tokens", "completion_tokens", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "updates_per_generation", "num_generations", "share_prefixes"),
        *("gradient_checkpointing", "optimizer"),
        *("offload", "vllm", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode"),
        *("vllm_sync", "strategy", "dtype"),
    )
    try:
        found = _role(given.reward, by_default["reward"])
        reward_model = None if found in (None, "adapter", "model") else find_shape(str(found), "reward")
        layout = find_layout(given.layout)
        if given.host_gib is not None:
            layout = replace(layout, host_bytes=int(given.host_gib * GIB))
        gather = given.ds3_gather_for_generation
        return Job(
            given.method,
            find_shape(given.model),
            layout,
            lora_r=0 if is_full else given.lora_r,
            lora_target_modules=targets[0] if targets == ["all-linear"] else tuple(targets),
            critic=given.critic or by_default["critic"],
            reward="model" if reward_model is not None else found,
            reward_model=reward_model,
            reference=_role(given.reference, by_default["reference"]),
            ds3_gather_for_generation=None if gather is None else gather == "true",
            **{name: getattr(given, name) for name in settings},
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def run_plan(given: Any) -> int:
    """
    Plan, and print, draw and write what is asked for.

    Returns:
        `int`: exit status, 0 if it fits and 1 if it doesn't.
    """
    plan = make_plan(job_of(given))
    largest = largest_micro_batch(plan.job) if plan.fits else 0
    change = None if plan.fits else cheapest_change(plan.job)
    times = forecast(plan.job)
    print("\n".join([*describe(plan), "", *table(plan), "", *verdict(plan, largest, change), *in_words(times)]))
    if given.picture is not None:
        from ..reports.plan_plot import plot_plan

        plot_plan(plan, given.picture, describe(plan)[0])
    if given.write is not None:
        if plan.fits:
            with preparing():
                print(f"Start it: {write_files(plan, given.write)}")
        else:
            print("Nothing was written: it doesn't fit.")
    if given.json:
        print(as_json(plan, largest, change, times))
    return 0 if plan.fits else DOES_NOT_FIT
