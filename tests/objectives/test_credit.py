"""Credit of tokens: small cases by hand, and a slow twin in lists."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from trl_ext.objectives.credit import CreditSettings, completions_that_end, estimate_credit, token_rewards


PLAIN = CreditSettings(
    gamma=1.0,
    lam=1.0,
    lam_alpha=None,
    critic_lam=None,
    bootstrap_truncated=False,
    whiten_rewards=False,
    whiten_advantages=False,
    kl_coef=0.0,
)


# Ends


def test_only_an_end_at_the_last_token_counts():
    ids = torch.tensor([[5, 2, 0], [2, 5, 0], [5, 6, 3], [5, 6, 7], [2, 0, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]])
    assert completions_that_end(ids, mask, [2, 3]).tolist() == [True, False, True, False, False]


# Rewards of tokens


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


def rewarded(**settings):
    """
    Three functions with weights 2, 1 and 0.5. Row 0: 0.25 from the first, and steps of the second, 1 at token 0 and
    3 at token 1. Row 1: only the third applies, −4. Row 2: steps of the third, 2 and 1 at the same token, and 1 from
    the first.
    """
    nan = math.nan
    rewards = torch.tensor([[0.25, 4.0, nan], [nan, nan, -4.0], [1.0, nan, 3.0]])
    steps = [{1: [(0, 1.0), (1, 3.0)]}, {}, {2: [(0, 2.0), (0, 1.0)]}]
    defaults = {"deviation": 1.0, "clip": None, "missing_eos_penalty": None}
    ended = torch.tensor([True, False, True])
    return token_rewards(rewards, torch.tensor([2.0, 1.0, 0.5]), steps, MASK, ended, **{**defaults, **settings})


def test_steps_stand_where_they_were_earned_and_the_rest_at_the_last_token():
    assert rewarded().tolist() == [[1.0, 3.0, 0.5, 0.0], [0.0, 0.0, 0.0, -2.0], [3.5, 0.0, 0.0, 0.0]]


def test_rewards_are_scaled_then_clipped_then_punished():
    # Halved, then within ±1; the penalty of row 1, which didn't end, comes after the clip
    found = rewarded(deviation=2.0, clip=1.0, missing_eos_penalty=0.75)
    assert found.tolist() == [[0.5, 1.0, 0.25, 0.0], [0.0, 0.0, 0.0, -1.75], [1.0, 0.0, 0.0, 0.0]]


def test_an_empty_row_gets_nothing():
    nothing = torch.tensor([[math.nan]])
    args = {"deviation": 1.0, "clip": None, "missing_eos_penalty": None}
    found = token_rewards(nothing, torch.ones(1), [{}], torch.zeros(1, 2).long(), torch.tensor([False]), **args)
    assert not found.any()


# Advantages and returns


def credited(settings=PLAIN, rewards=None, kl=None, values=None, mask=None, ended=None, scores=None, **changed):
    completion_mask = MASK
    rows, columns = completion_mask.shape
    rewards = torch.zeros(rows, columns) if rewards is None else torch.tensor(rewards)
    return estimate_credit(
        rewards,
        None if kl is None else torch.tensor(kl),
        torch.zeros(rows, columns + 1) if values is None else torch.tensor(values),
        completion_mask,
        completion_mask if mask is None else torch.tensor(mask),
        torch.tensor([True] * rows) if ended is None else torch.tensor(ended),
        torch.zeros(rows) if scores is None else torch.tensor(scores),
        replace(settings, **changed),
    )


REWARDS = [[0.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, -1.0], [3.0, 0.0, 0.0, 0.0]]
VALUES = [[0.5, 0.25, 0.0, 8.0, 9.0], [1.0, 1.0, 1.0, 1.0, 2.0], [0.0, 4.0, 9.0, 9.0, 9.0]]


def test_monte_carlo_returns_and_what_they_are_above_the_values():
    credit, _ = credited(rewards=REWARDS, values=VALUES)
    assert credit.returns.tolist() == [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, -1.0, -1.0], [3.0, 0.0, 0.0, 0.0]]
    assert credit.advantages.tolist() == [[0.5, 0.75, 1.0, 0.0], [0.0, 0.0, -2.0, -2.0], [3.0, 0.0, 0.0, 0.0]]
    assert credit.values.tolist() == [[0.5, 0.25, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert torch.equal(credit.mask, MASK) and credit.completions == 3


def test_a_truncated_completion_is_worth_the_value_of_its_last_state():
    # The states after the last tokens have values 8, 2 and 4; rows 0 and 2 were cut off, and γ = ½ discounts them
    credit, _ = credited(
        rewards=REWARDS, values=VALUES, ended=[False, True, False], bootstrap_truncated=True, gamma=0.5
    )
    assert credit.returns.tolist() == [[1.25, 2.5, 5.0, 0.0], [0.875, 1.75, -0.5, -1.0], [5.0, 0.0, 0.0, 0.0]]


def test_a_length_adaptive_lambda_is_for_advantages_alone():
    # α = ½: λ = 1 − 2/3, 1 − 2/4 and 0 for 3, 4 and 1 tokens. With V = 0, A_t = Σ λ^l r_{t+l}; returns have λ = 1
    credit, _ = credited(rewards=REWARDS, lam_alpha=0.5)
    expected = torch.tensor([[1 / 9, 1 / 3, 1.0, 0.0], [1.0 - 1 / 8, 2.0 - 1 / 4, -0.5, -1.0], [3.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(credit.advantages, expected)
    assert credit.returns.tolist() == [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, -1.0, -1.0], [3.0, 0.0, 0.0, 0.0]]


def test_returns_may_have_a_lambda_of_their_own():
    credit, _ = credited(rewards=REWARDS, values=VALUES, lam=0.0, critic_lam=1.0)
    # TD errors r_t + V_{t+1} − V_t, and Monte-Carlo returns
    assert credit.advantages.tolist() == [[-0.25, -0.25, 1.0, 0.0], [0.0, 2.0, 0.0, -2.0], [3.0, 0.0, 0.0, 0.0]]
    assert credit.returns.tolist() == [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, -1.0, -1.0], [3.0, 0.0, 0.0, 0.0]]


def test_the_kl_is_subtracted_from_the_reward_of_each_token():
    kl = [[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]]
    credit, metrics = credited(rewards=REWARDS, kl=kl, kl_coef=0.5, scores=[1.0, 1.0, 3.0])
    assert credit.returns.tolist() == [[-0.5, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0], [1.0, 0.0, 0.0, 0.0]]
    assert metrics["objective/kl"] == pytest.approx(7 / 3)
    assert metrics["objective/non_score_reward"] == pytest.approx(-3.5 / 3)


def test_without_a_reference_nothing_is_said_of_it():
    _, metrics = credited(rewards=REWARDS, kl_coef=0.5)
    assert metrics.keys() == {"val/value", "val/return", "val/explained_variance"}


def test_where_every_completion_is_left_out_there_is_nothing_to_measure():
    nothing = torch.zeros(2, 3)
    credit, metrics = estimate_credit(
        nothing,
        nothing,
        torch.ones(2, 4),
        nothing.long(),
        nothing.long(),
        torch.tensor([False, False]),
        torch.tensor([1.0, 0.0]),
        replace(PLAIN, whiten_advantages=True, whiten_rewards=True, kl_coef=0.1),
    )
    assert credit.completions == 0
    assert not credit.advantages.any() and not credit.returns.any() and not credit.mask.any()
    assert math.isnan(metrics["objective/kl"]) and math.isnan(metrics["objective/non_score_reward"])
    assert metrics["val/value"] == metrics["val/return"] == 0.0


def test_tokens_of_an_environment_are_crossed():
    # Row 1: tokens 1 and 3 are not the policy's; what they were rewarded counts for tokens 0 and 2
    mask = [[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]]
    credit, _ = credited(rewards=REWARDS, values=VALUES, mask=mask, lam=0.0)
    assert credit.advantages[1].tolist() == [2.0 + 1.0 - 1.0, 0.0, -1.0 - 1.0, 0.0]
    assert credit.values[1].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_completion_that_nothing_scored_teaches_nothing():
    scores = [1.0, math.nan, 3.0]
    credit, metrics = credited(rewards=REWARDS, values=VALUES, scores=scores, whiten_advantages=True)
    assert not credit.advantages[1].any() and not credit.mask[1].any()
    assert torch.equal(credit.returns[1], credit.values[1])
    # Whitened over the four tokens of the other two: 0.5, 0.75, 1 and 3
    parts = [0.5, 0.75, 1.0, 3.0]
    mean, deviation = statistics.fmean(parts), statistics.stdev(parts)
    found = torch.cat([credit.advantages[0, :3], credit.advantages[2, :1]]).tolist()
    assert found == pytest.approx([(part - mean) / deviation for part in parts], rel=1e-5)
    # 1 − Var(R − V)/Var(R), over the same tokens
    returns = [1.0, 1.0, 1.0, 3.0]
    explained = 1 - statistics.variance(parts) / statistics.variance(returns)
    assert metrics["val/explained_variance"] == pytest.approx(explained, rel=1e-5)
    assert (metrics["val/value"], metrics["val/return"]) == (pytest.approx(0.75 / 4), pytest.approx(6 / 4))


def test_whitened_rewards_keep_their_mean():
    # Over the 8 tokens of the policy; with λ = γ = 0 a return is the reward of its token
    credit, _ = credited(rewards=REWARDS, whiten_rewards=True, gamma=0.0)
    parts = [0.0, 0.0, 1.0, 0.0, 2.0, 0.0, -1.0, 3.0]
    mean, deviation = statistics.fmean(parts), statistics.stdev(parts)
    expected = [(part - mean) / deviation + mean for part in parts]
    assert credit.returns[MASK.bool()].tolist() == pytest.approx(expected, rel=1e-5)


class _Replayed:
    """A `reduce` whose first results are known; keeps what it was given."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        self.known = known
        self.own: list[torch.Tensor] = []

    def __call__(self, sums: torch.Tensor) -> torch.Tensor:
        self.own.append(sums)
        place = len(self.own) - 1
        return self.known[place] if place < len(self.known) else sums


