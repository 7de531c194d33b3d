"""
How long the phases of a step take: operations, bytes of the GPU's memory and bytes over links, each over what the
hardware gives of it. The slowest of them is the bottleneck of a phase: a roofline, not a measurement.

What is assumed stands in [`Efficiencies`]. Nothing here was measured on a GPU.
"""

from dataclasses import dataclass
from typing import Any

from .job import METHODS, Job
from .layouts import GIB
from .models import Numbers, count_numbers
from .phases import cache_bytes_per_token
from .states import base_bytes, held_states, spread_bytes


@dataclass(frozen=True)
class Efficiencies:
    """
    Shares of the data sheet's numbers that are reached, and what a launch costs.

    Attributes:
        compute (`float`):
            Of the dense bfloat16 operations, in passes over whole sequences.
        memory (`float`):
            Of the bandwidth of the GPU's memory.
        link (`float`):
            Of the bandwidth between GPUs, and to the host.
        launch (`float`):
            Seconds that Python and kernel launches take for one layer and one generated token, without vLLM.
    """

    compute: float = 0.45
    memory: float = 0.7
    link: float = 0.7
    launch: float = 0.5e-3


ASSUMED = Efficiencies()


@dataclass(frozen=True)
class Work:
    """
    What one GPU does in a phase of a step.

    Attributes:
        name (`str`):
            Of the phase.
        flops, memory_bytes, link_bytes, host_bytes (`float`):
            Operations, and bytes of its own memory, from other GPUs and from the host.
        launches (`float`):
            Layers times generated tokens, one after the other.
    """

    name: str
    flops: float = 0.0
    memory_bytes: float = 0.0
    link_bytes: float = 0.0
    host_bytes: float = 0.0
    launches: float = 0.0

    def seconds_by_resource(self, job: Job, assumed: Efficiencies = ASSUMED) -> dict[str, float]:
        """Seconds that each resource is busy."""
        layout = job.layout
        return {
            "compute": self.flops / (layout.flops * assumed.compute),
            "memory": self.memory_bytes / (layout.memory_bandwidth * assumed.memory),
            "links": self.link_bytes / (layout.slowest_link * assumed.link),
            "host": self.host_bytes / (layout.pcie_bandwidth * assumed.link),
            "launches": self.launches * assumed.launch,
        }


class _Step:
    """The work of a step, for a job whose strategy is chosen."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.numbers: Numbers = count_numbers(job)
        text = job.model.config.get_text_config()
        self.layers, self.hidden = text.num_hidden_layers, text.hidden_size
        self.held = base_bytes(job, self.numbers)
        gpus = job.layout.gpus
        self.others = (gpus - 1) / gpus
        # Rows that a GPU trains on in a step
        self.rows = job.rollouts * METHODS[job.method].rows

    @property
    def read(self) -> float:
        """Bytes of memory to compute with all base weights once: 4-bit weights are written out and read again."""
        return self.held + (4.0 * self.numbers.linear if self.job.quantization is not None else 0.0)

    @property
    def gathered(self) -> float:
        """Bytes that come from other GPUs when all base weights are gathered once."""
        return spread_bytes(self.job, self.numbers) * self.others if self.job.shards_weights else 0.0

    def _forward(self, rows: float, columns: float) -> float:
        """Operations of one pass: two for each weight and token, and causal attention."""
        attention = 2.0 * self.layers * self.hidden * columns * columns * rows
        return 2.0 * self.numbers.base * rows * columns + attention

    def _critics(self) -> float:
        """Passes of the critic for one of the policy."""
        return 1.0 if self.job.critic in ("adapter", "model") else 0.0

    def generate(self) -> Work:
        job, rows = self.job, self.job.rollouts
        cache = (
            rows
            * (job.prompt_tokens + job.completion_tokens / 2)
            * cache_bytes_per_token(job, in_vllm=job.vllm != "none")
        )
        steps = job.completion_tokens
        whole = bool(job.ds3_gather_for_generation) or job.vllm != "none"
        share = job.vllm_tensor_parallel_size if job.vllm == "colocate" else 1
        return Work(
            "generate",
            self._forward(rows, job.prompt_tokens) + 2.0 * self.numbers.base * rows * steps,
            steps * (self.read / share + cache),
            self.gathered * (0 if job.vllm_sync == "adapter" else 1 if whole else steps),
            0.0,
            0.0 if job.vllm != "none" else float(self.layers * steps),
        )

    def score(self) -> Work:
        scale = self.numbers.reward / self.numbers.base if self.job.reward == "model" else 1.0
        passes = 1 if self.job.reward == "model" else self.job.micro_batches
        flops = scale * self._forward(self.rows, self.job.tokens)
        return Work("score", flops, scale * passes * self.read, scale * passes * self.gathered)

    def passes(self) -> Work:
        job = self.job
        count = 1.0 + (job.reference is not None) + self._critics()
        flops = count * self._forward(self.rows, job.tokens)
        times = count * job.micro_batches
        return Work("old and reference passes", flops, times * self.read, times * self.gathered)

    def update(self) -> Work:
        job, numbers = self.job, self.numbers
        rows, columns = job.batch_shape
        forward = self._forward(rows, columns) * job.micro_batches
        # A forward pass, one more where activations are recomputed, and a backward pass: as much for the gradients of
        # activations, and as much for those of weights where weights are trained
        policy = 1.0 + job.gradient_checkpointing + 1.0 + job.is_full
        critic = self._critics() * (1.0 + job.gradient_checkpointing + 1.0 + (job.critic == "model"))
        reference = 1.0 if not job.samples and job.reference is not None else 0.0
        times = policy + critic + reference
        states = held_states(job, numbers)
        trained = numbers.adapter + numbers.critic + (numbers.base if job.is_full else 0.0)
        gathers = (2.0 + 2.0 * self._critics() + reference) * job.micro_batches
        reduced = 2.0 * trained * self.others * job.updates
        return Work(
            "update",
            times * forward,
            times * job.micro_batches * self.read + 2.0 * job.updates * states.gpu.get("optimizer", 0.0),
            gathers * self.gathered + reduced,
            # Gradients go to the host and weights come back; weights that live there come for each gather
            (4.0 * trained * job.updates / job.layout.gpus if job.offload != "none" else 0.0)
            + (gathers * 2.0 * numbers.base / job.layout.gpus if job.offload == "all" else 0.0),
        )

    def all(self) -> list[Work]:
        if not self.job.samples:
            return [self.update()]
        scores = [self.score()] if self.job.reward is not None else []
        return [self.generate(), *scores, self.passes(), self.update()]


def work_of(job: Job) -> list[Work]:
    """What a GPU does in a step, by phases. The job's strategy is chosen."""
    return _Step(job).all()


