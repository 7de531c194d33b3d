"""Generalised advantages: by hand, against a slow twin that is written differently, and their properties."""

from typing import Any

import pytest
import torch

from trl_ext.objectives.gae import carried_back, gae, length_adaptive_lam


def n_step_advantages(rewards: list[float], values: list[float], last: float, gamma: float) -> list[list[float]]:
    """A^(n)_t = r_t + γ r_{t+1} + … + γ^n V_{t+n} − V_t for each t and each n ≥ 1 until the end (eq. 11 to 15)."""
    states = [*values, last]
    table = []
    for t in range(len(rewards)):
        row, earned = [], 0.0
        for n in range(1, len(rewards) - t + 1):
            earned += gamma ** (n - 1) * rewards[t + n - 1]
            row.append(earned + gamma**n * states[t + n] - values[t])
        table.append(row)
    return table


def slow_steps(rewards: list[float], values: list[float], last: float, gamma: float, lam: float) -> list[float]:
    """
    The definition (eq. 16): the mean of all n-step advantages with weights (1 − λ) λ^(n−1), where what is beyond the
    end of the completion falls to the longest.
    """
    advantages = []
    for candidates in n_step_advantages(rewards, values, last, gamma):
        longest = len(candidates)
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, longest)] + [lam ** (longest - 1)]
        advantages.append(sum(w * a for w, a in zip(weights, candidates, strict=True)))
    return advantages


def slow_gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lams: list[float], last: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row after the other, in lists of the tokens that the policy wrote."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for row in range(len(mask)):
        steps: list[int] = []
        earned: list[float] = []
        for t in range(mask.size(1)):
            if mask[row, t]:
                steps.append(t)
                earned.append(0.0)
            if steps:  # of what came before the first token, the policy knows nothing
                earned[-1] += float(rewards[row, t])
        own = [float(values[row, t]) for t in steps]
        after = 0.0 if last is None else float(last[row])
        for t, advantage in zip(steps, slow_steps(earned, own, after, gamma, lams[row]), strict=True):
            advantages[row, t] = advantage
            returns[row, t] = advantage + values[row, t]
    return advantages, returns