def test_sums_are_those_of_all_ranks():
    """Two ranks, each with a part of the rows: together they give what one has that holds all."""
    rewards, values = torch.tensor(REWARDS), torch.tensor(VALUES)
    kl = 0.1 * torch.tensor(REWARDS) ** 2
    settings = replace(PLAIN, whiten_advantages=True, whiten_rewards=True, kl_coef=0.2, lam=0.9)
    scores, ended = torch.tensor([1.0, math.nan, 3.0]), torch.tensor([True, True, False])

    def of(rows, reduce):
        parts = (rewards, kl, values, MASK, MASK, ended, scores)
        return estimate_credit(*(part[rows] for part in parts), settings, reduce)

    whole, expected = of(slice(0, 3), lambda sums: sums)
    # Each rank's sums, in the order of its calls; the ranks start again with the sums of both, until the last is known
    together: list[torch.Tensor] = []
    for _ in range(10):
        first, second = _Replayed(together), _Replayed(together)
        parts = [of(slice(0, 1), first), of(slice(1, 3), second)]
        together = [one + other for one, other in zip(first.own, second.own, strict=True)]
    for name in ("advantages", "returns", "values"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part, _ in parts]), getattr(whole, name))
    for part, metrics in parts:
        assert part.completions == 3
        assert metrics == pytest.approx(expected, rel=1e-5)


