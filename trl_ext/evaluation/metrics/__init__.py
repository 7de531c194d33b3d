"""
Metrics for Hugging Face `evaluate` that need no network. Each file is a metric, and `load_metric` calls
`evaluate.load` on it. `evaluate.combine` and `evaluate.save` work with them.
"""

from pathlib import Path
from typing import Any

import evaluate

from ...errors import require_one_of


METRICS = ("exact_match_ids", "pass_at_k", "preference_accuracy", "mean_kl")


def load_metric(name: str, **kwargs: Any) -> evaluate.EvaluationModule:
    """
    Loads a metric of this package.

    Args:
        name (`str`):
            `"exact_match_ids"`, `"pass_at_k"`, `"preference_accuracy"` or `"mean_kl"`.
        **kwargs:
            Arguments of `evaluate.load`, for example `experiment_id` if several processes compute at the same time.

    Raises:
        ValueError: for an unknown name.
    """
    require_one_of("name", name, METRICS)
    return evaluate.load(str(Path(__file__).with_name(f"{name}.py")), **kwargs)
