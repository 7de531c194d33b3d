"""The processes that tests start: what they are told, how they end, and that ranks end together."""

import os
import signal
import time
from pathlib import Path

import processes
import pytest
from processes import run, start


RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_a_script_gets_its_arguments_variables_and_folder(tmp_path):
    code = "import os, sys; print(sys.argv[1:], os.environ['MARK'], os.getcwd(), __name__, __file__)"
    path = script(tmp_path, code)
    assert run([path, "a b", 1], {"MARK": "here"}, cwd=tmp_path) == f"['a b', '1'] here {tmp_path} __main__ {path}\n"
    assert "MARK" not in os.environ


def test_a_script_imports_what_stands_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    assert run([script(tmp_path, "import beside; print(beside.NAME)")]) == "beside\n"


def test_each_process_starts_from_the_same_state():
    code = "import torch, tiny; print(torch.rand(1).item()); torch.manual_seed(5); tiny.WORDS.clear()"
    assert run(["-c", code]) == run(["-c", code])


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise KeyError('none')", 1, "KeyError: 'none'"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no such model')", 1, "no such model"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_how_it_ended_and_what_it_said(code, status, said):
    process = start(["-c", "print('begun', flush=True)\n" + code])
    assert process.wait() == status
    assert process.printed().startswith("begun") and said in process.printed()
    with pytest.raises(AssertionError, match=f"exit status {status}"):
        run(["-c", code])


def test_a_process_can_be_killed():
    process = start(["-c", "import time; time.sleep(100)"])
    assert process.poll() is None
    process.kill(signal.SIGKILL)
    assert process.wait(timeout=10) == -signal.SIGKILL


def test_a_process_that_takes_too_long_is_an_error_and_gone():
    process = start(["-c", "import time; print('working', flush=True); time.sleep(100)"])
    with pytest.raises(AssertionError, match="no end after 1 s\nworking"):
        process.wait(timeout=1)
    for _ in range(100):
        if process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() == -signal.SIGKILL


@pytest.mark.distributed
def test_ranks_meet(tmp_path):
    code = """
import os, sys, torch
torch.distributed.init_process_group("gloo")
total = torch.tensor([1 + torch.distributed.get_rank()])
torch.distributed.all_reduce(total)
sys.stdout.write(f"{os.environ['LOCAL_RANK']} of {torch.distributed.get_world_size()}: {total.item()}\\n")
"""
    assert sorted(run([*RANKS, script(tmp_path, code)]).splitlines())[:2] == ["0 of 2: 3", "1 of 2: 3"]


@pytest.mark.distributed
def test_a_rank_that_fails_ends_the_others(tmp_path):
    code = "import os, time\nif os.environ['RANK'] == '1':\n    raise RuntimeError('lost')\ntime.sleep(100)"
    begun = time.monotonic()
    process = start([*RANKS, script(tmp_path, code)])
    assert process.wait(timeout=60) == 1
    assert time.monotonic() - begun < 50
    assert "RuntimeError: lost" in process.printed() and "rank 1 ended with status 1" in process.printed()


def test_a_launcher_needs_the_marker(tmp_path):
    assert not processes.launchers_allowed
    with pytest.raises(AssertionError, match=r"mark the test with @pytest\.mark\.distributed"):
        start([*RANKS, script(tmp_path, "")])
