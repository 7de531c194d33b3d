"""
The answer: whether a job fits, which phase decides and what dominates it, the largest micro-batch, and the cheapest
change that would make it fit.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .job import Job
from .layouts import GIB
from .models import count_numbers
from .phases import Phase, cache_bytes_per_token, phases_of
from .states import base_bytes


# A plan that leaves less is taken only if there is no other: what isn't planned for takes its share, too
COMFORT = 0.1
VLLM_OWN = 2.0 * GIB  # vLLM's activations and CUDA graphs
LARGEST = 4096


@dataclass(frozen=True)
class Plan:
    """
    What a job takes.

    Attributes:
        job ([`Job`]):
            With everything chosen that was left open.
        phases (`list[Phase]`):
            In the order of a step.
        blocked (`str`, *optional*):
            What stands in the way beside the sizes of phases.
    """

    job: Job
    phases: list[Phase] = field(compare=False)
    blocked: str | None = None

    @property
    def deciding(self) -> Phase:
        """The phase that takes the most of a GPU."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> float:
        """Bytes of a GPU."""
        return self.deciding.bytes

    @property
    def host_peak(self) -> float:
        """Bytes of a host's memory."""
        return max(phase.host_bytes for phase in self.phases)

    @property
    def free(self) -> float:
        """Share of a GPU that is left."""
        return 1.0 - self.peak / self.job.layout.gpu_bytes

    @property
    def fits(self) -> bool:
        return self.blocked is None and self.free >= 0 and self.host_peak <= self.job.layout.host_bytes

    @property
    def obstacle(self) -> str | None:
        """What stands in the way, in a sentence; `None` if it fits."""
        if self.fits:
            return None
        if self.blocked is not None:
            return self.blocked
        phase, layout = self.deciding, self.job.layout
        if self.free < 0:
            part = phase.dominated_by
            return (
                f"{phase.name} takes {phase.bytes / GIB:.1f} of {layout.gpu_bytes / GIB:.1f} GiB on a GPU, of which "
                f"{phase.parts[part] / GIB:.1f} are {part}"
            )
        most = max(self.phases, key=lambda phase: phase.host_bytes)
        part = max(most.host, key=lambda name: most.host[name])
        return (
            f"{most.name} takes {most.host_bytes / GIB:.0f} of {layout.host_bytes / GIB:.0f} GiB in a host's memory, "
            f"of which {most.host[part] / GIB:.0f} are {part}"
        )


def _vllm_has_no_room(job: Job) -> str | None:
    if job.vllm != "colocate":
        return None
    weights = 2.0 * count_numbers(job).base / job.vllm_tensor_parallel_size
    needed = weights + job.tokens * cache_bytes_per_token(job, in_vllm=True) / job.vllm_tensor_parallel_size + VLLM_OWN
    given = job.vllm_gpu_memory_utilization * job.layout.gpu_bytes
    if needed <= given:
        return None
    return (
        f"vLLM needs {needed / GIB:.1f} GiB on a GPU for its weights and one completion, and "
        f"vllm_gpu_memory_utilization={job.vllm_gpu_memory_utilization} gives it {given / GIB:.1f}"
    )


def _candidates(job: Job) -> Iterator[Job]:
    """The job with everything chosen that was left open, the fastest first."""
    for strategy in job.strategies:
        chosen = job.but(strategy=strategy)
        open_gather = strategy == "zero3" and job.ds3_gather_for_generation is None and job.samples
        for gather in (True, False) if open_gather else (job.ds3_gather_for_generation,):
            yield chosen.but(ds3_gather_for_generation=gather)


def plan_one(job: Job) -> Plan:
    """The plan of a job in which nothing is left open."""
    return Plan(job, phases_of(job), _vllm_has_no_room(job))


def make_plan(job: Job) -> Plan:
    """
    Plan a job.

    Args:
        job ([`Job`]):
            What is left open is chosen: the fastest that leaves a tenth of the GPU free, or else the fastest that
            fits.

    Returns:
        [`Plan`]: of the last candidate, which takes the least, if none fits.
    """
    found: list[Plan] = []
    for candidate in _candidates(job):
        plan = plan_one(candidate)
        if plan.fits and plan.free >= COMFORT:
            return plan
        found.append(plan)
    return next((plan for plan in found if plan.fits), found[-1])


def largest_micro_batch(job: Job) -> int:
    """The largest `per_device_train_batch_size` that fits, with all else as it is. 0: none does."""

    def fits(size: int) -> bool:
        return make_plan(job.but(per_device_train_batch_size=size)).fits

    first, second = (make_plan(job.but(per_device_train_batch_size=size)) for size in (1, 2))
    if not first.fits or not second.fits:
        return int(first.fits)
    # What takes more with more rows does so in proportion: a guess, and steps from there
    room, slope = first.job.layout.gpu_bytes - second.peak, second.peak - first.peak
    size = 2 + int(room / slope) if slope > 0 else LARGEST
    size = min(max(size, 2), LARGEST)
    low, high, stride = 2, LARGEST + 1, 1  # the first fits, the last is not asked for
    while high - low > 1:
        size = min(max(size, low + 1), high - 1)
        if fits(size):
            low, size = size, size + stride
        else:
            high, size = size, size - stride
        stride *= 2
        if high - low <= stride:
            size = (low + high) // 2
    return low


# Changes


def _smaller_micro_batch(job: Job) -> Job | None:
    """With the same number of rows in a step."""
    size, steps = job.per_device_train_batch_size, job.gradient_accumulation_steps
    return job.but(per_device_train_batch_size=1, gradient_accumulation_steps=size * steps) if size > 1 else None


