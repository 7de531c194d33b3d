"""A plan as a table for people."""

from .layouts import GIB
from .phases import SPARE
from .plan import Plan


LEAST = 0.005 * GIB  # smaller parts are left out of the table


def _roles(plan: Plan) -> str:
    job = plan.job
    named = {"critic": job.critic, "reward": job.reward or ("functions" if job.samples else None)}
    named["reference"] = job.reference
    return ", ".join(f"{role} {kind}" for role, kind in named.items() if kind is not None)


def describe(plan: Plan) -> list[str]:
    """What was planned, on two lines."""
    job = plan.job
    trained = "all weights" if job.is_full else f"LoRA of rank {job.lora_r}"
    held = {None: job.base_dtype, "4bit": "4 bits", "4bit_nested": "4 bits, nested"}[job.quantization]
    how = [str(job.strategy)]
    if job.strategy == "zero3" and job.samples and job.vllm == "none":
        how.append("gathered whole to generate" if job.ds3_gather_for_generation else "gathered a layer at a time")
    how += [f"offload of {job.offload}"] if job.offload != "none" else []
    how += [f"vLLM {job.vllm}"] if job.vllm != "none" else []
    batch = f"micro-batch {job.per_device_train_batch_size} x {job.prompt_tokens} + {job.completion_tokens} tokens"
    batch += f", {job.gradient_accumulation_steps} of them a step"
    batch += f", {job.updates} steps a generation" if job.samples and job.updates > 1 else ""
    return [
        f"{job.method.upper()} of {job.model.name} ({job.model.text}) on {job.layout.name}: {trained}, base in "
        f"{held}, {', '.join(how)}",
        f"{_roles(plan) or 'no other roles'}; {batch}",
    ]


def table(plan: Plan) -> list[str]:
    """Parts by phase, in GiB on a GPU; the deciding phase has a star."""
    names = dict.fromkeys(name for phase in plan.phases for name in phase.parts)
    names = dict.fromkeys([*(name for name in names if name not in SPARE), *SPARE])
    shown = [name for name in names if max(phase.parts.get(name, 0.0) for phase in plan.phases) >= LEAST]
    width = max(map(len, [*shown, "of a host's memory"])) + 2
    columns = [f"{phase.name}{'*' if phase is plan.deciding else ''}" for phase in plan.phases]
    widths = [max(len(column), 8) + 2 for column in columns]
    lines = [f"{'GiB on a GPU':<{width}}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))]

    def row(name: str, sizes: list[float], digits: int = 2) -> str:
        cells = (
            f"{size / GIB:>{w}.{digits}f}" if size else f"{'':>{w}}" for size, w in zip(sizes, widths, strict=True)
        )
        return f"{name:<{width}}{''.join(cells)}".rstrip()

    lines += [row(name, [phase.parts.get(name, 0.0) for phase in plan.phases]) for name in shown]
    lines.append(row("together", [phase.bytes for phase in plan.phases]))
    if plan.host_peak:
        lines.append(row("of a host's memory", [phase.host_bytes for phase in plan.phases], 1))
    return lines


def verdict(plan: Plan, largest: int | None, change: list[str] | None) -> list[str]:
    """Whether it fits, in sentences."""
    layout = plan.job.layout
    if plan.fits:
        phase = plan.deciding
        lines = [
            f"Fits: {plan.peak / GIB:.1f} of {layout.gpu_bytes / GIB:.1f} GiB, {100 * plan.free:.0f} % free. Decided "
            f"by {phase.name}, dominated by {phase.dominated_by}."
        ]
        if largest is not None:
            lines.append(f"Largest micro-batch with all else as it is: per_device_train_batch_size={largest}.")
        return lines
    remedy = (
        "No single setting makes it fit: more GPUs, or shorter completions."
        if change is None
        else f"Cheapest change that makes it fit: {'; and '.join(change)}."
    )
    return [f"Does not fit: {plan.obstacle}.", remedy]
