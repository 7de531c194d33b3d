"""The loss of PPO, term by term, and its gradient."""

import math
from dataclasses import replace

import pytest
import torch

from trl_ext.objectives.ppo import LOSS_TERMS, PPOLossSettings, ppo_loss


PLAIN = PPOLossSettings(vf_coef=0.5, cliprange_value=None, old_kl_coef=0.0, positive_nll_coef=0.0, loss_terms={})
TOKENS = torch.tensor(4.0)
SURROGATE = torch.tensor(0.25)


def batch():
    """Row 0 has two tokens of the policy, row 1 one, one of an environment, and padding."""
    return {
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
        "old_per_token_logps": torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -9.0, -9.0]]),
        "old_values": torch.tensor([[0.0, 1.0, 9.0], [2.0, 9.0, 9.0]]),
        "returns": torch.tensor([[1.0, 3.0, -9.0], [2.0, -9.0, -9.0]]),
        "is_right": torch.tensor([1.0, 0.0]),
        "right_share": torch.tensor(0.5),  # 2 of 4 tokens
    }


def policy():
    logps = torch.tensor([[-1.5, -2.0, 5.0], [-0.5, 5.0, 5.0]], requires_grad=True)
    values = torch.tensor([[0.5, 2.0, 5.0], [1.0, 5.0, 5.0]], requires_grad=True)
    return logps, values


def loss_of(settings=PLAIN, frozen=False, **changed):
    logps, values = policy()
    surrogate = SURROGATE + 0.0 * logps.sum()
    loss, sums = ppo_loss(surrogate, logps, values, batch(), TOKENS, replace(settings, **changed), frozen)
    found = torch.autograd.grad(loss, [logps, values])
    return (
        loss.item(),
        {name: value.item() for name, value in sums.items()},
        *(gradient.tolist() for gradient in found),
    )


def test_the_value_loss_is_half_the_square_for_each_token_of_the_policy():
    loss, sums, of_logps, of_values = loss_of()
    # ½(0.5² + 1² + 1²) = 1.125, times ½, over 4 tokens
    assert loss == pytest.approx(0.25 + 0.5 * 1.125 / 4)
    assert sums["value_loss"] == pytest.approx(1.125)
    assert (sums["tokens"], sums["clipped_values"]) == (3, 0)
    assert of_values == [[0.5 * -0.5 / 4, 0.5 * -1.0 / 4, 0.0], [0.5 * -1.0 / 4, 0.0, 0.0]]
    assert not any(map(any, of_logps))


def test_a_value_that_moved_too_far_is_clipped_and_learns_nothing():
    # V may move by ¼: 0.5 → 0.25, 2 → 1.25, 1 → 1.75. The clipped squares 0.75² and 1.75² are larger, 0.25² isn't
    loss, sums, _, of_values = loss_of(cliprange_value=0.25)
    assert sums["value_loss"] == pytest.approx((0.75**2 + 1.75**2 + 1.0) / 2)
    assert sums["clipped_values"] == 2
    assert loss == pytest.approx(0.25 + 0.5 * sums["value_loss"] / 4)
    assert of_values == [[0.0, 0.0, 0.0], [0.5 * -1.0 / 4, 0.0, 0.0]]


def test_the_kl_from_the_old_policy_pulls_back_to_it():
    # k3 of old − new = 0.5, 0 and −0.5: e^−0.5 − 1 + 0.5, 0 and e^0.5 − 1 − 0.5
    loss, sums, of_logps, _ = loss_of(old_kl_coef=0.8)
    expected = (math.exp(-0.5) - 0.5) + (math.exp(0.5) - 1.5)
    assert sums["old_kl"] == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(0.25 + 0.5 * 1.125 / 4 + 0.8 * expected / 4)
    # d/dlogp of e^(logp − old) − 1 − (logp − old)
    assert of_logps[0][:2] == pytest.approx([0.2 * (math.exp(-0.5) - 1), 0.0], abs=1e-6)
    assert of_logps[1] == pytest.approx([0.2 * (math.exp(0.5) - 1), 0.0, 0.0], abs=1e-6)


