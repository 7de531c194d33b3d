"""
Selection under several processes: given the same rollouts, one process and two keep the same groups and take the same
step. The cases are in `worker.py`; both launches run all of them.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import largest_relative_error
from distributed.worker import CASES, FIT_CASES, PPO_CASES, RLOO_CASES
from processes import run


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """What every process of every launch wrote, by (processes, rank)."""
    directory = tmp_path_factory.mktemp("processes")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command in ([WORKER, directory], [*launch, WORKER, directory]):
        run(command)
    return {
        (world, rank): torch.load(directory / f"results_{world}_{rank}.pt", weights_only=False)
        for world, rank in ((1, 0), (2, 0), (2, 1))
    }


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_on_the_rows_of_one(results: Any, case: str) -> None:
    alone = results[1, 0][case]["trained"]
    together = results[2, 0][case]["trained"], results[2, 1][case]["trained"]
    assert len(together[0]) == len(together[1])
    assert Counter(alone) == Counter(together[0] + together[1])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_step_of_one(results: Any, case: str) -> None:
    alone, first, second = (results[key][case]["weights"] for key in ((1, 0), (2, 0), (2, 1)))
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight)
    start = results[1, 0]["all"]["weights"]
    assert case == "all" or any(not torch.equal(start[name], alone[name]) for name in alone)


@pytest.mark.parametrize("case", CASES)
def test_metrics_do_not_depend_on_the_number_of_processes(results: Any, case: str) -> None:
    alone, first, second = (results[key][case] for key in ((1, 0), (2, 0), (2, 1)))
    assert alone["counters"] == first["counters"] == second["counters"]
    for one, two in zip(alone["logs"], first["logs"], strict=True):
        assert one == pytest.approx(two, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("case", [case for case in CASES if "informed" in case or "predicted" in case])
def test_two_processes_read_in_prompts_what_one_reads(results: Any, case: str) -> None:
    alone, first, second = (results[key][case]["outlook"] for key in ((1, 0), (2, 0), (2, 1)))
    assert alone["features"]["tokens"] == first["features"]["tokens"] == second["features"]["tokens"] > 0
    read, one, two = (outlook["features"]["young"] for outlook in (alone, first, second))
    assert one == two
    assert read.keys == one.keys and len(read) > 32
    # Those of the first batch to the last bit; the weights of the second differ by rounding
    assert all(np.array_equal(*rows) for rows in zip(read.rows[:16], one.rows[:16], strict=True))
    assert np.allclose(np.stack(read.rows), np.stack(one.rows), atol=0.05)


def test_the_cases_are_what_they_say(results: Any) -> None:
    """Copies, refills and the cap really happened, so that the comparisons above compare something."""

    def logged(case: str, key: str) -> list[float]:
        return [log[f"selection/{key}"] for log in results[1, 0][case]["logs"] if f"selection/{key}" in log]

    for case in ("refill", "refill_spanning", "refill_odd_groups"):
        assert max(logged(case, "rounds")) > 1, case
        assert sum(logged(case, "groups_duplicated")) == 0, case
    for case in ("refill_informed", "refill_informed_spanning"):
        first, second = logged(case, "prompts_replaced")
        assert first == 0 and second > 0, case
        assert max(logged(case, "rounds")) > 1, case
    for case in ("refill_informed_by_prompts", "curriculum_predicted"):  # decided by what was read
        assert max(logged(case, "trusts_features")) == 1, case
    replaced = results[1, 0]["curriculum_predicted"]["logs"]
    assert sum(log.get("curriculum/prompts_replaced", 0) for log in replaced) > 0
    # A full batch of 6 slots has fewer groups
    kept = zip(logged("group_sizes", "groups_kept"), logged("group_sizes", "groups_duplicated"), strict=True)
    assert any(groups < 6 and copies == 0 for groups, copies in kept)
    assert sum(logged("refill_capped", "groups_duplicated")) > 0
    assert max(logged("refill_capped", "rounds")) == 2
    for case in ("duplicate", "duplicate_spanning", "duplicate_rare", "batch_scaled_copies"):
        assert sum(logged(case, "groups_duplicated")) > 0, case


@pytest.mark.parametrize("case", FIT_CASES)
def test_micro_batches_that_fit_give_trls_gradient_on_one_process_and_two(results: Any, case: str) -> None:
    theirs = results[1, 0][f"fit_{case}_False"]["gradients"]
    assert len(theirs) == 2 and any(step.any() for step in theirs)
    for key in ((1, 0), (2, 0), (2, 1)):
        ours = results[key][f"fit_{case}_True"]["gradients"]
        # bnpo divides by the tokens of each process's micro-batch: only TRL on two processes gives the same
        theirs_here = results[key][f"fit_{case}_False"]["gradients"] if case == "bnpo" else theirs
        assert largest_relative_error(ours, theirs_here) <= 1e-5


def test_prompts_are_shared_on_one_process_and_two(results: Any) -> None:
    for key in ((1, 0), (2, 0), (2, 1)):
        sharing = results[key]["fit_shared_True"]["sharing"]
        assert sharing.packed_passes > 0
        assert sharing.token_slots < sharing.token_slots_unshared
        assert key == (1, 0) or sharing.cached_passes == 0  # a second call of the model would need all processes


@pytest.mark.parametrize("case", FIT_CASES)
def test_two_processes_save_what_one_saves(results: Any, case: str) -> None:
    alone, first, second = (results[key][f"fit_{case}_True"]["saved"] for key in ((1, 0), (2, 0), (2, 1)))
    assert first == second
    assert (first.rows, first.skipped_rows, first.merged_rows) == (
        alone.rows,
        alone.skipped_rows,
        alone.merged_rows,
    )
    assert first.token_slots < first.token_slots_trl and alone.token_slots < alone.token_slots_trl
    assert (first.skipped_rows > 0) == (case not in ("bnpo", "kl", "copies"))
    assert (first.regrouped_rows > 0) == (case != "bnpo")
    assert (first.merged_rows > 0) == (case == "copies")


@pytest.mark.parametrize("case", FIT_CASES)
def test_metrics_of_the_loss_do_not_depend_on_who_computes_a_row(results: Any, case: str) -> None:
    if case == "bnpo":
        pytest.skip("its micro-batches are TRL's, whose metrics do depend on them")
    alone, together = (results[key][f"fit_{case}_True"]["logs"] for key in ((1, 0), (2, 0)))
    means = ("loss", "kl", "entropy", "clip_ratio", "step/clip_ratio", "computed/", "trust_region/")
    compared = 0
    for one, two in zip(alone, together, strict=True):
        for key in one:
            if key.startswith(means):
                known = two[key] if two[key] is None else pytest.approx(two[key], rel=1e-4, abs=1e-6)
                assert one[key] == known, key
                compared += 1
    assert compared >= 4
    assert case != "trust_region" or 0 < alone[1]["trust_region/dropped"] < 0.5


@pytest.mark.parametrize("case", RLOO_CASES)
def test_rloo_has_trls_gradient_on_one_process_and_two(results: Any, case: str) -> None:
    for key in ((1, 0), (2, 0), (2, 1)):
        theirs, ours = results[key][f"rloo_{case}_theirs"], results[key][f"rloo_{case}_ours"]
        assert ours["completions"] == theirs["completions"]
        assert largest_relative_error(ours["gradients"], theirs["gradients"]) <= 1e-5
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3, abs=1e-6)
        assert ours["clipped"] > 0 and theirs["clipped"] > 0
    first, second = (results[2, rank][f"rloo_{case}_ours"] for rank in (0, 1))
    assert first["completions"] != second["completions"]
    assert all(map(torch.equal, first["gradients"], second["gradients"]))


def whole(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weight.double().flatten() for weight in weights.values()])


@pytest.mark.parametrize("case", PPO_CASES)
def test_ppo_takes_the_same_step_on_one_process_and_two(results: Any, case: str) -> None:
    alone, first, second = (results[key][f"ppo_{case}"] for key in ((1, 0), (2, 0), (2, 1)))
    moved = [name for name, weight in alone["weights"].items() if not torch.equal(weight, alone["before"][name])]
    assert any("critic." in name for name in moved) and any("critic." not in name for name in moved)
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    if case != "replay":
        # Prompts are shared in other ways on one process: sums in another order
        weights, before = whole(alone["weights"]), whole(alone["before"])
        assert (whole(first["weights"]) - weights).norm() <= 5e-5 * (weights - before).norm()
    assert first["state"] == second["state"]
    assert first["skipped"] == alone["skipped"] == (1 if case == "broken" else 0)


OF_PPO = ("objective/", "val/", "loss/", "policy/", "reward", "completions/")


@pytest.mark.parametrize("case", [case for case in PPO_CASES if case != "replay"])
def test_metrics_of_ppo_do_not_depend_on_the_number_of_processes(results: Any, case: str) -> None:
    alone, first, second = (results[key][f"ppo_{case}"]["logs"] for key in ((1, 0), (2, 0), (2, 1)))
    compared = set()
    for one, two, other in zip(alone, first, second, strict=True):
        assert one.keys() == two.keys() == other.keys()
        for key in one:
            if key.startswith(OF_PPO) and one[key] is None:
                assert two[key] is None, key
            elif key.startswith(OF_PPO):
                assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-5, nan_ok=True), key
                compared.add(key)
    expected = {"objective/kl", "val/explained_variance", "loss/value_avg", "loss/policy_avg", "policy/approxkl_avg"}
    assert expected <= compared


@pytest.mark.parametrize("case", ["everything", "steps"])
def test_every_process_shows_all_completions_and_credits_its_share(results: Any, case: str) -> None:
    alone, first, second = (results[key][f"ppo_{case}"] for key in ((1, 0), (2, 0), (2, 1)))
    assert len(alone["completions"]["prompt"]) == len(alone["credits"]) == 5
    for name, column in alone["completions"].items():
        expected = pytest.approx(column, rel=1e-5) if name == "score" else column
        assert first["completions"][name] == second["completions"][name] == expected
    shares = [*first["credits"], *second["credits"]]
    for credit, other in zip(alone["credits"], shares, strict=True):
        assert (credit.prompt, credit.tokens) == (other.prompt, other.tokens)
        assert other.advantages == pytest.approx(credit.advantages, abs=1e-4)
        assert other.score == pytest.approx(credit.score, rel=1e-5)
    assert any(any(credit.advantages) for credit in alone["credits"])


def test_a_fault_on_one_process_stops_all_with_a_checkpoint(results: Any) -> None:
    for key in ((1, 0), (2, 0), (2, 1)):
        fault = results[key]["fault"]
        assert "fails_on_last_process" in fault["error"]
        assert "KeyError" in fault["error"]
        assert fault["saved"] == ["checkpoint-4"]  # DUPO takes four steps per generation


def test_a_resumed_run_equals_the_uninterrupted_one(results: Any) -> None:
    for key in ((1, 0), (2, 0), (2, 1)):
        whole, resumed = results[key]["whole"], results[key]["resumed"]
        for name, weight in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], weight)
        assert whole["run"].pop("duplicates").equal(resumed["run"].pop("duplicates"))
        assert whole["run"] == resumed["run"]


def test_a_checkpoint_goes_on_with_another_number_of_processes(results: Any) -> None:
    first, second = results[2, 0]["other_world"], results[2, 1]["other_world"]
    assert first["step"] == second["step"] == 4
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight)
