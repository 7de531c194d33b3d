"""What a critic is fitted to and judged by: by hand, against slow twins, and on two ranks as on one."""

import math
import statistics
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trl_ext.objectives.values import explained_variance, masked_moments, value_loss, whiten


def on_ranks(shards: list[Any], work: Callable[..., Any]) -> list[Any]:
    """`work(shard, reduce)` on a thread for each shard, with a `reduce` that sums over all of them."""
    barrier, board, results = threading.Barrier(len(shards)), [torch.empty(0)] * len(shards), [None] * len(shards)

    def run(rank: int) -> None:
        def reduce(sums: torch.Tensor) -> torch.Tensor:
            board[rank] = sums
            barrier.wait(timeout=30)
            total = torch.stack(board).sum(dim=0)
            barrier.wait(timeout=30)
            return total

        results[rank] = work(shards[rank], reduce)

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def masked(seed: int = 0, rows: int = 6, columns: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(rows, columns, generator=generator) + 2
    return values, (torch.rand(rows, columns, generator=generator) < 0.6).long()


class TestValueLoss:
    def test_by_hand(self):
        # V, old V, return; clip range 0.2
        # 1. V moved by 0.1: both terms are ½·0.9² = 0.405
        # 2. V moved by 1 towards the return 2: clipped to 0.2, ½·1.8² = 1.62 > ½·1² = 0.5
        # 3. V moved by 1 away from the return −1: clipped to 0.2, ½·1.2² = 0.72 < ½·2² = 2
        # 4. V moved by −1 past the return −0.5: clipped to −0.2, ½·0.3² = 0.045 < ½·0.5² = 0.125
        # 5. V moved by −1 to the return: clipped to −0.2, ½·0.8² = 0.32 > 0
        values = torch.tensor([[0.1, 1.0, 1.0, -1.0, -1.0]])
        returns = torch.tensor([[1.0, 2.0, -1.0, -0.5, -1.0]])
        loss, clipped = value_loss(values, torch.zeros(1, 5), returns, 0.2)
        torch.testing.assert_close(loss, torch.tensor([[0.405, 1.62, 2.0, 0.125, 0.32]]))
        assert clipped.tolist() == [[0.0, 1.0, 0.0, 0.0, 1.0]]

    def test_without_a_clip_it_is_half_the_square(self):
        values, returns = masked(1)[0], masked(2)[0]
        loss, clipped = value_loss(values, torch.zeros_like(values), returns, None)
        torch.testing.assert_close(loss, (values - returns) ** 2 / 2)
        assert not clipped.any()

    def test_at_rollout_time_the_clip_does_nothing(self):
        values, returns = masked(1)[0], masked(2)[0]
        loss, clipped = value_loss(values, values, returns, 0.2)
        torch.testing.assert_close(loss, (values - returns) ** 2 / 2)
        assert not clipped.any()

    def test_the_gradient_is_that_of_the_larger_term(self):
        # Where the clipped term is larger V is out of its range, and gets no gradient; elsewhere V − R
        values = torch.tensor([0.1, 1.0, 1.0, -1.0, -1.0], requires_grad=True)
        returns = torch.tensor([1.0, 2.0, -1.0, -0.5, -1.0])
        value_loss(values, torch.zeros(5), returns, 0.2)[0].sum().backward()
        torch.testing.assert_close(values.grad, torch.tensor([-0.9, 0.0, 2.0, -0.5, 0.0]))


class TestMoments:
    @pytest.mark.parametrize("seed", range(3))
    def test_slow_twin(self, seed):
        values, mask = masked(seed)
        kept = [float(value) for value, keep in zip(values.flatten(), mask.flatten(), strict=True) if keep]
        mean, variance = masked_moments(values, mask)
        assert mean.item() == pytest.approx(statistics.fmean(kept))
        assert variance.item() == pytest.approx(statistics.variance(kept), rel=1e-5)

    def test_less_than_two_values_have_no_variance(self):
        values = torch.tensor([[3.0, 5.0]])
        assert [part.item() for part in masked_moments(values, torch.tensor([[0, 1]]))] == [5.0, 0.0]
        assert [part.item() for part in masked_moments(values, torch.zeros(1, 2))] == [0.0, 0.0]

    def test_a_large_mean_does_not_swallow_the_variance(self):
        # Σx² − n·mean² in float32 would be off by more than the variance
        values = torch.tensor([[10_000.0, 10_001.0, 10_002.0, 9_999.0]])
        _, variance = masked_moments(values, torch.ones(1, 4))
        assert variance.item() == pytest.approx(5 / 3, rel=1e-4)


class TestWhiten:
    def test_by_hand(self):
        # 1, 2 and 6 have mean 3 and variance (4 + 1 + 9)/2 = 7
        values, mask = torch.tensor([[1.0, 2.0, 99.0, 6.0]]), torch.tensor([[1, 1, 0, 1]])
        deviation = math.sqrt(7)
        expected = torch.tensor([[-2.0, -1.0, 0.0, 3.0]]) / deviation
        torch.testing.assert_close(whiten(values, mask), expected)
        kept = (expected + 3) * mask
        torch.testing.assert_close(whiten(values, mask, shift_mean=False), kept)

    def test_mean_0_and_variance_1_over_what_is_masked_in(self):
        values, mask = masked()
        mean, variance = masked_moments(whiten(values, mask), mask)
        assert mean.item() == pytest.approx(0, abs=1e-6)
        assert variance.item() == pytest.approx(1, rel=1e-5)

    def test_without_a_shift_the_mean_stays(self):
        values, mask = masked()
        mean, variance = masked_moments(whiten(values, mask, shift_mean=False), mask)
        assert mean.item() == pytest.approx(masked_moments(values, mask)[0].item(), rel=1e-5)
        assert variance.item() == pytest.approx(1, rel=1e-5)

    def test_what_is_masked_out_does_not_matter(self):
        values, mask = masked()
        noise = torch.where(mask.bool(), 0.0, 1e6)
        assert torch.equal(whiten(values, mask), whiten(values + noise, mask))
        assert not whiten(values + noise, mask, shift_mean=False)[mask == 0].any()

    def test_equal_values_stay_finite(self):
        assert whiten(torch.full((2, 3), 0.7), torch.ones(2, 3)).abs().max() < 1e-2
        assert not whiten(torch.ones(1, 3), torch.zeros(1, 3)).any()

    @pytest.mark.parametrize("shift", [True, False])
    def test_two_ranks_are_one(self, shift):
        values, mask = masked()
        alone = whiten(values, mask, shift)
        shards = [(values[:1], mask[:1]), (values[1:], mask[1:])]  # of unequal size
        parts = on_ranks(shards, lambda shard, reduce: whiten(*shard, shift, reduce))
        torch.testing.assert_close(torch.cat(parts), alone)
        assert not torch.allclose(torch.cat([whiten(*shard, shift) for shard in shards]), alone)


class TestExplainedVariance:
    def test_by_hand(self):
        # Returns 0, 2, 4: variance 4. Residuals 0, 1, −1: variance 1. 1 − 1/4
        returns, values = torch.tensor([[0.0, 2.0, 4.0, 50.0]]), torch.tensor([[0.0, 1.0, 5.0, -9.0]])
        assert explained_variance(values, returns, torch.tensor([[1, 1, 1, 0]])) == pytest.approx(0.75)

    def test_a_perfect_critic_and_a_constant_one_and_one_that_is_worse(self):
        returns, mask = masked()
        assert explained_variance(returns, returns, mask) == 1
        assert explained_variance(torch.full_like(returns, 5.0), returns, mask) == pytest.approx(0, abs=1e-6)
        assert explained_variance(-returns, returns, mask) == pytest.approx(-3, rel=1e-5)

    def test_returns_that_do_not_vary_have_none(self):
        assert math.isnan(explained_variance(torch.randn(1, 3), torch.ones(1, 3), torch.ones(1, 3)))

    def test_two_ranks_are_one(self):
        returns, mask = masked(0)
        values = returns + masked(1)[0]
        shards = [(values[:1], returns[:1], mask[:1]), (values[1:], returns[1:], mask[1:])]
        parts = on_ranks(shards, lambda shard, reduce: explained_variance(*shard, reduce))
        assert parts == pytest.approx([explained_variance(values, returns, mask)] * 2, rel=1e-5)
