"""
GSPO-token's ratio (https://huggingface.co/papers/2507.18071, eq. 7, 13, 14) and the ratio of a whole sequence in pure
torch. That TRL's loss on them is GSPO and RLOO is tested on real trainers, in tests/trainers/.
"""

import math

import pytest
import torch

from trl_ext.objectives.ratios import mean_log_ratio, sequence_product_old_logps, sequence_token_old_logps


def batch(seed: int = 0, rows: int = 5, columns: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities under the policy (with gradient) and the old policy, and a mask with gaps and padding."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(rows, columns, generator=generator)
    old = logps + 0.3 * torch.randn(rows, columns, generator=generator)
    mask = (torch.arange(columns) < torch.randint(2, columns + 1, (rows, 1), generator=generator)).long()
    mask[0, 1] = 0  # a token that an environment wrote
    return logps.requires_grad_(), old, mask


def clipped_surrogate(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """min(r A, clip(r) A), PPO's."""
    return torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def gspo_token(logps, old, mask, advantages, low, high):
    """Eq. 13 as a token-level loss on the package's old log-probabilities."""
    ratio = torch.exp(logps - sequence_token_old_logps(logps, old, mask))
    surrogate = clipped_surrogate(ratio, advantages, low, high)
    return ((surrogate * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def slow_sequence_ratios(logps, old, mask) -> list[float]:
    """s_i = (π(o_i)/π_old(o_i))^(1/|o_i|), as a product of probabilities."""
    ratios = []
    for new_row, old_row, mask_row in zip(logps.tolist(), old.tolist(), mask.tolist(), strict=True):
        new_probability, old_probability, length = 1.0, 1.0, 0
        for new, before, counts in zip(new_row, old_row, mask_row, strict=True):
            if counts:
                new_probability *= math.exp(new)
                old_probability *= math.exp(before)
                length += 1
        ratios.append((new_probability / old_probability) ** (1 / length) if length else 1.0)
    return ratios


def test_mean_log_ratio_by_hand():
    # Row 1: ((−1 + 1.5) + (−2 + 1)) / 2 = −0.25, the third token is masked. Row 2: (−1 + 4) / 1. Row 3: no token.
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-9.0, -1.0, -9.0], [-1.0, -1.0, -1.0]])
    old = torch.tensor([[-1.5, -1.0, -9.0], [-1.0, -4.0, -1.0], [-2.0, -2.0, -2.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(mean_log_ratio(logps, old, mask), torch.tensor([[-0.25], [3.0], [0.0]]))
    # logp − log s on the first row: −1 + 0.25, −2 + 0.25
    expected = torch.tensor([-0.75, -1.75])
    torch.testing.assert_close(sequence_token_old_logps(logps, old, mask)[0, :2], expected)


@pytest.mark.parametrize("seed", range(3))
def test_mean_log_ratio_slow_twin(seed):
    logps, old, mask = batch(seed)
    slow = torch.tensor(slow_sequence_ratios(logps, old, mask)).unsqueeze(1)
    torch.testing.assert_close(mean_log_ratio(logps, old, mask).exp().detach(), slow)


def test_padding_content_does_not_matter():
    logps, old, mask = batch()
    padded, padded_old = logps.detach().clone(), old.clone()
    padded[mask == 0], padded_old[mask == 0] = -55.0, 1234.0
    assert torch.equal(mean_log_ratio(logps, old, mask), mean_log_ratio(padded, padded_old, mask))
    kept = mask.bool()
    first, second = sequence_token_old_logps(logps, old, mask), sequence_token_old_logps(padded, padded_old, mask)
    assert torch.equal(first[kept], second[kept])


def test_every_token_has_the_sequence_ratio_in_value_and_its_own_gradient():
    # Eq. 14: s_it = sg[s_i] · π_t/sg[π_t]. Its value is s_i; ∂s_it/∂logp_u is s_i for u = t and 0 otherwise.
    logps, old, mask = batch()
    ratios = torch.tensor(slow_sequence_ratios(logps, old, mask))
    token_ratio = torch.exp(logps - sequence_token_old_logps(logps, old, mask))
    torch.testing.assert_close(token_ratio.detach(), ratios.unsqueeze(1).expand_as(mask))
    for t in range(3):
        gradient = torch.autograd.grad(token_ratio[:, t].sum(), logps, retain_graph=True)[0]
        expected = torch.zeros_like(gradient)
        expected[:, t] = ratios
        torch.testing.assert_close(gradient, expected)


def test_returns_no_gradient():
    logps, old, mask = batch()
    assert not sequence_token_old_logps(logps, old, mask).requires_grad


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.08), (10.0, 10.0)], ids=["clipped", "unclipped"])
def test_equals_gspo_when_the_advantage_is_constant_over_a_sequence(low, high):
    logps, old, mask = batch()
    advantages = torch.tensor([[1.0], [-2.0], [0.5], [-0.1], [3.0]])
    # GSPO, eq. 5, written down directly
    sequence_ratio = torch.exp(((logps - old) * mask).sum(dim=1) / mask.sum(dim=1)).unsqueeze(1)
    gspo = clipped_surrogate(sequence_ratio, advantages, low, high).mean()
    token = gspo_token(logps, old, mask, advantages, low, high)
    torch.testing.assert_close(token, gspo)
    expected = torch.autograd.grad(gspo, logps)[0]
    assert expected.abs().sum() > 0
    torch.testing.assert_close(torch.autograd.grad(token, logps)[0], expected)


def test_slow_twin_with_advantages_per_token():
    # Eq. 13: Σ_i 1/G 1/|o_i| Σ_t min(s_it A_it, clip(s_it) A_it), whose gradient on logp_it is A_it s_i/(G |o_i|)
    # where the unclipped branch is the smaller one, 0 elsewhere: clipped above means s > 1 + high and A > 0, below
    # means s < 1 − low and A < 0.
    low, high = 0.05, 0.08
    logps, old, mask = batch()
    advantages = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    value, gradient = 0.0, torch.zeros_like(logps)
    clipped = 0
    for i, s in enumerate(slow_sequence_ratios(logps, old, mask)):
        length = int(mask[i].sum())
        for t in range(mask.size(1)):
            if not mask[i, t]:
                continue
            a = advantages[i, t].item()
            is_clipped = (s > 1 + high and a > 0) or (s < 1 - low and a < 0)
            clipped += is_clipped
            bound = 1 + high if a > 0 else 1 - low
            value += (bound * a if is_clipped else s * a) / length / len(mask)
            gradient[i, t] = 0.0 if is_clipped else a * s / length / len(mask)
    assert 0 < clipped < mask.sum()  # or the test would see one branch only
    loss = gspo_token(logps, old, mask, advantages, low, high)
    torch.testing.assert_close(loss.detach(), torch.tensor(value))
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], gradient)


