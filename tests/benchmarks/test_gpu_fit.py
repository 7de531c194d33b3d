"""What surrounds the parts of `benchmarks/gpu_fit.py`: time that runs out, parts that fail, the table."""

import argparse
from pathlib import Path

import gpu_fit
import pytest


PLANNED = {"bytes": {"load": 2**30, "update": 3 * 2**30}, "seconds": {"update": 4.0}, "tokens": 800, "fits": True}
FOUND = {"machine": "GPU", "torch": "2", "took": 1.0, "seconds": {"update": 2.0}, "planned": PLANNED}
FOUND |= {"allocated": {"load": 2**29, "update": 2**31}, "reserved": {"update": 2**32}}


def arguments(**given):
    return argparse.Namespace(**{"tiny": True, "gib": 74.5, "minutes": 10.0, "parts": None, **given})


def test_without_time_every_part_is_skipped(capsys):
    results = gpu_fit.run_all(arguments(minutes=0.0))
    assert list(results) == list(gpu_fit.PARTS)
    assert all("skipped: " in found["failed"] for found in results.values())
    assert len(capsys.readouterr().err.splitlines()) == len(results)


@pytest.mark.slow
def test_a_part_that_fails_or_does_not_end_says_so():
    failed = gpu_fit.start_part("PPO 7B", arguments(gib="much"), 60.0)["failed"]
    assert "invalid float value: 'much'" in failed
    assert gpu_fit.start_part("PPO 7B", arguments(), 0.1)["failed"] == "no end after 0 s"


def test_the_table_has_what_was_measured_and_what_failed():
    lines = gpu_fit.table({"DPO 7B": FOUND, "PPO 7B": {"failed": "out of memory | twice"}})
    assert lines[2:] == [
        "| DPO 7B | load | 0.50 |  | 1.00 |  |  |",
        "| DPO 7B | update | 2.00 | 4.00 | 3.00 | 2 | 4 |",
        "| DPO 7B | step | | | | 2, 400 tokens/s | 200 tokens/s |",
        "| PPO 7B | out of memory / twice | | | | | |",
    ]


def test_ratios_need_both_parts():
    slow = FOUND | {"seconds": {"generate": 2.0, "update": 6.0}}
    parts = ("GRPO 7B, prompts shared", "GRPO 7B, not shared", "PPO 7B")
    assert gpu_fit.ratios(dict(zip(parts, (FOUND, slow, FOUND), strict=True))) == {
        "update, prompts shared over not shared": pytest.approx(1 / 3),
        "step, PPO over GRPO": 0.25,
    }
    assert gpu_fit.ratios({"PPO 7B": FOUND, "GRPO 7B, not shared": {"failed": "no"}}) == {}


def test_a_report_takes_the_place_of_the_one_before(tmp_path: Path):
    file = tmp_path / "results.md"
    file.write_text("# Results\n\nabove\n")
    gpu_fit.write("first", file)
    file.write_text(file.read_text() + "\nbelow\n")
    gpu_fit.write("second", file)
    text = file.read_text()
    assert "first" not in text and text.count("gpu_fit.py") == 1
    assert text.index("above") < text.index("second") < text.index("below")


def test_phases_are_means_of_the_steps_after_the_first():
    phases = gpu_fit.Phases(on_gpu=False)
    phases.steps = [{"load": 9.0, "update": 9.0}, {"update": 1.0}, {"update": 3.0, "generate": 2.0}, {}]
    assert phases.seconds() == {"update": 2.0, "generate": 1.0}


def test_tiny_models_are_no_result(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_fit.py", "--tiny", "--report"])
    with pytest.raises(SystemExit) as end:
        gpu_fit.main()
    assert end.value.code == 2 and "is no result" in capsys.readouterr().err
