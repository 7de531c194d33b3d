"""
Fits a critic to completions whose rewards are known, before PPO's first step: the value pretraining of VAPO
(https://huggingface.co/papers/2504.05118, sec. 4.1), on rollouts that were sampled for something else.

The target of token t of a completion of T tokens with the reward R is the Monte-Carlo return γ^(T−1−t)·R, in the units
of the trainer's own rewards (`reward_scaling`, `reward_clip`, `missing_eos_penalty`), without the KL to the reference.
So what is learned is the value of the policy that wrote the completions. A reward by step counts at the end here.
Nothing but the critic moves, and neither random states nor the trainer's optimizer are touched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import require, require_count
from ..objectives.credit import completions_that_end, token_rewards
from ..objectives.gae import gae
from ..objectives.values import explained_variance
from ..roles.critic import logps_and_values
from .ppo import PPOTrainer


@dataclass(frozen=True)
class ScoredCompletion:
    """
    A completion whose rewards are known.

    Args:
        prompt_ids, completion_ids (`list[int]`):
            Token ids.
        score (`float`):
            Weighted sum of its rewards.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    score: float


def fit_values(
    trainer: PPOTrainer, completions: Sequence[ScoredCompletion], epochs: int = 1, seed: int = 0
) -> dict[str, float]:
    """
    Fit a trainer's critic, before its training. Every process must make the call, with the same completions.

    Args:
        trainer ([`PPOTrainer`]):
            A trainer that hasn't begun. Its running scale of rewards sees the scores, its critic learns with
            `critic_learning_rate` from `per_device_train_batch_size` completions a step.
        completions (`Sequence[ScoredCompletion]`):
            Completions with finite scores. Empty ones are left out.
        epochs (`int`, *optional*, defaults to `1`):
            Passes over the completions.
        seed (`int`, *optional*, defaults to `0`):
            Seed of their order.

    Returns:
        `dict[str, float]`: `steps`, `completions`, and `explained_variance`, the share of the returns' variance that
        values predicted in the last pass, each before it was learned from in that pass.

    Raises:
        ValueError: if there are no completions, or weights are sharded over processes.
    """
    require_count("epochs", epochs)
    accelerator = trainer.accelerator
    require(
        not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled),
        "A critic is fitted before an engine takes over the weights, which DeepSpeed and FSDP shard. Use DDP, or "
        "leave the fitting out.",
    )
    completions = [completion for completion in completions if completion.completion_ids]
    require(bool(completions), "There are no completions to fit the critic to. Leave the fitting out.")
    scores = torch.tensor([completion.score for completion in completions])
    deviation = trainer.reward_deviation(scores, training=True)
    critic, args = trainer.critic, trainer.args
    assert args.critic_learning_rate is not None
    parameters = critic.trained_parameters()
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(
        parameters, args.critic_learning_rate, betas, args.adam_epsilon, weight_decay=args.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    size, rank = args.per_device_train_batch_size, accelerator.process_index
    predicted: list[torch.Tensor] = []
    with _only(trainer.model, parameters):
        for _ in range(epochs):
            predicted = []
            order = torch.randperm(len(completions), generator=generator)
            for batch in order.split(size * accelerator.num_processes):
                # A process whose share is empty takes the first completion, with weight 0
                own = batch[rank :: accelerator.num_processes].tolist()
                rows = [completions[i] for i in own or batch[:1].tolist()]
                values, returns, mask = _values_and_returns(trainer, rows, deviation)
                mask = mask * bool(own)
                tokens = accelerator.reduce(mask.sum().float(), reduction="sum")
                loss = 0.5 * ((values - returns).square() * mask).sum() / tokens
                optimizer.zero_grad()
                loss.backward()
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad = accelerator.reduce(parameter.grad, reduction="sum")
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or float("inf"))
                optimizer.step()
                found = torch.stack([values.detach()[mask.bool()], returns[mask.bool()]])
                predicted.append(found)
    optimizer.zero_grad()
    values, returns = torch.cat(predicted, dim=1)

    def over_processes(sums: torch.Tensor) -> torch.Tensor:
        reduced: torch.Tensor = accelerator.reduce(sums, reduction="sum")
        return reduced

    explained = explained_variance(values, returns, torch.ones_like(values), over_processes)
    steps = epochs * -(-len(completions) // (size * accelerator.num_processes))
    return {"steps": steps, "completions": len(completions), "explained_variance": explained}


@contextmanager
def _only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within this context nothing of a model but these parameters gets gradients, and there is no dropout."""
    own = {id(parameter) for parameter in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    training = model.training
    model.eval()
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
        model.train(training)


def _values_and_returns(
    trainer: PPOTrainer, rows: Sequence[ScoredCompletion], deviation: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(B, T)` each: V of the states in which tokens were written, their returns, and 1 on tokens."""
    device = trainer.accelerator.device

    def padded(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        whole = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        sizes = torch.tensor([len(row) for row in ids]).unsqueeze(1)
        return whole.to(device), (torch.arange(whole.size(1)) < sizes).long().to(device)

    _, state_values = logps_and_values(trainer.model, *padded([row.prompt_ids + row.completion_ids for row in rows]))
    completion_ids, mask = padded([row.completion_ids for row in rows])
    starts = torch.tensor([len(row.prompt_ids) for row in rows], device=device).unsqueeze(1)
    # A token was written in the state after the token before it
    columns = starts - 1 + torch.arange(mask.size(1), device=device)
    values = state_values.float().gather(1, columns.clamp(max=state_values.size(1) - 1)) * mask
    earned = token_rewards(
        torch.tensor([[row.score] for row in rows], device=device),
        torch.ones(1, device=device),
        [{} for _ in rows],
        mask,
        completions_that_end(completion_ids, mask, trainer.eos_token_ids),
        deviation=deviation,
        clip=trainer.args.reward_clip,
        missing_eos_penalty=trainer.args.missing_eos_penalty,
    )
    _, returns = gae(earned, torch.zeros_like(values), mask, trainer.args.gamma, 1.0)
    return values, returns, mask
