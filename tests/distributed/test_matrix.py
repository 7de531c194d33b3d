"""
`make test-distributed`: every method with every engine on two processes. A cell takes the steps of one process on the
same rollouts, is on the engine that it names, resumes to the weights of the uninterrupted run, bit for bit, and its
export is the policy. `matrix.py` has the table. `ENGINES_REPORT=1` writes the results into `benchmarks/RESULTS.md`.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.matrix import ALONE, CELLS, ENGINES, FULL, LORA, METHODS, PIPELINE, REFUSED, ROWS, STEPS, prepare
from distributed.matrix_worker import differences
from distributed.zero import launch_with_zero
from peft import load_peft_weights
from processes import run
from transformers import AutoModelForCausalLM

import trl_ext
from trl_ext import export_role


WORKER = Path(__file__).with_name("matrix_worker.py")
# Of what two steps of SGD move: float32, sums in another order
MOST = 2e-4


def launch(engine: str, folder: Path, rows: list[int]) -> None:
    """Runs rows of an engine on two processes, or alone."""
    command = [WORKER, engine, folder, *rows]
    if engine == ALONE:
        run(command, timeout=1800)
        return
    launched = ENGINES[engine].launched
    if launched is None:
        run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command], timeout=1800)
        return
    launch_with_zero(folder, engine, launched, *command, timeout=1800)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs write what they found; those of one process are there."""
    place = tmp_path_factory.mktemp("matrix")
    prepare(place)
    launch(ALONE, place, [])
    return place


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, folder: Path) -> tuple[str, str, float]:
    """
    An engine whose rows have run, what it printed if it broke off (the rows that it reached are there), and the
    seconds that it took.
    """
    began, broken = time.monotonic(), ""
    try:
        launch(request.param, folder, [])
    except AssertionError as error:
        broken = str(error)
    return request.param, broken, time.monotonic() - began


def found_of(folder: Path, engine: str, row: int, rank: int = 0) -> Any:
    return torch.load(folder / f"{engine}_{row}_{rank}.pt", weights_only=False)


def exported(source: Path, output: Path, adapted: bool) -> dict[str, torch.Tensor]:
    """
    The policy that plain transformers and PEFT load from an export, by the names of its modules. In this process, not
    in those of the run: ZeRO-3 would spread it.
    """
    folder = export_role(source, output=output).folder
    if not adapted:
        return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    weights = load_peft_weights(str(folder), device="cpu")
    return {name.replace(".weight", ".default.weight"): weight for name, weight in weights.items()}


def not_exported(folder: Path, engine: str, row: int, tmp_path: Path) -> list[str]:
    """What isn't in the exports of a run and of its last checkpoint as it was in the trained policy."""
    method, weights = ROWS[row]
    last = found_of(folder, engine, row)["last"]
    policy = {
        name: weight
        for name, weight in last.items()
        if "critic" not in name.split(".") and (weights == FULL or ".default." in name)
    }
    run_folder = folder / "runs" / engine / str(row)
    found = []
    # What the pipeline leaves in its folder is what its last stage ended with
    for source in [run_folder] if method == PIPELINE else [run_folder, run_folder / f"checkpoint-{STEPS}"]:
        plain = exported(source, tmp_path / source.name, weights == LORA)
        found += [f"{source.name}: {name}" for name in differences(plain, policy)]
    return found


def distances(found: dict[str, torch.Tensor], alone: dict[str, Any]) -> dict[str, float]:
    """How far policy and critic are from those of one process, as a share of how far they moved."""
    assert found.keys() == alone["after"].keys()
    apart = {}
    for of_critic in (False, True):
        names = [name for name in found if ("critic" in name.split(".")) == of_critic]
        if not names:
            continue
        ours, theirs, before = (
            torch.cat([weights[name].double().flatten() for name in names])
            for weights in (found, alone["after"], alone["before"])
        )
        assert not torch.equal(theirs, before)
        apart["critic" if of_critic else "policy"] = ((ours - theirs).norm() / (theirs - before).norm()).item()
    return apart


@pytest.mark.engines
@pytest.mark.train
@pytest.mark.distributed
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("row", range(len(ROWS)), ids=[", ".join(row) for row in ROWS])
def test_cell(
    engine: tuple[str, str, float],
    row: int,
    folder: Path,
    tmp_path: Path,
    subtests: pytest.Subtests,
    record_property: Any,
) -> None:
    name, broken, took = engine
    method, weights = ROWS[row]
    record_property("cell", (name, f"{method}, {weights}"))
    record_property("took", took)
    if not (folder / f"{name}_{row}_0.pt").exists():
        pytest.fail(f"{name} did not get here\n{broken}", pytrace=False)
    both = [found_of(folder, name, row, rank) for rank in (0, 1)]
    reason = REFUSED.get((name, method, weights))
    for found in both:
        if reason is None:
            assert "refused" not in found, found["traceback"]
        else:
            assert reason in found["refused"]
    if reason is not None:
        record_property("outcome", "refused")
        record_property("reason", both[0]["refused"])
        return
    apart = distances(both[0]["after"], found_of(folder, ALONE, row))
    record_property("outcome", f"{max(apart.values()):.0e}")
    with subtests.test("engine"):
        assert all(found["engine"] and found["processes"] == 2 for found in both)
    with subtests.test("step"):
        assert max(apart.values()) <= MOST, apart
        assert all(torch.equal(both[1]["after"][key], weight) for key, weight in both[0]["after"].items())
    with subtests.test("resumed"):
        assert both[0]["moved on"]
        assert [found["not resumed"] for found in both] == [[], []]
    with subtests.test("exported"):
        assert not_exported(folder, name, row, tmp_path) == []


@pytest.mark.engines
@pytest.mark.train
@pytest.mark.distributed
def test_the_cells_are_what_they_say(folder: Path) -> None:
    """Refills and copies happened on one process, so that there is something to compare."""
    for method, key, least in (("DAPO, refill", "generation_rounds", 2), ("DUPO", "groups_duplicated", 1)):
        for weights in (FULL, LORA):
            log = found_of(folder, ALONE, ROWS.index((method, weights)))["log"]
            assert max(entry.get(f"selection/{key}", 0) for entry in log) >= least, (method, weights)


def test_the_table_is_complete() -> None:
    trainers = {name.removesuffix("Trainer") for name in trl_ext.__all__ if name.endswith("Trainer")}
    # RLOO is in `test_processes.py`, GRPO is what all derive from, and VAPO is PPO with settings
    assert trainers - {"RLOO", "GRPO", "VAPO"} <= {method.partition(",")[0] for method in METHODS}
    assert PIPELINE in METHODS
    assert set(REFUSED) <= set(CELLS)
    assert len(CELLS) == len(set(CELLS)) == len(ENGINES) * len(METHODS) * len((FULL, LORA))
