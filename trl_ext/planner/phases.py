"""
The phases of a step, and what each takes: what persists plus the worst of its own moments. Phases come one after the
other: they are never added up, and the largest decides.
"""

from dataclasses import dataclass

from ..trainers.seams.out_of_memory import MOST_KEPT_BYTES
from .job import Job
from .layouts import GIB
from .models import Numbers, count_numbers
from .passes import generating_pass_bytes, prefill_bytes, reward_pass_bytes, scoring_pass_bytes, update_bytes
from .states import ELEMENT, States, held_states, spread_bytes


CUDA_BYTES = 1.0 * GIB  # context and kernels of a process
NCCL_BYTES = 0.5 * GIB  # of its communicators, where there are several
FRAGMENTATION = 0.1  # of what comes and goes: PyTorch's allocator keeps pieces that are too small
SPARE = ("CUDA and NCCL", "fragmentation")  # parts that nothing of the job is in
DEEPSPEED_LIVE = 1.1e9  # numbers: stage3_max_live_parameters of recipes/deepspeed
BUCKET = 2.0e8  # numbers: the largest reduce bucket that is written into DeepSpeed's file


@dataclass(frozen=True)
class Phase:
    """
    One phase.

    Attributes:
        name (`str`):
            What happens.
        parts (`dict[str, float]`):
            Bytes on a GPU, by what they are for, at the phase's worst moment.
        host (`dict[str, float]`):
            Bytes in the host's memory, for all of its GPUs.
    """

    name: str
    parts: dict[str, float]
    host: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def dominated_by(self) -> str:
        """The largest part that the job has a say in."""
        return max((name for name in self.parts if name not in SPARE), key=lambda name: self.parts[name])


def cache_bytes_per_token(job: Job, in_vllm: bool = False) -> float:
    """Bytes of the keys and values of one token, in bfloat16 in vLLM, or as the policy computes."""
    # Under autocast, hidden states between weights in float32 are in float32, and so are keys and values
    wide = not in_vllm and job.casts_base
    config = job.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2.0 * config.num_hidden_layers * heads * size * (4 if wide else 2)


def gathered_bytes(job: Job, numbers: Numbers) -> float:
    """Weights that are gathered from other GPUs, at most, while layers compute."""
    if not job.shards_weights or job.layout.gpus == 1:
        return 0.0
    held = spread_bytes(job, numbers)
    if job.strategy == "fsdp2":
        # The layer that computes, and the next, which is on its way; the embedding and the head are the root's
        return min(held, 2.0 * (2 * numbers.layer + 2 * numbers.ends))
    return min(held, 2.0 * max(DEEPSPEED_LIVE, 2 * numbers.layer, numbers.ends + numbers.layer))


