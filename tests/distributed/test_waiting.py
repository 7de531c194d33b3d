"""A process that hangs costs the others `ddp_timeout`, also on CPUs, and they say where it hangs."""

import json
from pathlib import Path

import pytest
from distributed.waiting_worker import CASES, SECONDS
from processes import start


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("waiting_worker.py")


@pytest.mark.parametrize("case", CASES)
def test_who_waits_in_vain_says_for_whom(tmp_path, case):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start([*launch, WORKER, tmp_path, case])
    assert process.wait(timeout=120) != 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert SECONDS <= said["seconds"] < SECONDS + 60  # and not half an hour
    if case == "no function":
        assert said["error"] == "RuntimeError"
        return
    name = "judge_later" if case == "async function" else "judge"
    told = f"The reward function `{name}` of process 1 has not returned."
    assert said["error"] == "RewardTimeoutError"
    assert said["message"].startswith(told) and f"ddp_timeout={SECONDS} seconds" in said["message"]
    assert told in process.printed()  # by the process itself, before the others give up
