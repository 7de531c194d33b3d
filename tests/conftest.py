"""
Settings that every test needs, also under a bare `pytest`: nothing is downloaded, and threads that would wait for each
other on models this small are not started. And what the markers mean, checked where a test runs:

- `train`: takes more than one optimizer step, itself or in its fixtures. A test without the marker fails if it does.
- `distributed`: starts several processes. `processes.start` refuses a launcher in a test without the marker.
- `slow`: longer than about ten seconds. What was slow without the marker is listed at the end.
- `faults`: kills processes at random moments (`make test-faults`). Not even a bare `pytest` runs it.
- `engines`: every method with every engine, and many random runs (`make test-distributed`). Nor does it run this.

`make test-fast` leaves out all of them.
"""

import gc
import os
from collections import Counter
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# TRL warns at every construction that rollout functions and environments are experimental
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

# Real engines have an environment of their own (make test-vllm)
ENGINES = Path(__file__).with_name("vllm_engine")
HAS_VLLM = find_spec("vllm") is not None

SLOW = 15.0  # seconds, on a machine that may be busy
DISTRIBUTED = "tests/distributed/"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path == ENGINES and not HAS_VLLM else None


def pytest_report_header() -> str:
    return "" if HAS_VLLM else f"{ENGINES.name}: left out, because vLLM is not installed here (make test-vllm)"


# Optimizer steps


class OptimizerSteps:
    """Counts the optimizer steps of this process, and remembers how many each fixture took."""

    def __init__(self) -> None:
        self.taken = 0
        self.of_fixtures: dict[tuple[str, str], int] = {}

    def count(self, *args: Any) -> None:
        self.taken += 1

    def of(self, item: pytest.Item) -> int:
        """Steps that the fixtures of a test took, for this test or for an earlier one."""
        names = set(getattr(item, "fixturenames", ()))
        return sum(
            steps
            for (where, name), steps in self.of_fixtures.items()
            if name in names and item.nodeid.startswith(where)
        )


STEPS = OptimizerSteps()


def pytest_collection_finish() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(STEPS.count)
    # Accelerate collects garbage around every training: what was imported by now needn't be looked through
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    before = STEPS.taken
    result = yield
    STEPS.of_fixtures[fixturedef.baseid, fixturedef.argname] = STEPS.taken - before
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    before = STEPS.taken
    result = yield
    steps = STEPS.taken - before + STEPS.of(item)
    if steps > 1 and item.get_closest_marker("train") is None:
        pytest.fail(f"{item.name} takes {steps} optimizer steps: mark it with @pytest.mark.train", pytrace=False)
    return result


# Several processes


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    import processes

    processes.launchers_allowed = item.get_closest_marker("distributed") is not None
    return (yield)


# Several workers, with `-n`


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A module's tests go to one worker, for their fixtures; so do those of all modules that start processes."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return DISTRIBUTED if nodeid.startswith(DISTRIBUTED) else nodeid.partition("::")[0]

    return ByModule(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest begins first, or one worker would be left with it in the end."""
    if not hasattr(config, "workerinput"):
        return
    cost: Counter[str] = Counter()
    for item in items:
        markers = {marker.name for marker in item.iter_markers()}
        cost[module(item)] += (
            20 if "slow" in markers else 2 if "distributed" in markers else 1 if "train" in markers else 0.1
        )
    items.sort(key=lambda item: (not item.nodeid.startswith(DISTRIBUTED), -cost[module(item)], module(item)))


def module(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


# Time


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports: Iterator[Any] = (r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind))
    slow = [
        r
        for r in reports
        if r.duration > SLOW and not {"slow", "distributed", "faults", "engines"} & r.keywords.keys()
    ]
    if slow:
        terminalreporter.section(f"longer than {SLOW:.0f} s, and not marked slow")
        for report in slow:
            terminalreporter.write_line(f"{report.duration:6.1f} s {report.when} {report.nodeid}")
