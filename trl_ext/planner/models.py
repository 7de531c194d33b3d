"""
The models of a job with few layers, on the meta device: the policy with its adapters and its critic as the trainers
make them, and how many numbers each role has.

Layers are alike: what two and four of them take says what any number takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.utils import add_fused_lm_head

from ..errors import require
from ..roles.critic import CRITIC, ModelCritic, base_model_of, critic_class
from ..rollouts.kept_states import KeptStates
from .job import Job
from .shapes import Shape


FEW = (2, 4)  # numbers of layers
# What the numbers of a job depend on
COUNTED = ("method", "lora_r", "lora_target_modules", "critic", "critic_head", "reward", "reward_model")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@contextmanager
def _on_meta(dtype: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def lora_config(job: Job) -> LoraConfig:
    """The configuration of the policy's adapter."""
    targets = job.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=job.lora_r,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
    )


def build_policy(job: Job, layers: int) -> Any:
    """
    The policy with `layers` layers, its fused head, its adapter and its critic, as a trainer makes them. A model of
    its own as critic has as many layers.
    """
    base_dtype, trained_dtype = job.base_dtype, job.trained_dtype
    if not job.computes_on_copies:
        base_dtype = trained_dtype = "bfloat16"
    with _on_meta(base_dtype):
        model = AutoModelForCausalLM.from_config(job.model.with_layers(layers), dtype=DTYPES[base_dtype])
        add_fused_lm_head(model, 1.0, outputs=("log_probs", "entropy") if job.samples else ("log_probs",))
        policy: Any = model
        if not job.is_full:
            policy = get_peft_model(model, lora_config(job), autocast_adapter_dtype=False)
        KeptStates.of(base_model_of(policy))
        if job.critic is not None:
            _build_critic(job, policy, layers, base_dtype).attach(base_model_of(policy))
    if trained_dtype != base_dtype:
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.to(DTYPES[trained_dtype])
    return policy


def _build_critic(job: Job, policy: Any, layers: int, dtype: str) -> Any:
    if job.critic == ModelCritic.kind:
        return ModelCritic(build_scorer(job.model, layers, dtype))
    settings = {"critic_head": job.critic_head, "critic_trunk_grad": None, "disable_dropout": True, "seed": 0}
    own_adapter = {"critic_lora_r": None, "critic_lora_alpha": None}
    critic: Any = critic_class(str(job.critic)).for_policy(policy, SimpleNamespace(**settings, **own_adapter))
    return critic.to("meta")


def scorer_dtype(job: Job) -> str:
    """Of a reward model's weights: it is loaded as the policy is, and DeepSpeed casts both."""
    return "bfloat16" if job.is_deepspeed else job.dtype or ("float32" if job.is_full else "bfloat16")


def build_scorer(shape: Shape, layers: int, dtype: str) -> Any:
    """A sequence classification model with one output."""
    with _on_meta(dtype):
        config = shape.with_layers(layers)
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config, dtype=DTYPES[dtype])


@dataclass(frozen=True)
class Numbers:
    """
    How many numbers there are, by role. Real numbers of the whole model, not bytes.

    Attributes:
        linear, other (`float`):
            The policy's base: weights of linear layers, which can be quantized, and all others.
        adapter, critic (`float`):
            What is trained beside it.
        reward (`float`):
            An adapter as reward, or a model.
        layer (`float`):
            One layer of the base.
        ends (`float`):
            The embedding or the head: the larger one.
    """

    linear: float
    other: float
    adapter: float
    critic: float
    reward: float
    layer: float
    ends: float

    @property
    def base(self) -> float:
        return self.linear + self.other


def _count(job: Job, layers: int) -> Numbers:
    policy = build_policy(job, layers)
    base = base_model_of(policy)
    head = base.get_output_embeddings()
    linear = other = adapter = critic = 0
    in_linear = {
        id(module.weight) for module in base.modules() if isinstance(module, nn.Linear) and module is not head
    }
    own = set() if job.critic is None else {id(weight) for weight in getattr(base, CRITIC).trained_parameters()}
    own |= set() if job.critic is None else {id(weight) for weight in getattr(base, CRITIC).parameters()}
    for name, weight in policy.named_parameters():
        size = weight.numel()
        if id(weight) in own:
            critic += size
        elif "lora_" in name:
            adapter += size
        elif id(weight) in in_linear:
            linear += size
        else:
            other += size
    reward = 0
    if job.reward == "adapter":
        reward = adapter + base.config.get_text_config().hidden_size
    elif job.reward == "model":
        reward = sum(w.numel() for w in build_scorer(job.reward_model or job.model, layers, "bfloat16").parameters())
    ends = max(base.get_input_embeddings().weight.numel(), head.weight.numel())
    return Numbers(linear, other, adapter, critic, reward, 0.0, ends)


@lru_cache(maxsize=64)
def _numbers(job: Job) -> Numbers:
    few, more = FEW
    first, second = _count(job, few), _count(job, more)
    per_layer = {f.name: (getattr(second, f.name) - getattr(first, f.name)) / (more - few) for f in fields(Numbers)}
    layers = dict.fromkeys(per_layer, job.model.layers)
    if job.reward == "model" and job.reward_model is not None:
        layers["reward"] = job.reward_model.layers
    whole = {name: getattr(first, name) + per_layer[name] * (layers[name] - few) for name in per_layer}
    return Numbers(**whole | {"layer": per_layer["linear"] + per_layer["other"]})


def count_numbers(job: Job) -> Numbers:
    """The numbers of a job's models."""
    return _numbers(job.reduced_to("model", *COUNTED))


def check_layers_are_alike(shape: Shape) -> None:
    """Raises `ValueError` unless a model of all layers has as many numbers as two and four of them let expect."""
    sizes = []
    for layers in (*FEW, shape.layers):
        with _on_meta("bfloat16"):
            model = AutoModelForCausalLM.from_config(shape.with_layers(layers))
        sizes.append(sum(weight.numel() for weight in model.parameters()))
    few, more, whole = sizes
    expected = few + (more - few) // (FEW[1] - FEW[0]) * (shape.layers - FEW[0])
    require(
        expected == whole,
        f"--model is '{shape.name}', whose layers differ in size: {whole:,} numbers, where alike layers had "
        f"{expected:,}. The planner takes one kind of layer for all, and can't tell.",
    )
