"""
What the planner says, against real runs of tiny models: every case of `benchmarks/planner_accuracy.py`, two processes
for what is held and one for what steps take.
"""

import json
from pathlib import Path

import pytest
from processes import run


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "planner_accuracy.py"

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]


ALL = ["steps", "fsdp2", *(pytest.param(name, marks=pytest.mark.engines) for name in ("zero2", "zero3", "ddp"))]


@pytest.mark.parametrize("what", ALL)
def test_real_runs_hold_and_take_what_is_planned(what):
    """Totals within 5 %, parts within 10 %."""
    chosen = ["--kind", "steps"] if what == "steps" else ["--kind", "states", "--strategies", what]
    found = json.loads(run([SCRIPT, "--size", "tiny", *chosen], timeout=1100).strip().splitlines()[-1])
    assert found["totals"]
    for kind, limit in (("totals", 0.05), ("parts", 0.10)):
        assert all(abs(error) <= limit for error in found[kind].values()), found