def completions(seed: int, tools: bool, rows: int = 5, columns: int = 11) -> tuple[torch.Tensor, ...]:
    """Rewards, values, mask and last values of completions of 0 to `columns` tokens; a third of them from tools."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([0, 1, columns, *torch.randint(2, columns, (rows - 3,), generator=generator).tolist()])
    written = torch.arange(columns) < lengths.unsqueeze(1)
    mask = written & ~(tools & (torch.rand(rows, columns, generator=generator) < 0.35))
    rewards = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * written
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return rewards, values, mask.long(), torch.randn(rows, generator=generator, dtype=torch.float64)


# The policy wrote tokens 0, 1 and 3, a tool token 2, and column 4 is padding. γ = 0.9, λ = 0.5, so γλ = 0.45.
# Steps: rewards 1, 0 + 2 (earned on the tool's token), 3; values 0.5, 1, 2.
BY_HAND = {
    "rewards": torch.tensor([[1.0, 0.0, 2.0, 3.0, 0.0]]),
    "values": torch.tensor([[0.5, 1.0, 99.0, 2.0, -7.0]]),
    "mask": torch.tensor([[1, 1, 0, 1, 0]]),
    "gamma": 0.9,
    "lam": 0.5,
}


class TestGae:
    def test_by_hand(self):
        # δ = 1 + 0.9·1 − 0.5 = 1.4; 2 + 0.9·2 − 1 = 2.8; 3 − 2 = 1
        # A = 1.4 + 0.45·3.25 = 2.8625; 2.8 + 0.45·1 = 3.25; 1. Returns are A + V.
        advantages, returns = gae(**BY_HAND)
        torch.testing.assert_close(advantages, torch.tensor([[2.8625, 3.25, 0.0, 1.0, 0.0]]))
        torch.testing.assert_close(returns, torch.tensor([[3.3625, 4.25, 0.0, 3.0, 0.0]]))

    def test_cut_off_by_hand(self):
        # The last state is worth 4: its δ is 3 + 0.9·4 − 2 = 4.6.
        # A = 1.4 + 0.45·4.87 = 3.5915; 2.8 + 0.45·4.6 = 4.87; 4.6
        advantages, returns = gae(**BY_HAND, last_values=torch.tensor([4.0]))
        torch.testing.assert_close(advantages, torch.tensor([[3.5915, 4.87, 0.0, 4.6, 0.0]]))
        torch.testing.assert_close(returns, torch.tensor([[4.0915, 5.87, 0.0, 6.6, 0.0]]))

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("tools", [False, True])
    @pytest.mark.parametrize("truncated", [False, True])
    @pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.7, 0.0), (0.8, 1.0), (0.0, 0.3)])
    def test_slow_twin(self, gamma, lam, truncated, tools, seed):
        rewards, values, mask, last = completions(seed, tools)
        last_values = last if truncated else None
        ours = gae(rewards, values, mask, gamma, lam, last_values)
        slow = slow_gae(rewards, values, mask, gamma, [lam] * len(mask), last_values)
        torch.testing.assert_close(ours, slow)

    def test_a_lambda_for_each_row(self):
        rewards, values, mask, last = completions(0, tools=True)
        lams = [0.0, 0.3, 0.6, 0.9, 1.0]
        ours = gae(rewards, values, mask, 0.9, torch.tensor(lams, dtype=torch.float64).unsqueeze(1), last)
        torch.testing.assert_close(ours, slow_gae(rewards, values, mask, 0.9, lams, last))

    @pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 33])
    def test_any_number_of_tokens(self, columns):
        # Sums are doubled: numbers around powers of two are where that could go wrong
        values, mask = torch.zeros(1, columns), torch.ones(1, columns)
        advantages, _ = gae(torch.ones(1, columns), values, mask, 1.0, 0.5)
        geometric = [2 * (1 - 0.5 ** (columns - t)) for t in range(columns)]
        torch.testing.assert_close(advantages, torch.tensor([geometric]))

    def test_lambda_zero_is_the_temporal_difference(self):
        rewards, values, mask, last = completions(1, tools=False)
        advantages, _ = gae(rewards, values, mask, 0.9, 0.0, last)
        lengths = mask.sum(dim=1).tolist()
        for row, length in enumerate(lengths):
            after = [*values[row, 1:length].tolist(), last[row].item()][:length]
            errors = rewards[row, :length] + 0.9 * torch.tensor(after) - values[row, :length]
            torch.testing.assert_close(advantages[row, :length], errors)

    def test_lambda_one_is_the_return_minus_the_value(self):
        rewards, values, mask, _ = completions(2, tools=False)
        advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
        to_go = rewards.flip(1).cumsum(dim=1).flip(1)  # undiscounted
        torch.testing.assert_close(returns, to_go * mask)
        torch.testing.assert_close(advantages, (to_go - values) * mask)

    def test_returns_do_not_depend_on_values_at_lambda_one(self):
        rewards, values, mask, _ = completions(3, tools=True)
        _, returns = gae(rewards, values, mask, 0.9, 1.0)
        _, others = gae(rewards, values + torch.randn_like(values), mask, 0.9, 1.0)
        torch.testing.assert_close(returns, others)

    def test_perfect_values_leave_no_advantage(self):
        # V_t = r_t + γ V_{t+1}: every δ is zero, whatever λ is
        rewards, _, mask, last = completions(4, tools=False)
        values = torch.zeros_like(rewards)
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            following = last[row]
            for t in reversed(range(length)):
                following = values[row, t] = rewards[row, t] + 0.9 * following
        advantages, returns = gae(rewards, values, mask, 0.9, 0.7, last)
        torch.testing.assert_close(advantages, torch.zeros_like(advantages))
        torch.testing.assert_close(returns, values)

    def test_values_in_padding_and_of_tools_do_not_matter(self):
        rewards, values, mask, last = completions(5, tools=True)
        noise = torch.where(mask.bool(), 0.0, 1e6 * torch.randn_like(values))
        for one, other in zip(
            gae(rewards, values, mask, 0.9, 0.8, last), gae(rewards, values + noise, mask, 0.9, 0.8, last), strict=True
        ):
            assert torch.equal(one, other)
            assert not other[mask == 0].any()

    def test_more_padding_changes_nothing(self):
        rewards, values, mask, last = completions(6, tools=True)
        wider = [torch.nn.functional.pad(tensor, (0, 9)) for tensor in (rewards, values, mask)]
        narrow, wide = gae(rewards, values, mask, 0.9, 0.8, last), gae(*wider, 0.9, 0.8, last)
        for one, other in zip(narrow, wide, strict=True):
            torch.testing.assert_close(torch.nn.functional.pad(one, (0, 9)), other)

    def test_tool_tokens_are_no_steps(self):
        # Written in one go or with a tool in between, the credit is the same: nothing is discounted on the way
        together = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.3, 0.6]]), torch.tensor([[1, 1]]), 0.5, 0.9)
        apart = gae(
            torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]),
            torch.tensor([[0.3, 5.0, 5.0, 5.0, 0.6]]),
            torch.tensor([[1, 0, 0, 0, 1]]),
            0.5,
            0.9,
        )
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(one, other[:, [0, 4]])

    def test_rows_do_not_see_each_other(self):
        rewards, values, mask, last = completions(7, tools=True)
        together = gae(rewards, values, mask, 0.9, 0.8, last)
        for row in range(len(mask)):
            one = slice(row, row + 1)
            alone = gae(rewards[one], values[one], mask[one], 0.9, 0.8, last[one])
            for whole, part in zip(together, alone, strict=True):
                torch.testing.assert_close(whole[one], part)

    def test_a_completion_without_a_token_of_the_policy_has_no_credit(self):
        nothing = gae(torch.ones(1, 3), torch.ones(1, 3), torch.zeros(1, 3), 1.0, 0.9, torch.ones(1))
        assert not any(part.any() for part in nothing)


class TestLengthAdaptiveLam:
    def test_by_hand(self):
        # 1 − 1/(0.05·100) = 0.8, 1 − 1/(0.05·400) = 0.95; up to 20 tokens it would be 0 or less
        lam = length_adaptive_lam(torch.tensor([100, 400, 20, 7, 0]), 0.05)
        torch.testing.assert_close(lam, torch.tensor([[0.8], [0.95], [0.0], [0.0], [0.0]]))

    def test_grows_with_the_length_towards_one(self):
        lam = length_adaptive_lam(torch.arange(1, 5000), 0.05).flatten()
        assert (lam.diff() >= 0).all()
        assert 0.99 < lam[-1] < 1


class TestCarriedBack:
    def test_by_hand(self):
        # The policy wrote tokens 1, 2 and 5; token 0 was there before it did anything
        rewards = torch.tensor([[7.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]])
        mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0]])
        assert carried_back(rewards, mask).tolist() == [[0.0, 1.0, 9.0, 0.0, 0.0, 11.0, 0.0, 0.0]]

    def test_where_the_policy_wrote_everything_nothing_moves(self):
        rewards, _, mask, _ = completions(0, tools=False)
        assert torch.equal(carried_back(rewards, mask), rewards)

    def test_credit_does_not_depend_on_when_it_is_done(self):
        rewards, values, mask, last = completions(1, tools=True)
        moved = carried_back(rewards, mask)
        torch.testing.assert_close(
            gae(moved, values, mask, 0.9, 0.8, last), gae(rewards, values, mask, 0.9, 0.8, last)
        )