class _Phases:
    """The phases of a job whose strategy is chosen."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.numbers = count_numbers(job)
        self.states: States = held_states(job, self.numbers)
        self.gathered = gathered_bytes(job, self.numbers)
        config = job.model.config.get_text_config()
        self.vocabulary, self.layers = config.vocab_size, config.num_hidden_layers
        self.hidden = config.hidden_size

    def _phase(self, name: str, moment: dict[str, float], without: tuple[str, ...] = ()) -> Phase:
        job = self.job
        if name != "update" and not job.is_deepspeed:
            without = (*without, "gradients")  # freed at the end of a step; DeepSpeed's buffers stay
        held = {part: size for part, size in self.states.gpu.items() if part not in without}
        if job.vllm == "colocate" and not job.vllm_enable_sleep_mode and name != "generate":
            held["vLLM"] = job.vllm_gpu_memory_utilization * job.layout.gpu_bytes
        moment = {part: size for part, size in moment.items() if size > 0}
        context = CUDA_BYTES + (NCCL_BYTES if job.layout.gpus > 1 else 0.0)
        spare = dict(zip(SPARE, (context, FRAGMENTATION * sum(moment.values())), strict=True))
        return Phase(name, held | moment | spare, dict(self.states.host))

    def load(self) -> Phase:
        """
        Base weights arrive; nothing is trained yet. Where weights are spread, their files are read into the memory of
        the host, once for all processes; under DDP and ZeRO-2, TRL loads them there in each process.
        """
        job, numbers = self.job, self.numbers
        moment = {}
        if job.quantization is not None:
            moment["a layer before quantization"] = 2.0 * numbers.layer
            if job.shards_weights:  # quantized weights arrive whole and are spread after that
                spread = spread_bytes(job, numbers)
                moment["weights before they are spread"] = spread * (1.0 - 1.0 / job.layout.gpus)
        elif job.shards_weights and job.layout.gpus > 1:
            moment["weights gathered"] = 2.0 * numbers.ends
        phase = self._phase("load", moment, without=("gradients", "gradient buckets", "optimizer"))
        if job.strategy == "none":  # straight to the GPU
            return phase
        copies = 1 if job.shards_weights else job.layout.gpus_per_node
        return Phase(phase.name, phase.parts, phase.host | {"weights as they are read": 2.0 * numbers.base * copies})

    def generate(self) -> Phase:
        """All completions of a GPU's generation batch at once."""
        job = self.job
        if job.vllm != "none":
            # A policy that is spread is gathered whole to merge its adapter; one that isn't is merged in place
            whole = 2.0 * self.numbers.base if job.shards_weights and not job.is_full else self.gathered
            if job.vllm_sync == "adapter":
                whole = ELEMENT["float32"] * self.numbers.adapter if job.shards_weights else 0.0
            engine = job.vllm_gpu_memory_utilization * job.layout.gpu_bytes if job.vllm == "colocate" else 0.0
            return self._phase("generate", {"vLLM": engine, "weights gathered for vLLM": whole})
        cache = job.rollouts * job.tokens * cache_bytes_per_token(job)
        # All prompts are read at once, or the last token is made, or it is drawn, whichever takes more
        reading = {"KV cache": cache * job.prompt_tokens / job.tokens, "activations": prefill_bytes(job)}
        grown = {"KV cache": cache, "KV cache, a layer as it grows": cache / self.layers}
        making = grown | {"activations": generating_pass_bytes(job, 1)}
        drawing = grown | {"logits of a token": job.rollouts * self.vocabulary * 4.0 * 3}
        moment = max(reading, making, drawing, key=lambda parts: sum(parts.values()))
        moment |= {"weights gathered": self.gathered, "a layer dequantized": self._dequantized()}
        if job.strategy == "zero3" and job.ds3_gather_for_generation and job.layout.gpus > 1:
            others = 2.0 * (self.numbers.adapter + self.numbers.critic)
            moment["weights gathered"] = spread_bytes(job, self.numbers) + others
        return self._phase("generate", moment)

    def _dequantized(self) -> float:
        """The largest linear layer in bfloat16, of a quantized base."""
        if self.job.quantization is None:
            return 0.0
        config = self.job.model.config.get_text_config()
        return 2.0 * config.hidden_size * getattr(config, "intermediate_size", 4 * config.hidden_size)

    def score(self) -> Phase:
        """Rewards by a model or an adapter."""
        moment = {
            "activations": reward_pass_bytes(self.job),
            "weights gathered": self.gathered,
            "a layer dequantized": self._dequantized(),
        }
        return self._phase("score", moment)

    def passes(self) -> Phase:
        """Log-probabilities of the old policy and the reference, and values, a micro-batch at a time."""
        job = self.job
        # One process alone computes prompts once and repeats their keys and values for each completion, but not beside
        # a critic that reads the tokens itself
        repeats = job.share_prefixes and job.strategy == "none" and job.critic in (None, "head")
        repeated = job.rows * job.tokens * cache_bytes_per_token(job) if repeats else 0.0
        moment = {
            "activations": scoring_pass_bytes(job),
            "keys and values of prompts": repeated,
            # The first of its two calls ends in a whole head, of which autocast keeps a copy
            "a copy of the head": 2.0 * self.vocabulary * self.hidden if repeats and job.casts_base else 0.0,
            "weights gathered": self.gathered,
            "a layer dequantized": self._dequantized(),
        }
        return self._phase("old and reference passes", moment)

    def update(self) -> Phase:
        """Forward and backward pass of a micro-batch, or the step of the optimizer, whichever takes more."""
        job, numbers = self.job, self.numbers
        activations = update_bytes(job)
        # Gradients come one weight at a time, and go into buckets from which they are reduced
        trained = numbers.adapter + numbers.critic + (numbers.base if job.is_full else 0.0)
        bucket = min(trained, BUCKET) * 2.0 * (2 if job.strategy == "zero2" else 1) if job.is_deepspeed else 0.0
        if job.strategy == "fsdp2":
            bucket = 4.0 * min(trained, numbers.layer if job.is_full else trained)
        moment = {
            "activations kept": activations.kept,
            "activations at the peak": activations.peak - activations.kept,
            "weights gathered": self.gathered,
            "gradient buckets": bucket,
            "a layer dequantized": self._dequantized(),
        }
        if job.samples and job.strategy == "none" and job.gradient_accumulation_steps > 1:
            # So that a micro-batch for which memory runs out can be computed again, in parts
            gradients = self.states.gpu.get("gradients", 0.0)
            moment["gradients kept beside"] = gradients if gradients <= MOST_KEPT_BYTES else 0.0
        if self.states.at_step > sum(moment.values()):
            moment = {"gradients in float32, at the step": self.states.at_step}
        return self._phase("update", moment)

    def save(self) -> Phase:
        """What was trained is gathered in the memory of the first process's host, a layer at a time."""
        job, numbers = self.job, self.numbers
        trained = numbers.adapter + numbers.critic + (numbers.base if job.is_full else 0.0)
        moment = {"weights gathered": 2.0 * numbers.ends if job.shards_weights and job.is_full else 0.0}
        phase = self._phase("save", moment)
        copy = ELEMENT[job.base_dtype] * trained if job.shards_weights else 0.0
        return Phase(phase.name, phase.parts, phase.host | ({"what is saved": copy} if copy else {}))

    def all(self) -> list[Phase]:
        """In the order of a step."""
        job = self.job
        found = [self.load()]
        if job.samples:
            found.append(self.generate())
            if job.reward is not None:
                found.append(self.score())
            found.append(self.passes())
        return [*found, self.update(), self.save()]


def phases_of(job: Job) -> list[Phase]:
    """
    The phases of a step.

    Args:
        job ([`Job`]):
            With its strategy chosen.

    Returns:
        `list[Phase]`: in order. The largest decides whether the job fits.
    """
    return _Phases(job).all()