def test_rows_that_only_fill_up_a_batch_are_not_completions():
    empty = torch.zeros(1, 4)
    values = torch.tensor(VALUES)
    credit, metrics = estimate_credit(
        torch.cat([torch.tensor(REWARDS), empty]),
        None,
        torch.cat([values, torch.full((1, 5), 7.0)]),
        torch.cat([MASK, empty.long()]),
        torch.cat([MASK, empty.long()]),
        torch.tensor([True, True, True, False]),
        torch.tensor([1.0, 1.0, 3.0, 0.0]),
        PLAIN,
    )
    plain, expected = credited(rewards=REWARDS, values=VALUES, scores=[1.0, 1.0, 3.0])
    assert (credit.completions, metrics) == (3, expected)
    assert torch.equal(credit.advantages[:3], plain.advantages) and not credit.advantages[3].any()


# VAPO (https://huggingface.co/papers/2504.05118)


def test_vapos_credit_by_hand():
    """
    Two completions of 4 and 2 tokens with the reward 1 and 0 at their end, γ = 1, α = 0.5, in float64.

    λ_policy = 1 − 1/(α·length): 1 − 1/2 = 0.5 for 4 tokens; 1 − 1/1 = 0 for 2. λ_critic = 1, so that the targets are
    the Monte-Carlo returns 1, 1, 1, 1 and 0, 0.

    V = 0.2, 0.4, 0.5, 0.8. δ = 0.4 − 0.2, 0.5 − 0.4, 0.8 − 0.5, 1 − 0.8 = 0.2, 0.1, 0.3, 0.2. From the end, with 0.5:
    A₃ = 0.2, A₂ = 0.3 + 0.1 = 0.4, A₁ = 0.1 + 0.2 = 0.3, A₀ = 0.2 + 0.15 = 0.35.
    V = 0.5, 0.3. δ = 0.3 − 0.5, 0 − 0.3 = −0.2, −0.3, which are A with λ = 0.

    A token's value is off its return by 0.8, 0.6, 0.5, 0.2 and −0.5, −0.3. Mean 1.3/6, squares 0.64 + 0.36 + 0.25 +
    0.04 + 0.25 + 0.09 = 1.63, so the sum of squares around the mean is 1.63 − 1.69/6. Returns: mean 4/6, 4 − 16/6 =
    4/3. The explained variance is 1 − (1.63 − 1.69/6)/(4/3).
    """
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[0.2, 0.4, 0.5, 0.8, 9.0], [0.5, 0.3, 9.0, 9.0, 9.0]], dtype=torch.float64)
    settings = replace(PLAIN, lam=0.95, lam_alpha=0.5, critic_lam=1.0)
    ended, scores = torch.tensor([True, True]), torch.tensor([1.0, 0.0])
    credit, metrics = estimate_credit(rewards, None, values, mask, mask, ended, scores, settings)
    advantages = torch.tensor([[0.35, 0.3, 0.4, 0.2], [-0.2, -0.3, 0.0, 0.0]], dtype=torch.float64)
    returns = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert credit.advantages.dtype == credit.returns.dtype == torch.float64
    torch.testing.assert_close(credit.advantages, advantages)
    torch.testing.assert_close(credit.returns, returns)
    assert metrics["val/explained_variance"] == pytest.approx(1 - (1.63 - 1.69 / 6) / (4 / 3))
