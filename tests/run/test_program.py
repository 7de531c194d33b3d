"""How a program ends when its user has got something wrong."""

import os
from pathlib import Path

import processes
import pytest

from trl_ext.errors import UserError
from trl_ext.run import program
from trl_ext.run.launching import run_by_accelerate
from trl_ext.run.program import preparing, without_debug


ROOT = Path(__file__).parents[2]


@program.program
def main(wrong: type | None = None, argv: list[str] | None = None) -> list[str] | None:
    with preparing():
        if wrong is not None:
            raise wrong("a\nb")
    return argv


@pytest.fixture
def words(monkeypatch):
    """The arguments of the process."""
    found = ["folder/mine.py", "--x", "1"]
    monkeypatch.setattr("sys.argv", found)
    return found


def test_one_line_and_a_status(words, capsys):
    for kind, hint in ((UserError, ""), (OSError, " (--debug shows the traceback)")):
        with pytest.raises(SystemExit) as end:
            main(kind)
        assert end.value.code == 2
        assert capsys.readouterr().err == f"mine.py: error: a b{hint}\n"


def test_debug_brings_the_traceback_back(words):
    words.append("--debug")
    with pytest.raises(UserError) as error:
        main(OSError)
    assert isinstance(error.value.__cause__, OSError)
    assert main() == ["--x", "1"]  # and is no argument of the recipe


def test_with_arguments_it_is_a_function(words):
    assert main(argv=["--debug"]) == ["--debug"]
    with pytest.raises(UserError):
        main(OSError, argv=[])


def test_what_nobody_said_on_purpose_keeps_its_traceback():
    for wrong in (lambda: 1 % None, lambda: {}["a"], lambda: [][0], lambda: None.x):
        with pytest.raises((TypeError, LookupError, AttributeError)) as error, preparing():
            wrong()
        assert not isinstance(error.value, UserError)
    with pytest.raises(UserError, match="said so"), preparing():
        raise TypeError("said so")


def test_transformers_has_a_debug_of_its_own():
    assert without_debug(["--debug", "underflow_overflow"]) == (["--debug", "underflow_overflow"], False)
    assert without_debug(["--debug", "--a", "b"]) == (["--a", "b"], True)
    assert without_debug([]) == ([], False)


def test_of_several_processes_the_first_speaks(words, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(program.time, "sleep", waited.append)
    for rank, seconds in (("0", []), ("1", [program.OTHERS_WAIT])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            main(UserError)
        assert waited == seconds
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.distributed
def test_one_line_for_a_launch_of_two_processes(tmp_path):
    (tmp_path / "two.yaml").write_text(
        "distributed_type: MULTI_GPU\nuse_cpu: true\nmixed_precision: 'no'\nnum_processes: 2\n"
    )
    launch = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "two.yaml"]
    # Found when the processes have met
    wrong = ["--model_name_or_path", "m", "--dataset_name", "none.jsonl", "--output_dir", tmp_path]
    process = processes.start([*launch, ROOT / "recipes/dapo.py", *wrong], cwd=tmp_path)
    assert process.wait() != 0
    assert process.printed().count("dapo.py: error: --dataset_name is 'none.jsonl'") == 1


def test_a_launcher_adds_no_traceback(tmp_path, monkeypatch):
    """Of one process. `accelerate launch` itself does, without `--quiet`."""
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(2)\n")
    monkeypatch.setattr("os.environ", dict(os.environ))
    with pytest.raises(SystemExit) as end:
        run_by_accelerate(tmp_path / "ends.py", [], ["--num_processes", "1", "--cpu"])
    assert end.value.code == 2
