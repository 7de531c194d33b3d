"""
KL(π‖π_ref) per completion, in nats, estimated on completions that π sampled, with a 95 % interval.
"""

import math
import statistics
from collections.abc import Hashable, Sequence

import datasets
import evaluate
from scipy import stats


DESCRIPTION = "Mean KL to a reference per completion, in nats, with Student's t interval."
CITATION = "Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html"
INPUTS = """
Args:
    predictions (`list[list[float]]`): log-probabilities of each completion's tokens under the policy that sampled it,
        without padding and without tokens that an environment wrote.
    references (`list[list[float]]`): log-probabilities of the same tokens under the reference.
    estimator (`str`, *optional*, defaults to `"k1"`): the estimate for a token with the log-ratio x = log π/π_ref.
        `"k1"`: x, unbiased. `"k3"`: exp(−x) − 1 + x, unbiased for the sum of the tokens' own divergences, and never
        negative.
    prompts (`list`, *optional*): the prompt of each completion. Completions of one prompt are not independent: they
    are
        averaged first, and the prompt becomes the unit of the interval.
Returns:
    `mean_kl` (`float`), the KL per completion in nats, and its interval `low` and `high`; `per_token` (`float`), the
    KL per token; `units` (`int`), the number of completions, or of prompts, behind the interval.
Raises:
    ValueError: with fewer than two units, for which there is no interval; for completions whose two lists have
        different lengths or hold numbers that aren't finite; and for an unknown estimator.
"""


class MeanKL(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        logps = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": logps, "references": logps}),  # type: ignore[arg-type]
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[float]],
        estimator: str = "k1",
        prompts: Sequence[Hashable] | None = None,
    ) -> dict[str, float]:
        if estimator not in ("k1", "k3"):
            raise ValueError(f"estimator={estimator!r} is unknown. Choose 'k1' or 'k3'.")
        sums = []
        for row, (ours, theirs) in enumerate(zip(predictions, references, strict=True)):
            if len(ours) != len(theirs):
                raise ValueError(
                    f"Completion {row} has {len(ours)} log-probabilities of the policy, but {len(theirs)} of the "
                    "reference. Give both for the same tokens."
                )
            ratios = [one - other for one, other in zip(ours, theirs, strict=True)]
            if not all(map(math.isfinite, ratios)):
                raise ValueError(
                    f"Completion {row} has a log-probability that isn't finite, so that the KL has no mean. Leave the "
                    "completion out, or compute its log-probabilities in float32."
                )
            sums.append(math.fsum(ratios if estimator == "k1" else [math.expm1(-x) + x for x in ratios]))
        by_unit: dict[Hashable, list[float]] = {}
        for unit, value in zip(range(len(sums)) if prompts is None else prompts, sums, strict=True):
            by_unit.setdefault(unit, []).append(value)
        means = [statistics.fmean(values) for values in by_unit.values()]
        if len(means) < 2:
            raise ValueError(f"An interval needs at least 2 completions of different prompts, got {len(means)}.")
        mean = statistics.fmean(means)
        reach = float(stats.t.ppf(0.975, len(means) - 1)) * statistics.stdev(means) / math.sqrt(len(means))
        return {
            "mean_kl": mean,
            "low": mean - reach,
            "high": mean + reach,
            "per_token": math.fsum(sums) / max(sum(map(len, predictions)), 1),
            "units": len(means),
        }
