"""
Generalised advantage estimation (https://huggingface.co/papers/1506.02438) over the tokens of completions.
"""

import torch


def _discounted_sums(deltas: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """S_t = Σ_l decay^l · deltas_{t+l}, `(B, T)`, by doubling: log2(T) passes instead of T."""
    sums, reach, factor = deltas, 1, decay
    while reach < deltas.size(1):
        # The sum over 2n steps is the sum over n steps, plus the decayed sum over n steps that starts n steps later
        later = torch.nn.functional.pad(sums[:, reach:], (0, reach))
        sums, reach, factor = sums + factor * later, 2 * reach, factor * factor
    return sums


def carried_back(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Rewards `(B, T)` with every reward on a token of the policy: the reward of a token that the policy didn't write
    moves back to the policy's last token before it, and is dropped if there is none.
    """
    columns = torch.arange(mask.size(1), device=mask.device)
    own = torch.where(mask.bool(), columns, -1).cummax(dim=1).values  # the policy's last token so far
    return torch.zeros_like(rewards).scatter_add(1, own.clamp(min=0), rewards * (own >= 0))


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float,
    lam: float | torch.Tensor,
    last_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1} (eq. 11 to 16). λ = 0 is the TD error, λ = 1 the discounted
    Monte-Carlo return minus the value.

    A step is a token that the policy wrote. Tokens of tools and environments in between are no steps: credit crosses
    them without discount, and their rewards count for the policy's last token before them ([`carried_back`]).

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`):
            Reward for each token; 0 in padding.
        values (`torch.Tensor` of shape `(B, T)`):
            V of the state in which each token was written.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on tokens that the policy wrote, 0 on all others and on padding.
        gamma (`float`):
            Discount γ in [0, 1].
        lam (`float` or `torch.Tensor` of shape `(B, 1)`):
            λ in [0, 1].
        last_values (`torch.Tensor` of shape `(B,)`, *optional*):
            V of the state after the last token, for completions that were cut off. `None`: 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(B, T)`: advantages A, and returns A + V, the targets of the
        critic. 0 where the mask is 0.
    """
    mask = mask.bool()
    # The policy's tokens side by side, in their order, so that a step is a column
    order = (~mask).long().argsort(dim=1, stable=True)
    steps = mask.sum(dim=1, keepdim=True)  # (B, 1)
    is_step = torch.arange(mask.size(1), device=mask.device) < steps
    step_rewards = carried_back(rewards, mask).gather(1, order)
    step_values = values.gather(1, order) * is_step
    following = torch.nn.functional.pad(step_values[:, 1:], (0, 1))
    if last_values is not None:
        is_last = torch.arange(mask.size(1), device=mask.device) == steps - 1
        following = torch.where(is_last, last_values.unsqueeze(1), following)
    deltas = (step_rewards + gamma * following - step_values) * is_step
    decay = torch.as_tensor(gamma * lam, device=values.device, dtype=values.dtype)
    advantages = _discounted_sums(deltas, decay) * is_step
    advantages = torch.zeros_like(values).scatter(1, order, advantages)
    return advantages, (advantages + values) * mask


def length_adaptive_lam(lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """
    λ = 1 − 1/(α·length) of VAPO (https://huggingface.co/papers/2504.05118, eq. 7), clamped to [0, 1]: 0 up to a length
    of 1/α (20 tokens with the paper's 0.05), near 1 for long completions.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of each completion.
        alpha (`float`):
            α > 0.

    Returns:
        `torch.Tensor` of shape `(B, 1)`.
    """
    return (1 - 1 / (alpha * lengths.clamp(min=1).float())).clamp(0, 1).unsqueeze(1)
