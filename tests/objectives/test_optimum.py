"""
On a policy small enough to enumerate, DPO and KL-regularised PPO both end at π*(y|x) = π_ref(y|x)·exp(r/β)/Z
(https://huggingface.co/papers/2305.18290, eq. 4).

A completion is the end, or one of two words and then a word or the end: seven in all. The policy is a table with a
logit for every state and token, so that it can be any distribution over them.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from distributed.dpo_worker import pairs, settings

import trl_ext
from trl_ext.objectives.gae import gae
from trl_ext.objectives.kl import kl_estimate


BETA = 0.5
TOKENS = [2, 4, 5]  # the end, and two words
COMPLETIONS = [[2], [4, 2], [4, 4], [4, 5], [5, 2], [5, 4], [5, 5]]
PROMPTS = [20, 21]
# exp(r) of every completion. Integers, because the share of pairs in which y wins against z, exp(r_y)/(exp(r_y) +
# exp(r_z)), is then exact with exp(r_y) pairs of the one kind and exp(r_z) of the other.
WINS = [[1, 2, 1, 3, 4, 1, 2], [3, 1, 1, 2, 1, 2, 4]]
REWARDS = torch.tensor(WINS, dtype=torch.float64).log()  # (2, 7)


class Table(torch.nn.Module):
    """A logit for every prompt, state (the beginning, or after either word) and token."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed or 0)
        logits = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
        self.table = torch.nn.Parameter(logits if seed is not None else torch.zeros_like(logits))

    def forward(self, input_ids: torch.Tensor, labels: Any = None, **kwargs: Any) -> Any:
        """Logits of the next token `(B, T, V)`, or, as TRL's fused head returns them, log-probabilities `(B, T−1)`."""
        prompt = torch.tensor([PROMPTS.index(int(ids[0])) for ids in input_ids])
        state = torch.where(input_ids == 4, 1, torch.where(input_ids == 5, 2, 0))
        scores = torch.full((*input_ids.shape, 24), -torch.inf, dtype=torch.float64)
        scores[..., TOKENS] = self.table[prompt.unsqueeze(1), state]
        if labels is None:
            return SimpleNamespace(logits=scores)
        asked = labels[:, 1:] != -100
        target = input_ids[:, 1:].masked_fill(~asked, 2)
        logps = scores[:, :-1].log_softmax(dim=2).gather(2, target.unsqueeze(2)).squeeze(2)
        nothing = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps.where(asked, 0.0), entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    def token_logps(self) -> torch.Tensor:
        """Of every completion's tokens, `(2, 7, 2)`, zero after the end."""
        logps = self.table.log_softmax(dim=2)
        first = logps[:, 0, [TOKENS.index(ids[0]) for ids in COMPLETIONS]]
        second = [logps[:, TOKENS.index(ids[0]), TOKENS.index(ids[-1])] * (len(ids) == 2) for ids in COMPLETIONS]
        return torch.stack([first, torch.stack(second, dim=1)], dim=2)

    def probabilities(self) -> torch.Tensor:
        """Of every completion, `(2, 7)`."""
        return self.token_logps().sum(dim=2).exp().detach()


MASK = torch.tensor([[1, len(ids) - 1] for ids in COMPLETIONS]).repeat(2, 1, 1).double()  # (2, 7, 2)


