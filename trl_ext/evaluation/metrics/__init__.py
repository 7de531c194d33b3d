"""
Metrics for Hugging Face `evaluate` that need no network: each file is one, and `load_metric` is `evaluate.load` on it.
They combine and save like any other (`evaluate.combine`, `evaluate.save`).
"""

from pathlib import Path
from typing import Any

import evaluate


METRICS = ("exact_match_ids", "pass_at_k", "preference_accuracy", "mean_kl")


def load_metric(name: str, **kwargs: Any) -> evaluate.EvaluationModule:
    """
    Args:
        name (`str`):
            `"exact_match_ids"`, `"pass_at_k"`, `"preference_accuracy"` or `"mean_kl"`.
        **kwargs:
            For `evaluate.load`, e.g. `experiment_id` where several processes compute at once.

    Raises:
        ValueError: for another name.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}. Choose one of {', '.join(map(repr, METRICS))}.")
    return evaluate.load(str(Path(__file__).with_name(f"{name}.py")), **kwargs)
