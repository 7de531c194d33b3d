"""Metrics of several rounds against a direct recount over all completions."""

import math
import random
import statistics
from itertools import chain

import pytest
import torch

from trl_ext.rollouts.statistics import pool_rounds, reward_statistics


def trl_metrics(lengths: list[int], terminated: list[bool], calls: int, failures: int) -> dict[str, float]:
    """What TRL appends for one round."""
    ended = [length for length, t in zip(lengths, terminated, strict=True) if t] or [0]
    return {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - statistics.fmean(terminated),
        "completions/mean_terminated_length": statistics.fmean(ended),
        "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended),
        "tools/call_frequency": calls / len(lengths),
        "tools/failure_frequency": failures / calls if calls else 0.0,
    }


def random_round(generator: random.Random) -> tuple[list[int], list[bool], int, int]:
    size = generator.randint(1, 6) * 2
    lengths = [generator.randint(1, 30) for _ in range(size)]
    ends = generator.choice([0.0, 0.4, 1.0])  # rounds in which nothing, or all, terminated
    calls = generator.choice([0, 3, 7])
    return lengths, [generator.random() < ends for _ in range(size)], calls, generator.randint(0, calls)


@pytest.mark.parametrize("seed", range(30))
def test_equals_a_recount(seed):
    generator = random.Random(seed)
    rounds = [random_round(generator) for _ in range(generator.randint(2, 4))]
    metrics: dict[str, list[float]] = {"reward": [0.5], "num_tokens": [7.0]}
    earlier = trl_metrics([5, 6], [True, False], 1, 1)  # an earlier generation batch, not yet logged
    for values in [earlier, *(trl_metrics(*made) for made in rounds)]:
        for key, value in values.items():
            metrics.setdefault(key, []).append(value)

    pool_rounds(metrics, [len(lengths) for lengths, _, _, _ in rounds])

    lengths, terminated, calls, failures = zip(*rounds, strict=True)
    recount = trl_metrics([*chain(*lengths)], [*chain(*terminated)], sum(calls), sum(failures))
    assert metrics.pop("reward") == [0.5]
    assert metrics.pop("num_tokens") == [7.0]
    assert metrics.keys() == recount.keys()
    for key, values in metrics.items():
        assert values == pytest.approx([earlier[key], recount[key]]), key


def test_works_without_tools():
    metrics = {key: [v] for key, v in trl_metrics([4], [True], 0, 0).items() if not key.startswith("tools/")}
    pool_rounds(metrics, [1])
    assert metrics["completions/mean_length"] == [4]


class TestRewardStatistics:
    # Three groups of two; the second function doesn't apply everywhere, and to the last completion none does
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, math.nan], [1.0, math.nan], [0.0, 4.0], [math.nan] * 2])
    weights = torch.tensor([1.0, 0.5])

    def test_recount(self):
        found = reward_statistics(self.rewards, self.weights, ["right", "style"], num_generations=2)
        right, style = [1, 0, 1, 1, 0], [0, 2, 4]
        total = [1, 1, 1, 1, 2]  # 1 + 0, 0 + 1, 1, 1, 0 + 2
        assert found == pytest.approx(
            {
                "rewards/right/mean": statistics.fmean(right),
                "rewards/right/std": statistics.stdev(right),
                "rewards/style/mean": statistics.fmean(style),
                "rewards/style/std": statistics.stdev(style),
                "reward": statistics.fmean(total),
                "reward_std": statistics.stdev(total),
                # Two groups are constant; one value alone has no deviation, and TRL doesn't count it as zero
                "frac_reward_zero_std": 2 / 3,
            }
        )
