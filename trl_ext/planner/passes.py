"""
What passes take: a forward and a backward pass of an update, the passes without gradients, and the first pass of
generation, at their real size on fake tensors ([`~trl_ext.trainers.seams.fake_passes`]). Weights and gradients of
weights are not counted here; activations, the fused head's tiles and what the loss keeps are.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..roles.critic import base_model_of, critic_of
from ..roles.switching import using_adapter
from ..trainers.seams.fake_passes import LiveBytes, head_as_on_gpus, make_fake
from .job import Job
from .models import FEW, build_policy, build_scorer, scorer_dtype
from .shapes import Shape


# What the passes of a job depend on, beside the types of weights
POLICY = ("lora_r", "lora_target_modules", "critic", "critic_head", "dtype")
OF_UPDATE = (
    *("gradient_checkpointing", "prompt_tokens", "completion_tokens", "per_device_train_batch_size"),
    *("share_prefixes", "num_generations", "reference"),
)


def _key(job: Job, *names: str) -> Job:
    """A job that is equal to others with the same passes. Strategies only decide on the types of weights."""
    return job.reduced_to(*POLICY, *names).but(strategy="ddp" if job.computes_on_copies else "zero3")


@dataclass(frozen=True)
class UpdateBytes:
    """
    Bytes of one micro-batch.

    Attributes:
        kept (`float`):
            Kept from the forward for the backward pass.
        forward, backward (`float`):
            The most that is alive at once in each, with what is kept.
    """

    kept: float
    forward: float
    backward: float

    @property
    def peak(self) -> float:
        return max(self.forward, self.backward)


def _autocast(job: Job, keeps_copies: bool = True) -> AbstractContextManager[Any]:
    """As transformers' trainer computes: in bfloat16, whatever the type of the weights. DeepSpeed has cast them."""
    cast = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=keeps_copies)
    return cast if job.computes_on_copies else nullcontext()