def test_only_right_completions_are_made_likelier():
    loss, _, of_logps, _ = loss_of(positive_nll_coef=2.0)
    # A mean over the two tokens of the right one
    assert loss == pytest.approx(0.25 + 0.5 * 1.125 / 4 + 2.0 * (1.5 + 2.0) / 2)
    assert of_logps == [[-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


def test_where_no_completion_is_right_none_is_made_likelier():
    logps, values = policy()
    wrong = batch() | {"is_right": torch.zeros(2), "right_share": torch.tensor(0.0)}
    settings = replace(PLAIN, positive_nll_coef=2.0)
    loss, _ = ppo_loss(SURROGATE, logps, values, wrong, TOKENS, settings)
    assert loss.item() == pytest.approx(0.25 + 0.5 * 1.125 / 4)


def test_a_frozen_policy_leaves_the_value_loss_alone():
    everything = {"old_kl_coef": 0.8, "positive_nll_coef": 2.0}
    loss, sums, of_logps, of_values = loss_of(frozen=True, **everything)
    assert loss == pytest.approx(0.5 * 1.125 / 4)
    assert not any(map(any, of_logps))  # zeros, and in the graph
    assert of_values == loss_of()[3]
    assert sums == loss_of(**everything)[1]


def test_sums_for_the_metrics():
    _, sums, _, _ = loss_of()
    # log π/π_old = −0.5, 0 and 0.5
    assert sums["approximate_kl"] == pytest.approx(0.5 * (0.25 + 0.25))
    assert sums["ratio"] == pytest.approx(math.exp(-0.5) + 1 + math.exp(0.5), rel=1e-5)


def test_without_a_tool_mask_every_token_of_a_completion_counts():
    own = batch()
    del own["tool_mask"]
    _, sums = ppo_loss(SURROGATE, *policy(), own, TOKENS, PLAIN)
    assert sums["tokens"] == 4


def test_a_term_of_the_table_is_added_over_the_tokens_of_the_policy(monkeypatch):
    monkeypatch.setitem(LOSS_TERMS, "squares", lambda logps, batch: logps.square())
    plain = loss_of()
    loss, _, of_logps, of_values = loss_of(loss_terms={"squares": 2.0})
    # 2 · (1.5² + 2² + 0.5²) over 4 tokens, and 2 · 2 logp / 4 for each; nothing in padding, nor for the environment
    assert loss == pytest.approx(plain[0] + 2 * (2.25 + 4.0 + 0.25) / 4)
    assert of_logps == [[-1.5, -2.0, 0.0], [-0.5, 0.0, 0.0]] and of_values == plain[3]
    assert loss_of(frozen=True, loss_terms={"squares": 2.0})[0] == loss_of(frozen=True)[0]


def test_vapos_terms_by_hand():
    """
    VAPO (https://huggingface.co/papers/2504.05118) in float64: μ = 0.1 times the mean of −log π over the tokens of
    correct completions, −(−1 − 3)/2 = 2 for the first row, beside the surrogate 0.25 and 0.5 times the value loss.

    The value loss is ½ (V − return)², a mean over the three tokens: ½ (0.25 + 1 + 4)/3 = 0.875. In total 0.25 + 0.2 +
    0.4375 = 0.8875. Gradients: −0.1/2 for each correct token, 0 for the others; 0.5 (V − return)/3 for each value.
    """
    logps = torch.tensor([[-1.0, -3.0], [-2.0, -7.0]], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([[0.5, 2.0], [-2.0, 9.0]], dtype=torch.float64, requires_grad=True)
    rows = {
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "old_per_token_logps": logps.detach(),
        "old_values": values.detach(),
        "returns": torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64),
        "is_right": torch.tensor([1.0, 0.0], dtype=torch.float64),
        "right_share": torch.tensor(2 / 3, dtype=torch.float64),
    }
    settings = replace(PLAIN, positive_nll_coef=0.1)
    surrogate, tokens = torch.tensor(0.25, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    loss, _ = ppo_loss(surrogate, logps, values, rows, tokens, settings)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(0.8875, rel=1e-12)
    of_logps, of_values = torch.autograd.grad(loss, [logps, values])
    expected = torch.tensor([[-0.05, -0.05], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(of_logps, expected)
    expected = torch.tensor([[-0.5 / 6, 1 / 6], [-2 / 6, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(of_values, expected)