def closed_form(reference: Table, rewards: torch.Tensor = REWARDS) -> torch.Tensor:
    weights = reference.probabilities() * (rewards / BETA).exp()
    return weights / weights.sum(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def reference():
    return Table(seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def trainer(reference, tmp_path_factory):
    """DPO's loss, with the table in the place of the reference."""
    trainer = trl_ext.DPOTrainer(
        tiny.qwen2(),
        ref_model=tiny.qwen2(),
        args=trl_ext.DPOConfig(**settings(tmp_path_factory.mktemp("dpo"), beta=BETA), share_prefixes=False),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
    )
    trainer.ref_model = reference
    return trainer


def all_pairs(flipped: bool = False) -> list[dict[str, list[int]]]:
    """Every pair of completions, as often as the one wins against the other."""
    rows = []
    for prompt, wins in zip(PROMPTS, WINS, strict=True):
        for i, better in enumerate(COMPLETIONS):
            for j, worse in enumerate(COMPLETIONS):
                won = wins[j] if flipped else wins[i]
                row = {"prompt_ids": [prompt], "chosen_ids": better, "rejected_ids": worse}
                rows += [row] * won * (i != j)
    return rows


def dpo_optimum(trainer: Any, rows: list[dict[str, list[int]]]) -> Table:
    """The minimum of TRL's loss over all those pairs."""
    policy, inputs = Table(seed=None), trainer.data_collator(rows)
    optimizer = torch.optim.LBFGS(
        policy.parameters(), max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = trainer._compute_loss(policy, inputs, return_outputs=False)
        loss.backward()
        return loss

    optimizer.step(closure)
    return policy


def ppo_optimum(reference: Table, rewards: torch.Tensor, lam: float = 0.95) -> Table:
    """
    PPO without sampling: every completion, with its probability as weight, and a critic that is never wrong. The KL is
    in the reward, token by token. Two steps on the clipped surrogate for each roll-out.
    """
    policy, ref_logps = Table(seed=None), reference.token_logps()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.994)
    last = MASK.sum(dim=2).long() - 1
    for _ in range(1000):
        old = policy.token_logps().detach()
        weights = old.sum(dim=2).exp()
        step_rewards = -BETA * kl_estimate(old, ref_logps, "k1")
        step_rewards.scatter_add_(2, last.unsqueeze(2), rewards.unsqueeze(2))
        step_rewards = step_rewards * MASK
        advantages, _ = gae(
            step_rewards.flatten(0, 1), values(step_rewards, weights).flatten(0, 1), MASK.flatten(0, 1), 1.0, lam
        )
        advantages = advantages.view_as(MASK)
        for _ in range(2):
            ratio = (policy.token_logps() - old).exp()
            surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            optimizer.zero_grad()
            (-(weights.unsqueeze(2) * surrogate * MASK).sum()).backward()
            optimizer.step()
        schedule.step()
    return policy


def values(step_rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What is to come, on average, before each token: `(2, 7, 2)`."""
    to_come = step_rewards.flip(2).cumsum(dim=2).flip(2)
    found = torch.zeros_like(step_rewards)
    found[:, :, 0] = (weights * to_come[:, :, 0]).sum(dim=1, keepdim=True)
    for rows in (slice(1, 4), slice(4, 7)):  # those that begin with the same word
        share = weights[:, rows] / weights[:, rows].sum(dim=1, keepdim=True)
        found[:, rows, 1] = (share * to_come[:, rows, 1]).sum(dim=1, keepdim=True)
    return found


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_the_table_is_a_distribution_and_its_two_faces_agree(reference, trainer):
    torch.testing.assert_close(reference.probabilities().sum(dim=1), torch.ones(2, dtype=torch.float64))
    inputs = trainer.data_collator(all_pairs()[:1])
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    logps = reference(inputs["input_ids"], labels=labels).log_probs.sum(dim=1)
    chosen, rejected = (COMPLETIONS.index(all_pairs()[0][f"{side}_ids"]) for side in ("chosen", "rejected"))
    torch.testing.assert_close(logps.exp(), reference.probabilities()[0, [chosen, rejected]])


@pytest.mark.train
def test_dpos_optimum_is_the_closed_form(reference, trainer):
    found, wanted = dpo_optimum(trainer, all_pairs()).probabilities(), closed_form(reference)
    same(found, wanted)
    assert (wanted - reference.probabilities()).abs().max() > 0.1  # far from where it began
    same(dpo_optimum(trainer, all_pairs(flipped=True)).probabilities(), closed_form(reference, -REWARDS))


@pytest.mark.train
@pytest.mark.parametrize("lam", [0.95, 1.0, 0.0])
def test_ppos_optimum_is_the_closed_form(lam, reference):
    same(ppo_optimum(reference, REWARDS, lam).probabilities(), closed_form(reference))


@pytest.mark.train
def test_ppo_on_dpos_implicit_reward_ends_where_dpo_did(reference, trainer):
    """r = β·log π*/π_ref is the true reward but for a constant of the prompt, −β·log Z, which moves nothing."""
    policy = dpo_optimum(trainer, all_pairs())
    implicit = trl_ext.ImplicitReward(policy, reference, BETA, trainer.processing_class)
    prompts = [trainer.processing_class.decode([prompt]) for prompt in PROMPTS for _ in COMPLETIONS]
    rewards = torch.tensor(implicit(prompts, prompts, COMPLETIONS * 2), dtype=torch.float64).view(2, 7)
    rewards_less_mean, true_less_mean = (r - r.mean(dim=1, keepdim=True) for r in (rewards, REWARDS))
    same(rewards_less_mean, true_less_mean)
    same(ppo_optimum(reference, rewards).probabilities(), policy.probabilities())
