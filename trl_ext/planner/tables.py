"""
The tables of `docs/launching.md`: what fits where, by method, size and layout; and goals of fit, each with its answer.
[`~trl_ext.planner.publish`] writes them.
"""

from dataclasses import dataclass, field
from typing import Any

from .job import METHODS, Job
from .layout_files import job_by_default
from .layouts import GIB
from .plan import COMFORT, Plan, make_plan
from .speed import forecast, written


SHOWN, MODELS = ("ppo", "dpo", "dapo"), ("7b", "14b", "33b", "70b")
LAYOUTS = ("1xa100-80g", "2xa100-80g", "4xa100-80g")
CELLS = [(method, model, layout) for method in SHOWN for model in MODELS for layout in LAYOUTS]
MOST = 64  # completions at once that are asked for


@dataclass(frozen=True)
class Goal:
    """Something that is wanted to fit: in words, and as a job."""

    words: str
    method: str
    model: str
    layout: str
    settings: dict[str, Any] = field(default_factory=dict)


def _tokens(each: int) -> dict[str, int]:
    return {"prompt_tokens": each, "completion_tokens": each}


GOALS = [
    Goal("PPO of 33B, four roles, LoRA in bfloat16, 2k + 2k", "ppo", "33b", "2xa100-80g", _tokens(2048)),
    Goal("PPO of 33B, four roles, LoRA in bfloat16, 1k + 1k", "ppo", "33b", "1xa100-80g", _tokens(1024)),
    Goal(
        "PPO of 33B, four roles, 4 bits, 4k + 4k", "ppo", "33b", "1xa100-80g", _tokens(4096) | {"quantization": "4bit"}
    ),
    Goal("the first, of 32B with Qwen2.5's shape", "ppo", "32b", "2xa100-80g", _tokens(2048)),
    Goal("the second, of 32B", "ppo", "32b", "1xa100-80g", _tokens(1024)),
    Goal("the third, of 32B", "ppo", "32b", "1xa100-80g", _tokens(4096) | {"quantization": "4bit"}),
    Goal("DPO of 33B, LoRA in bfloat16, 1k + 1k", "dpo", "33b", "1xa100-80g", _tokens(1024)),
    Goal(
        "PPO of 70B, four roles, 4 bits, 1k + 1k", "ppo", "70b", "1xa100-80g", _tokens(1024) | {"quantization": "4bit"}
    ),
    Goal("PPO of 70B, four roles, LoRA in bfloat16, 1k + 1k", "ppo", "70b", "4xa100-80g", _tokens(1024)),
    Goal(
        "DPO of 33B, all weights, optimizer in the host's memory, 1k + 1k",
        "dpo",
        "33b",
        "4xa100-80g",
        _tokens(1024) | {"lora_r": 0, "offload": "optimizer"},
    ),
    Goal(
        "PPO of 33B, four models, all weights, 1k + 1k",
        "ppo",
        "33b",
        "2xa100-80g",
        _tokens(1024) | {"lora_r": 0, "critic": "model"},
    ),
]


def _size(plan: Plan) -> str:
    return f"{plan.peak / GIB:.1f}"


def _size_and_way(plan: Plan) -> str:
    """What a GPU takes, and how the job is spread."""
    spread = f" {plan.job.strategy}" if plan.job.strategy != "none" else ""
    return f"**{_size(plan)}**{spread}" if plan.fits else f"{_size(plan)}{spread}"


def _bottleneck(plan: Plan) -> str:
    return str(forecast(plan.job)["bottleneck"]).replace(", by ", " by ")


def cell(method: str, model: str, layout: str) -> str:
    """
    Whether a method fits with the defaults of `trl-ext plan`, one step a generation, and in 4 bits where it doesn't
    otherwise.
    """
    once = {"updates_per_generation": 1} if METHODS[method].samples else {}
    plan = make_plan(job_by_default(method, model, layout, **once))
    if plan.fits:
        return f"{_size_and_way(plan)}; {_bottleneck(plan)}"
    less = make_plan(job_by_default(method, model, layout, quantization="4bit", **once))
    instead = f"in 4 bits {_size_and_way(less)}; {_bottleneck(less)}" if less.fits else "nor in 4 bits"
    return f"no, {_size(plan)}: {plan.deciding.dominated_by}; {instead}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(names: list[str]) -> list[str]:
    return [_row(names), _row(["---"] * len(names))]


def what_fits() -> str:
    """The table of all [`CELLS`]."""
    lines = _head(["method", "model", *LAYOUTS])
    for method in SHOWN:
        for model in MODELS:
            lines.append(_row([method, model, *(cell(method, model, layout) for layout in LAYOUTS)]))
    return "\n".join(lines)


def _leaves_room(plan: Plan) -> bool:
    return plan.fits and plan.free >= COMFORT


def most_at_once(job: Job) -> int:
    """The most completions at once, micro-batches of one, that leave a tenth of a GPU free. 0: not even one."""
    low, high = 0, MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        changed = job.but(per_device_train_batch_size=1, gradient_accumulation_steps=middle)
        low, high = (middle, high) if _leaves_room(make_plan(changed)) else (low, middle)
    return low


def goal_row(goal: Goal) -> list[str]:
    """A goal, the answer, and the numbers of what fits, or of what stands in the way."""
    job = job_by_default(goal.method, goal.model, goal.layout, **goal.settings)
    plan, answer = make_plan(job), "yes"
    if not _leaves_room(plan) and job.samples and (most := most_at_once(job)):
        answer = (
            f"not with {job.rollouts} completions at once ({_size(plan)}, {plan.deciding.dominated_by}); with {most}"
        )
        plan = make_plan(job.but(gradient_accumulation_steps=most))
    elif not _leaves_room(plan):
        answer = f"no: {plan.obstacle or 'less than a tenth is left'}"
    found = forecast(plan.job)
    host = f"{plan.host_peak / GIB:.0f}" if plan.host_peak else ""
    took = f"{written(found['step_seconds'])}, {_bottleneck(plan)}" if plan.fits else ""
    return [goal.words, goal.layout, answer, _size_and_way(plan), host, took]


def goals() -> str:
    """The table of all [`GOALS`]."""
    names = ["goal", "layout", "fits", "GiB a GPU", "GiB of a host", "a step"]
    return "\n".join([*_head(names), *(_row(goal_row(goal)) for goal in GOALS)])


TABLES = {"what fits": what_fits, "goals": goals}
