"""
What a GPU holds from the first step to the last: weights, gradients and the optimizer's states of every role, under
each way to spread them.

DeepSpeed's and Accelerate's own estimators have every weight trained. With adapters most aren't: here, each role
counts with what is held of it.
"""

import math
from dataclasses import dataclass, field

from .job import Job
from .models import Numbers, scorer_dtype


ELEMENT = {"bfloat16": 2, "float32": 4}
NF4_BLOCK, NESTED_BLOCK = 64, 256  # numbers of a block that share a constant, and constants of one
NF4_CODE, NESTED_CODE = 16 * 4, 256 * 4  # bytes of the tables of a weight


@dataclass(frozen=True)
class Optimizer:
    """
    Attributes:
        states (`int`):
            Numbers that it keeps for each weight.
        bytes (`float`, *optional*):
            Bytes of each; `None`: as many as the weight has.
    """

    states: int
    bytes: float | None = None


OPTIMIZERS = {
    "adamw": Optimizer(2),
    "adamw_8bit": Optimizer(2, 1 + 4 / 256),  # bitsandbytes: a constant for 256 numbers
    "sgd": Optimizer(0),
}


def constant_bytes(job: Job, linear: float) -> float:
    """Bytes of the constants of linear layers in 4 bits, as bitsandbytes holds them."""
    if job.quantization is None:
        return 0.0
    constants = linear / NF4_BLOCK
    return (
        constants + math.ceil(constants / NESTED_BLOCK) * 4.0 if job.quantization == "4bit_nested" else 4.0 * constants
    )


def base_bytes(job: Job, numbers: Numbers) -> float:
    """Bytes of the policy's base weights, on all GPUs together if they are spread."""
    size = ELEMENT[job.base_dtype]
    if job.quantization is None:
        return numbers.base * size
    return numbers.linear / 2 + constant_bytes(job, numbers.linear) + numbers.other * size


def whole_bytes(job: Job, numbers: Numbers) -> float:
    """Bytes of base weights that every GPU holds, however they are spread: what only quantized weights have."""
    if job.quantization is None or not job.shards_weights:
        return 0.0
    # DeepSpeed spreads the 8-bit integers that hold the 4-bit numbers, FSDP2 doesn't; constants are no weights
    integers = numbers.linear / 2 if job.strategy == "fsdp2" else 0.0
    return integers + constant_bytes(job, numbers.linear)


def spread_bytes(job: Job, numbers: Numbers) -> float:
    """Bytes of base weights, gathered whole, of which each GPU holds a part."""
    return 2.0 * numbers.base if job.quantization is None else base_bytes(job, numbers) - whole_bytes(job, numbers)


@dataclass(frozen=True)
class States:
    """
    Bytes by name that a GPU holds, and that its host holds for all of its GPUs.
    """

    gpu: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    # In a step of the optimizer only
    at_step: float = 0.0


# For each way to spread: the share of weights, of gradients and of the optimizer's states that a GPU holds, of n
SHARES = {
    "none": lambda n: (1.0, 1.0, 1.0),
    "ddp": lambda n: (1.0, 1.0, 1.0),
    "zero2": lambda n: (1.0, 1.0 / n, 1.0 / n),
    "zero3": lambda n: (1.0 / n, 1.0 / n, 1.0 / n),
    "fsdp2": lambda n: (1.0 / n, 1.0 / n, 1.0 / n),
}


def held_states(job: Job, numbers: Numbers) -> States:
    """What is held under a job's strategy."""
    assert job.strategy is not None
    gpus = job.layout.gpus
    of_weights, of_gradients, of_optimizer = SHARES[job.strategy](gpus)
    trained = {"adapter": numbers.adapter, "critic": numbers.critic} | ({"base": numbers.base} if job.is_full else {})
    size, optimizer = ELEMENT[job.trained_dtype], OPTIMIZERS[job.optimizer]
    # Heads are in float32, and so is, under FSDP2, whatever is trained
    of_model = 4.0 if job.strategy == "fsdp2" else ELEMENT[job.base_dtype]
    of_critic = {"head": 2.0 if job.is_deepspeed else 4.0, "model": of_model}
    sizes = {"adapter": size, "critic": of_critic.get(str(job.critic), size), "base": size}
    whole = whole_bytes(job, numbers)
    # PEFT's adapters are in float32, whatever the base is in, and ZeRO-3 spreads them as they are
    size_of_adapter = 2.0 if job.strategy == "zero2" else 4.0
    size_of_reward = ELEMENT[scorer_dtype(job)] if job.reward == "model" else size_of_adapter
    share_of_reward = of_weights if job.reward == "adapter" or job.is_deepspeed else 1.0
    gpu = {
        "base weights": whole + (base_bytes(job, numbers) - whole) * of_weights,
        "adapter": numbers.adapter * sizes["adapter"] * of_weights,
        "critic": numbers.critic * sizes["critic"] * of_weights,
        "reward": numbers.reward * size_of_reward * share_of_reward,
        # Loaded as the policy is
        "reference": numbers.base * ELEMENT[scorer_dtype(job)] * of_weights if job.reference == "model" else 0.0,
    }
    count = sum(trained.values())
    gradient_bytes = sum(number * sizes[name] for name, number in trained.items())
    gpu["gradients"] = gradient_bytes * of_gradients
    gpu["gradient buckets"] = gradient_bytes if job.strategy == "ddp" else 0.0  # DDP's, which stay
    per_state = {name: optimizer.bytes if optimizer.bytes is not None else sizes[name] for name in trained}
    if job.is_deepspeed:
        per_state = dict.fromkeys(trained, 4.0 if optimizer.bytes is None else optimizer.bytes)
    states = sum(number * optimizer.states * per_state[name] for name, number in trained.items())
    master = 4.0 * count if job.is_deepspeed else 0.0  # DeepSpeed steps on a copy in float32
    gpu["optimizer"] = (states + master) * of_optimizer
    at_step = 4.0 * min(count / gpus, 1e9) if job.is_deepspeed else 0.0  # gradients in float32, a group at a time
    host: dict[str, float] = {}
    if job.offload != "none":
        nodes = job.layout.nodes
        host["optimizer"] = (states + master) / nodes
        host["gradients"] = (4.0 + 2.0) * count / nodes  # in float32 and as they come
        gpu["optimizer"], gpu["gradients"], at_step = 0.0, 0.0, 0.0
    if job.offload == "all":
        for name in ("base weights", "adapter", "critic"):
            host[name] = gpu[name] * job.layout.gpus_per_node
            gpu[name] = 0.0
    return States({name: size for name, size in gpu.items() if size}, host, at_step)
