"""
Which passes of a trainer share prompts, and how TRL's passes get to share them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import trl
from accelerate.logging import get_logger

from ...roles.critic import base_model_of, critic_of
from ...rollouts.distinct_rows import distinct_rows
from ...rollouts.exactness import needs_full_width
from ...rollouts.prefix_exactness import common_window, pass_cost, sharing_obstacles
from ...rollouts.prefix_trees import Cost
from ...rollouts.shared_pass import SharedPass, Sharing


logger = get_logger(__name__)


def attention_of(model: Any) -> str | None:
    """The `attn_implementation` of a model."""
    name: str | None = getattr(model.config, "_attn_implementation", None)
    return name


def sharing_of(trainer: trl.GRPOTrainer | trl.DPOTrainer, always: bool = False) -> tuple[Sharing, list[str]]:
    """
    What the passes of a trainer may share, and why nothing, if they mustn't.

    Args:
        trainer ([`~trl.GRPOTrainer`] or [`~trl.DPOTrainer`]):
            TRL's or ours, constructed.
        always (`bool`):
            Share whatever can be shared, at any cost.
    """
    unwrap: Any = trainer.accelerator.unwrap_model
    args: Any = trainer.args
    policy, critic = unwrap(trainer.model), critic_of(unwrap(trainer.model))
    models = [unwrap(model) for model in (trainer.model, trainer.ref_model) if model is not None]
    attention = attention_of(policy)
    found = [obstacle for model in models for obstacle in sharing_obstacles(model, attention)]
    obstacles = list(dict.fromkeys(found))
    if trainer.aux_loss_enabled:
        obstacles.append("the auxiliary loss counts every token of a micro-batch")
    reads = critic is not None and critic.reads_token_ids
    if reads:
        own: Any = getattr(critic, "backbone", critic)
        obstacles += [f"critic: {obstacle}" for obstacle in sharing_obstacles(own, attention)]
        models.append(own)
    if any(attention_of(model) != attention for model in models):
        obstacles.append("policy, reference and critic differ in their attn_implementation")
    # A second call of the model on one process alone would leave the others waiting in its collectives
    alone = trainer.accelerator.num_processes == 1 and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
    window = common_window(models)
    sharing = Sharing(
        Cost(0.0) if obstacles else pass_cost(policy, trainer.accelerator.device.type),
        attention=attention,
        pack=not obstacles,
        cache=not obstacles and alone and not reads and window is None,
        always=always,
        multiple=int(args.pad_to_multiple_of or 1),
        window=window,
        full_width_from=min((width.columns for width in map(needs_full_width, models) if width), default=None),
    )
    return sharing, obstacles


def sharing_wanted(
    trainer: trl.GRPOTrainer | trl.DPOTrainer, share_prefixes: bool | str
) -> tuple[Sharing | None, list[str]]:
    """
    [`sharing_of`] for the argument `share_prefixes` of a configuration: nothing if it is off. What is not shared is
    logged once.
    """
    if not share_prefixes:
        return None, []
    sharing, obstacles = sharing_of(trainer, always=share_prefixes == "always")
    said = list(obstacles)
    if not said and sharing.window is not None and not sharing.any_length:
        said.append(f"no mask keeps to the sliding window in rows of over {sharing.window.tokens} tokens")
    if said:
        logger.warning(
            f"Each completion computes its prompt anew, so that the gradient is exactly TRL's: {'; '.join(said)}."
        )
    return sharing, obstacles


@contextmanager
def sharing_forwards(trainer: Any, sharing: Sharing | None) -> Iterator[None]:
    """
    Within this context, forward passes of the policy and the reference of a trainer share prompts. For methods of TRL
    that don't take the model as an argument.
    """
    unwrap: Any = trainer.accelerator.unwrap_model
    models = {id(base): base for base in (base_model_of(unwrap(m)) for m in (trainer.model, trainer.ref_model) if m)}
    before = {number: base.forward for number, base in models.items()}  # that with TRL's fused head
    try:
        if sharing is not None:
            for number, base in models.items():
                shared = SharedPass(before[number], sharing, base)
                base.forward = distinct_rows(shared, sharing) if sharing.pack else shared
        yield
    finally:
        for number, base in models.items():
            base.forward = before[number]


def sharing_prefixes(forward: Callable[..., Any], sharing: Sharing | None, unwrap: Any) -> Callable[..., Any]:
    """
    TRL's pass `forward` (`_get_per_token_logps_and_entropies`, bound), with a
    [`~trl_ext.rollouts.shared_pass.SharedPass`] in place of its model. `unwrap` is the accelerator's `unwrap_model`.
    """
    if sharing is None:
        return forward
    signature = inspect.signature(forward)

    @wraps(forward)
    def with_sharing(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        model, columns = given.arguments["model"], given.arguments["logits_to_keep"]
        given.arguments["model"] = SharedPass(model, sharing, base_model_of(unwrap(model)), columns)
        return forward(*given.args, **given.kwargs)

    return with_sharing
