"""
Share of preference pairs whose chosen completion is scored above the rejected one, with the pair as the unit.
"""

import math

import datasets
import evaluate
from scipy import stats


DESCRIPTION = "Share of pairs whose chosen completion has the higher score; a tie counts one half."
INPUTS = """
Args:
    chosen (`list[float]`): score of each pair's chosen completion, by a reward model or DPO's implicit reward.
    rejected (`list[float]`): score of each pair's rejected completion.
Returns:
    `preference_accuracy` (`float`), its 95 % interval `low` and `high` (Wilson's), and the mean `margin`, chosen minus
    rejected, in units of the scores.
Raises:
    ValueError: without pairs, or if a score is NaN.
"""


class PreferenceAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        score = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"chosen": score, "rejected": score}),  # type: ignore[arg-type]
        )

    def _compute(self, chosen: list[float], rejected: list[float]) -> dict[str, float]:
        pairs = len(chosen)
        if not pairs:
            raise ValueError("preference_accuracy needs at least one pair.")
        if any(math.isnan(score) for score in (*chosen, *rejected)):
            raise ValueError("preference_accuracy got scores that are NaN. Leave out the pairs that nothing scored.")
        margins = [float(one) - float(other) for one, other in zip(chosen, rejected, strict=True)]
        share = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / pairs
        z = float(stats.norm.ppf(0.975))
        centre = (share + z**2 / (2 * pairs)) / (1 + z**2 / pairs)
        reach = z / (1 + z**2 / pairs) * (share * (1 - share) / pairs + z**2 / (4 * pairs**2)) ** 0.5
        return {
            "preference_accuracy": share,
            "low": 0.0 if share == 0 else max(0.0, centre - reach),
            "high": 1.0 if share == 1 else min(1.0, centre + reach),
            "margin": sum(margins) / pairs,
        }