def test_differs_from_gspo_when_the_advantage_is_not_constant():
    # GSPO would spread the mean advantage over all tokens of a sequence; GSPO-token credits each with its own
    logps, old, mask = batch()
    advantages = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    mean = (advantages * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
    wide = 10.0
    own = torch.autograd.grad(gspo_token(logps, old, mask, advantages, wide, wide), logps)[0]
    spread = torch.autograd.grad(gspo_token(logps, old, mask, mean, wide, wide), logps)[0]
    assert (own - spread).abs().max() > 0.01


def test_clip_does_nothing_at_ratio_one():
    logps, _, mask = batch()
    advantages = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad(gspo_token(logps, logps.detach(), mask, advantages, *clip), logps)[0]
        for clip in [(3e-4, 4e-4), (10.0, 10.0)]
    ]
    assert torch.equal(*gradients)
    # and it is the plain policy gradient
    torch.testing.assert_close(gradients[0], advantages * mask / mask.sum(dim=1, keepdim=True) / len(mask))


class TestSequenceProduct:
    def test_by_hand(self):
        # Row 1: log r = (−1 + 1.5) + (−2 + 1) = −0.5, the third token is masked. Row 2: −1 + 4. Row 3: no token.
        logps = torch.tensor([[-1.0, -2.0, -3.0], [-9.0, -1.0, -9.0], [-1.0, -1.0, -1.0]])
        old = torch.tensor([[-1.5, -1.0, -9.0], [-1.0, -4.0, -1.0], [-2.0, -2.0, -2.0]])
        mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
        found = sequence_product_old_logps(logps, old, mask)
        expected = torch.tensor([[-0.5, -1.5, -2.5], [-12.0, -4.0, -12.0], [-1.0, -1.0, -1.0]])
        torch.testing.assert_close(found, expected)
        # TRL's mean over tokens of logp − these is log r
        torch.testing.assert_close(mean_log_ratio(logps, found, mask), torch.tensor([[-0.5], [3.0], [0.0]]))

    @pytest.mark.parametrize("seed", range(3))
    def test_value_and_gradient_are_those_of_the_whole_sequence(self, seed):
        # r = Π_t π(o_t)/π_old(o_t), the |o|-th power of GSPO's ratio; ∂r/∂logp_t = r on every token of the sequence
        logps, old, mask = batch(seed)
        lengths = mask.sum(dim=1)
        slow = torch.tensor(slow_sequence_ratios(logps, old, mask)) ** lengths
        ratio = mean_log_ratio(logps, sequence_product_old_logps(logps, old, mask), mask).exp().squeeze(1)
        torch.testing.assert_close(ratio.detach(), slow)
        gradient = torch.autograd.grad(ratio.sum(), logps)[0]
        torch.testing.assert_close(gradient, slow.unsqueeze(1) * mask)

    def test_is_one_before_an_update(self):
        logps, _, mask = batch()
        assert torch.equal(sequence_product_old_logps(logps, logps.detach(), mask), logps)

    def test_padding_content_does_not_matter(self):
        logps, old, mask = batch()
        padded, padded_old = logps.detach().clone(), old.clone()
        padded[mask == 0], padded_old[mask == 0] = -55.0, 1234.0
        kept = mask.bool()
        first, second = (
            sequence_product_old_logps(logps, old, mask),
            sequence_product_old_logps(padded, padded_old, mask),
        )
        assert torch.equal(first[kept], second[kept])
