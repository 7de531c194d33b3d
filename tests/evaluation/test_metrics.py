"""Metrics for `evaluate`, loaded from their files without a network; values worked out by hand."""

import itertools
import math
from typing import Any

import evaluate
import pytest

from trl_ext.evaluation.metrics import METRICS, load_metric


@pytest.fixture(autouse=True)
def caches(tmp_path: Any, monkeypatch: Any) -> None:
    """What `evaluate` writes down before it computes goes to a folder of the test."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def compute(name: str, **inputs: Any) -> dict[str, Any]:
    found = load_metric(name).compute(**inputs)
    assert found is not None
    return found


@pytest.mark.parametrize("name", METRICS)
def test_each_is_one_file_that_evaluate_loads_and_describes(name):
    metric = load_metric(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.description
    assert "Returns:" in metric.inputs_description


def test_an_unknown_one_is_named():
    with pytest.raises(ValueError, match=r"name='bleu' is unknown\. Choose one of 'exact_match_ids', 'pass_at_k'"):
        load_metric("bleu")


def test_exact_match_is_on_ids():
    predictions, references = [[5, 6], [5, 6], [], [5]], [[5, 6], [6, 5], [], [5, 2]]
    assert compute("exact_match_ids", predictions=predictions, references=references) == {"exact_match": 0.5}
    found = compute("exact_match_ids", predictions=predictions, references=references, ignore=[2])
    assert found == {"exact_match": 0.75}


def test_exact_match_in_batches():
    metric = load_metric("exact_match_ids")
    metric.add_batch(predictions=[[1], [2]], references=[[1], [3]])
    metric.add(prediction=[4], reference=[4])
    assert metric.compute() == {"exact_match": 2 / 3}


def test_pass_at_k_by_hand():
    # n = 4. c = 1: k = 2 misses with C(3, 2) / C(4, 2) = 3/6. c = 0: always. c = 3: C(1, 2) = 0. Mean (½ + 0 + 1) / 3
    samples = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]]
    found = compute("pass_at_k", predictions=samples, k=[1, 2, 4])
    assert found == pytest.approx({"pass@1": 4 / 12, "pass@2": 0.5, "pass@4": 2 / 3})


def test_pass_at_k_is_the_mean_over_all_choices():
    samples = [1, 0, 0, 1, 0, 0, 0]
    for k in range(1, 8):
        choices = [any(choice) for choice in itertools.combinations(samples, k)]
        assert compute("pass_at_k", predictions=[samples], k=[k])[f"pass@{k}"] == pytest.approx(
            sum(choices) / len(choices)
        )


def test_prompts_may_have_different_numbers_of_samples():
    assert compute("pass_at_k", predictions=[[1, 0], [0, 0, 1]]) == {"pass@1": pytest.approx((1 / 2 + 1 / 3) / 2)}


def test_preference_accuracy_by_hand():
    # Right, right, wrong, tie: 2.5 of 4. Margins 1, 2, −3, 0
    found = compute("preference_accuracy", chosen=[1.0, 3.0, 0.0, 2.0], rejected=[0.0, 1.0, 3.0, 2.0])
    assert found["preference_accuracy"] == 0.625
    assert found["margin"] == 0
    # Wilson with z² = 3.841459: centre (0.625 + 0.480182) / 1.960365 = 0.563764;
    # reach 1.959964 / 1.960365 · √(0.058594 + 0.060023) = 0.344338
    assert (found["low"], found["high"]) == pytest.approx((0.219427, 0.908101), abs=2e-6)


def test_unanimous_pairs_are_not_certainty():
    found = compute("preference_accuracy", chosen=[1.0] * 10, rejected=[0.0] * 10)
    assert found["high"] == 1
    assert found["low"] == pytest.approx(10 / (10 + 3.841459), abs=1e-6)  # n / (n + z²)


POLICY, REFERENCE = [[-1.0, -2.0], [-0.5], [-1.0, -1.0, -1.0]], [[-1.5, -2.5], [-2.5], [-1.0, -1.0, -4.0]]


def test_mean_kl_by_hand():
    # Sums 1, 2, 3: mean 2, deviation 1, t(2 degrees) 4.302653 / √3; 6 nats over 6 tokens
    found = compute("mean_kl", predictions=POLICY, references=REFERENCE)
    reach = 4.302653 / math.sqrt(3)
    assert found == pytest.approx(
        {"mean_kl": 2, "low": 2 - reach, "high": 2 + reach, "per_token": 1, "units": 3}, rel=1e-6
    )


def test_k3_by_hand():
    # exp(−x) − 1 + x at ½, ½; 2; 0, 0, 3
    found = compute("mean_kl", predictions=POLICY, references=REFERENCE, estimator="k3")
    sums = [2 * (math.exp(-0.5) - 0.5), math.exp(-2) + 1, math.exp(-3) + 2]
    assert found["mean_kl"] == pytest.approx(sum(sums) / 3)


def test_the_prompt_is_the_unit():
    found = compute("mean_kl", predictions=POLICY, references=REFERENCE, prompts=["a", "b", "a"])
    # a: (1 + 3) / 2, b: 2
    assert (found["mean_kl"], found["low"], found["high"], found["units"]) == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("pass_at_k", {"predictions": [[1, 0], [1]], "k": [2]}, "k=2 must be between 1 and 1"),
        ("pass_at_k", {"predictions": [[1, 0]], "k": [0]}, "k=0 must be between"),
        ("pass_at_k", {"predictions": [[0.5]]}, "1 for right and 0 for wrong, not 0.5"),
        ("mean_kl", {"predictions": [[1.0]], "references": [[0.5]]}, "at least 2 completions of different prompts"),
        ("mean_kl", {"predictions": [[1.0]] * 2, "references": [[1.0], []]}, "Completion 1 has 1 log-prob.*but 0"),
        ("mean_kl", {"predictions": POLICY, "references": POLICY, "estimator": "k2"}, "estimator='k2' is unknown"),
        ("mean_kl", {"predictions": [[0.0]] * 2, "references": [[0.0], [-math.inf]]}, "Completion 1 .* isn't finite"),
        ("preference_accuracy", {"chosen": [1.0, math.nan], "rejected": [0.0, 0.0]}, "scores that are NaN"),
    ],
)
def test_bad_input_is_named(name, inputs, message):
    with pytest.raises(ValueError, match=message):
        compute(name, **inputs)


def test_they_combine_and_save(tmp_path):
    both = evaluate.combine([load_metric("pass_at_k")])
    both.add_batch(predictions=[[1, 0]])
    found = both.compute()
    assert found == {"pass@1": 0.5}
    saved = evaluate.save(tmp_path / "results.json", **found)
    assert saved is None or (tmp_path / "results.json").exists()