def _inputs(job: Job, rows: int, columns: int, mask: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.zeros((rows, columns), dtype=torch.long)
    if job.share_prefixes and job.batch_shape == (rows, columns):
        # Branches of one prompt: a mask of who sees whom, and positions that begin anew
        seen = torch.ones((rows, 1, columns, columns), dtype=torch.bool)
        return {"input_ids": ids, "attention_mask": seen, "position_ids": torch.zeros_like(ids)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if mask else {"input_ids": ids}


def _loss_of(job: Job, outputs: Any, reference: torch.Tensor | None) -> torch.Tensor:
    """A loss that keeps what the trainers' keep: numbers for each token of the completions."""
    logps = outputs.log_probs.float()
    if reference is not None:
        logps = logps - reference
    loss = -(torch.exp(logps - logps.detach()) * torch.ones_like(logps)).mean()
    values = getattr(outputs, "state_values", None)
    return loss if values is None else loss + values.float().pow(2).mean()


class _Stages:
    """
    The most that is alive at once before the first pass of a backbone, and from each pass to the next. What is kept
    grows with the layers of all passes so far: of two sizes of a model, stages are in proportion, but not the most of
    all of them.
    """

    def __init__(self, model: Any, live: LiveBytes) -> None:
        self._live, self._peaks = live, list[float]()
        critic = critic_of(model)
        backbones = [base_model_of(model).base_model]
        if critic is not None and critic.reads_token_ids and critic.backbone not in backbones:
            backbones.append(critic.backbone)
        for backbone in backbones:
            backbone.register_forward_pre_hook(self._begin)

    def _begin(self, *_: Any) -> None:
        self._peaks.append(float(self._live.peak))
        self._live.reset_peak()

    def so_far(self) -> tuple[float, ...]:
        return (*self._peaks, float(self._live.peak))


def _at(layers: int, few: Sequence[float], more: Sequence[float]) -> list[float]:
    """What a model with that many layers takes, from what two smaller ones do."""
    step = FEW[1] - FEW[0]
    return [a + (b - a) / step * (layers - FEW[0]) for a, b in zip(few, more, strict=True)]


def _measure_update(job: Job, layers: int) -> tuple[float, float, tuple[float, ...]]:
    """Kept, the most of the backward pass, and that of the forward pass by stages."""
    policy = build_policy(job, layers)
    base = base_model_of(policy)
    if job.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        if not job.is_full:
            base.enable_input_require_grads()
    fake = make_fake(policy)
    policy.train()
    rows, columns = job.batch_shape
    with fake, head_as_on_gpus():
        for weight in policy.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        known = [*policy.parameters(), *policy.buffers()]
        known += [weight.grad for weight in policy.parameters() if weight.grad is not None]
        with LiveBytes(known) as live:
            stages = _Stages(policy, live)
            inputs = _inputs(job, rows, columns)
            labels = torch.zeros((rows, job.scored_columns), dtype=torch.long)
            with _autocast(job):  # which keeps what it casts
                outputs = policy(**inputs, labels=labels, fused_lm_head=True)
                reference = None
                if not job.samples and job.reference is not None:
                    # DPO's pass of the reference comes while the policy's activations wait for the backward pass
                    switched = using_adapter(policy, None) if job.reference == "adapter" else nullcontext()
                    with torch.no_grad(), switched:
                        reference = policy(**inputs, labels=labels, fused_lm_head=True).log_probs
                loss = _loss_of(job, outputs, reference)
                del outputs, reference
            kept, forward = live.bytes, stages.so_far()
            live.reset_peak()
            loss.backward()
            return kept, live.peak, forward


@lru_cache(maxsize=256)
def _update(job: Job) -> UpdateBytes:
    few, more = (_measure_update(job, layers) for layers in FEW)
    kept, backward = _at(job.model.layers, few[:2], more[:2])
    return UpdateBytes(kept, max(_at(job.model.layers, few[2], more[2])), backward)


def update_bytes(job: Job) -> UpdateBytes:
    """What a micro-batch of an update takes."""
    return _update(_key(job, *OF_UPDATE))


@dataclass(frozen=True)
class _Pass:
    """
    A pass without gradients.

    Attributes:
        rows, columns, scored (`int`):
            Of its inputs, and columns with a label. 0: hidden states are all that is asked for.
        scorer ([`Shape`], *optional*):
            Of a reward model that makes it in place of the policy.
        casts, keeps_copies (`bool`):
            Whether autocast is on, and whether it keeps a copy of each weight that it casts.
        generates (`bool`):
            Whether it ends in the logits of each row's last token.
    """

    rows: int
    columns: int
    scored: int = 0
    scorer: Shape | None = None
    casts: bool = True
    keeps_copies: bool = True
    generates: bool = False


def _measure_without_gradients(job: Job, asked: _Pass, layers: int) -> tuple[float, ...]:
    scorer = asked.scorer
    model: Any = build_policy(job, layers) if scorer is None else build_scorer(scorer, layers, scorer_dtype(job))
    fake = make_fake(model)
    model.eval()
    cast = _autocast(job, asked.keeps_copies) if asked.casts else nullcontext()
    weights = [*model.parameters(), *model.buffers()]
    with fake, head_as_on_gpus(), torch.no_grad(), LiveBytes(weights) as live, cast:
        stages = _Stages(model, live) if scorer is None else None
        inputs = _inputs(job, asked.rows, asked.columns)
        if scorer is not None:
            outputs = model.base_model(**inputs)  # TRL lets it keep the keys and values of all layers
            del outputs
        elif asked.scored:
            labels = torch.zeros((asked.rows, asked.scored), dtype=torch.long)
            model(**inputs, labels=labels, fused_lm_head=True)
        elif asked.generates:
            base_model_of(model)(**inputs, use_cache=False, logits_to_keep=1)
        else:
            base_model_of(model).base_model(**inputs, use_cache=False)
        return (float(live.peak),) if stages is None else stages.so_far()


@lru_cache(maxsize=256)
def _without_gradients(job: Job, asked: _Pass) -> float:
    # One layer's activations at a time: their number matters only where something of every layer is kept
    keeps = asked.scorer is not None or (asked.casts and asked.keeps_copies and job.computes_on_copies)
    few, *more = (_measure_without_gradients(job, asked, layers) for layers in (FEW if keeps else FEW[:1]))
    return max(_at((asked.scorer or job.model).layers, few, more[0] if more else few))


def scoring_pass_bytes(job: Job) -> float:
    """A pass of the policy or the reference for log-probabilities and values, without gradients."""
    return _without_gradients(_key(job, *OF_UPDATE), _Pass(*job.batch_shape, job.scored_columns))


def _without_critic(job: Job) -> Job:
    """With the smallest one, which takes no part in a pass of the backbone."""
    return job.but(critic="head", critic_head="linear") if job.critic else job


def generating_pass_bytes(job: Job, columns: int) -> float:
    """A pass over that many tokens of each completion of a generation batch, without its cache."""
    # What Accelerate makes cast is the forward of the whole model. PEFT generates with the model inside
    asked = _Pass(job.rollouts, columns, casts=job.is_full, generates=True)
    return _without_gradients(_key(_without_critic(job)), asked)


def prefill_bytes(job: Job) -> float:
    """The pass that reads all prompts of a generation batch, without its cache."""
    return generating_pass_bytes(job, job.prompt_tokens)


def reward_pass_bytes(job: Job) -> float:
    """A pass of the reward: an adapter scores as many rows at once as a micro-batch has, TRL's models score all."""
    if job.reward is None:
        return 0.0
    key = _key(_without_critic(job))
    if job.reward == "adapter":
        asked = _Pass(job.rows, job.tokens, keeps_copies=False)  # of what is frozen
    else:
        # In inference mode
        asked = _Pass(job.rollouts, job.tokens, scorer=job.reward_model or job.model, keeps_copies=False)
    return _without_gradients(key, asked)