def forecast(job: Job, assumed: Efficiencies = ASSUMED) -> dict[str, Any]:
    """
    Time by phases, as JSON.

    Args:
        job ([`Job`]):
            With its strategy chosen.
        assumed ([`Efficiencies`], *optional*):
            What is reached of the data sheet.

    Returns:
        `dict`: `step_seconds`, `tokens_per_second` of all GPUs together, prompts included, `bottleneck` (the phase
        that takes longest, and what slows it), and `phases` with seconds, operations and bytes of a GPU. All of them
        are an optimizer step's: its share, where a generation is for several.
    """
    share = 1.0 / (job.updates if job.samples else 1)
    phases = []
    for work in work_of(job):
        by_resource = work.seconds_by_resource(job, assumed)
        bound = max(by_resource, key=lambda name: by_resource[name])
        phases.append(
            {
                "name": work.name,
                "seconds": float(f"{share * by_resource[bound]:.3g}"),
                "bound_by": bound,
                "tflop": round(share * work.flops / 1e12, 1),
                "memory_gib": round(share * work.memory_bytes / GIB, 1),
                "link_gib": round(share * work.link_bytes / GIB, 1),
                "host_gib": round(share * work.host_bytes / GIB, 1),
            }
        )
    seconds = sum(float(str(phase["seconds"])) for phase in phases)
    slowest = max(phases, key=lambda phase: float(str(phase["seconds"])))
    tokens = share * job.rollouts * METHODS[job.method].rows * job.tokens * job.layout.gpus
    return {
        "step_seconds": float(f"{seconds:.3g}"),
        "tokens_per_second": float(f"{tokens / seconds:.3g}"),
        "bottleneck": f"{slowest['name']}, by {slowest['bound_by']}",
        "phases": phases,
        "assumed": vars(assumed),
    }


def written(seconds: float) -> str:
    """Three digits, and no exponent."""
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def in_words(found: dict[str, Any]) -> list[str]:
    """A forecast in sentences."""
    parts = [f"{phase['name']} {written(phase['seconds'])} ({phase['bound_by']})" for phase in found["phases"]]
    assumed = found["assumed"]
    return [
        f"A step: {written(found['step_seconds'])}, {found['tokens_per_second']:,.0f} tokens a second on all GPUs. "
        f"Bottleneck: {found['bottleneck']}.",
        f"{'; '.join(parts)}.",
        f"Assumed, not measured: {assumed['compute']:.0%} of the operations, {assumed['memory']:.0%} of the memory's "
        f"bandwidth, {assumed['link']:.0%} of the links'; {1e3 * assumed['launch']:.1f} ms a layer and token made.",
    ]
