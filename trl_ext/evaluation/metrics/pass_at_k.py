"""
pass@k: the probability that at least one of k samples solves a prompt, estimated without bias from n ≥ k samples of
which c are right (https://huggingface.co/papers/2107.03374, eq. 1):

    pass@k = mean over prompts of 1 − C(n − c, k) / C(n, k)
"""

import math
from collections.abc import Sequence

import datasets
import evaluate


DESCRIPTION = "Unbiased estimate of the probability that one of k samples is right (Chen et al., 2021, eq. 1)."
CITATION = "Chen et al., Evaluating Large Language Models Trained on Code, 2021, arXiv:2107.03374"
INPUTS = """
Args:
    predictions (`list[list[float]]`): for each prompt, whether each of its samples is right: 1 or 0. Prompts may have
        different numbers of samples.
    k (`list[int]`, *optional*, defaults to `[1]`): each at most the smallest number of samples that a prompt has.
Returns:
    `pass@<k>` (`float`) for each k, in [0, 1].
Raises:
    ValueError: without predictions, for a k that is too large or not positive, and for values other than 0 and 1.
"""


class PassAtK(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),  # type: ignore[arg-type]
        )

    def _compute(self, predictions: list[list[float]], k: Sequence[int] = (1,)) -> dict[str, float]:
        fewest = min((len(samples) for samples in predictions), default=0)
        if not fewest:
            raise ValueError("pass_at_k needs at least one prompt, and a sample of each.")
        wrong_kinds = {value for samples in predictions for value in samples} - {0, 1}
        if wrong_kinds:
            raise ValueError(f"pass_at_k takes 1 for right and 0 for wrong, not {min(wrong_kinds)}.")
        found = {}
        for size in k:
            if not 1 <= size <= fewest:
                raise ValueError(f"k={size} must be between 1 and {fewest}, the fewest samples that a prompt has.")
            failures = [
                math.comb(len(samples) - int(sum(samples)), size) / math.comb(len(samples), size)
                for samples in predictions
            ]
            found[f"pass@{size}"] = 1 - math.fsum(failures) / len(failures)
        return found