def _fewer_rollouts(job: Job) -> Job | None:
    """A step of fewer rows: fewer completions are generated at once."""
    if not job.samples or job.rollouts == 1:
        return None
    if job.updates > 1:
        return job.but(updates_per_generation=max(1, job.updates // 4))
    return job.but(per_device_train_batch_size=1, gradient_accumulation_steps=max(1, job.rollouts // 4))


def _spread(job: Job) -> Job | None:
    return job.but(strategy="zero3") if job.layout.gpus > 1 and not job.shards_weights else None


def _layer_by_layer(job: Job) -> Job | None:
    gathers = job.strategy in (None, "zero3") and job.ds3_gather_for_generation
    return job.but(ds3_gather_for_generation=False) if gathers else None


def _adapter_alone(job: Job) -> Job | None:
    can = job.vllm == "colocate" and not job.is_full and job.vllm_sync == "weights"
    return job.but(vllm_sync="adapter") if can else None


def _one_trunk(job: Job) -> Job | None:
    shared = {"critic": "head"} if job.critic == "model" else {}
    if not job.is_full:
        shared |= {name: "adapter" for name in ("reward", "reference") if getattr(job, name) == "model"}
    return job.but(**shared) if shared else None


def _lora(job: Job) -> Job | None:
    if not job.is_full:
        return None
    reference = "adapter" if job.reference == "model" else job.reference
    offload = {"offload": "none"} if job.offload != "none" else {}
    return job.but(lora_r=16, reference=reference, dtype=None, **offload)


def _offload(job: Job) -> Job | None:
    can = job.layout.gpus > 1 and job.strategy in (None, "zero2", "zero3") and job.offload == "none"
    return job.but(strategy="zero3", offload="optimizer", optimizer="adamw") if can and job.is_full else None


CHANGES: dict[str, Callable[[Job], Job | None]] = {
    # The cheapest first: those that compute the same, then those that are slower, then those that train differently
    "per_device_train_batch_size=1, with more gradient_accumulation_steps": _smaller_micro_batch,
    "vllm_sync=adapter: vLLM gets the adapter alone": _adapter_alone,
    "ds3_gather_for_generation=False: a layer is gathered at a time": _layer_by_layer,
    "gradient_checkpointing=True": lambda job: (
        None if job.gradient_checkpointing else job.but(gradient_checkpointing=True)
    ),
    "base weights in bfloat16 (dtype)": lambda job: (
        job.but(dtype="bfloat16") if job.dtype == "float32" and not job.is_full else None
    ),
    "strategy zero3: weights are spread": _spread,
    "optimizer adamw_8bit": lambda job: (
        job.but(optimizer="adamw_8bit") if job.is_full and job.optimizer == "adamw" else None
    ),
    "offload of the optimizer to the host": _offload,
    "a quarter of the completions at once (updates_per_generation, gradient_accumulation_steps)": _fewer_rollouts,
    "updates_per_generation=1: one step's completions at once": lambda job: (
        job.but(updates_per_generation=1) if job.samples and job.updates > 1 else None
    ),
    "one trunk: critic head, reward and reference by adapters": _one_trunk,
    "LoRA (lora_r=16) in place of all weights": _lora,
    "4-bit base weights (load_in_4bit)": lambda job: (
        job.but(quantization="4bit") if not job.is_full and job.quantization is None else None
    ),
}


def cheapest_change(job: Job) -> list[str] | None:
    """
    What would make a job fit.

    Args:
        job ([`Job`]):
            One that doesn't.

    Returns:
        `list[str]`: names of the first change that alone is enough, or of the first ones that are together, without
        those that the later ones make unneeded. `None` if none are: other GPUs, or more, or shorter completions.
    """
    for name in CHANGES:
        if _fits_with([name], job):
            return [name]
    needed = next((count for count in range(2, len(CHANGES) + 1) if _fits_with(list(CHANGES)[:count], job)), None)
    if needed is None:
        return None
    applied = list(CHANGES)[:needed]
    for name in list(CHANGES)[:needed]:
        fewer = [other for other in applied if other != name]
        if _fits_with(fewer, job):
            applied = fewer
    return applied


def _fits_with(names: list[str], job: Job) -> bool:
    """With these changes, as far as they change anything."""
    start = job
    for name in names:
        job = CHANGES[name](job) or job
    return job != start and make_plan(job).fits


def as_json(plan: Plan, largest: int | None, change: list[str] | None, speed: dict[str, Any] | None = None) -> str:
    """A plan as one line of JSON. Sizes are in GiB."""

    def rounded(parts: dict[str, float]) -> dict[str, float]:
        return {name: round(size / GIB, 3) for name, size in parts.items()}

    found: dict[str, Any] = {
        "fits": plan.fits,
        "free": round(plan.free, 4),
        "peak_gib": round(plan.peak / GIB, 3),
        "gpu_gib": round(plan.job.layout.gpu_bytes / GIB, 3),
        "host_peak_gib": round(plan.host_peak / GIB, 3),
        "deciding_phase": plan.deciding.name,
        "dominated_by": plan.deciding.dominated_by,
        "obstacle": plan.obstacle,
        "largest_micro_batch": largest,
        "cheapest_change": change,
        "job": plan.job.settings(),
        "base_weights_gib": round(base_bytes(plan.job, count_numbers(plan.job)) / GIB, 3),
        "phases": [
            {"name": phase.name, "gib": round(phase.bytes / GIB, 3)}
            | {"gpu": rounded(phase.parts), "host": rounded(phase.host)}
            for phase in plan.phases
        ],
    }
    return json.dumps(found | ({"speed": speed} if speed else {}))
