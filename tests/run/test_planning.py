"""`trl-ext plan`, from its command line to what it prints and writes."""

import json
import subprocess
from typing import Any

import pytest
import yaml
from planner.jobs import folder
from trl import ModelConfig, TrlParser

from trl_ext import DPOConfig, PPOConfig, cli
from trl_ext.run.arguments import DPOArguments, PPOArguments


SMALL = ("--layout", "1xa100-80g", "--prompt_tokens", "16", "--completion_tokens", "16")


def test_the_last_line_is_one_json_object(tmp_path, capsys):
    model = str(folder(tmp_path / "model"))
    status = cli.main(["plan", "--method", "ppo", "--model", model, *SMALL, "--json"])
    printed = capsys.readouterr().out.strip().splitlines()
    found = json.loads(printed[-1])
    assert status == 0 and found["fits"] and found["free"] > 0.9
    assert [phase["name"] for phase in found["phases"]][:2] == ["load", "generate"]
    assert found["job"]["critic"] == "head" and found["job"]["reward"] == found["job"]["reference"] == "adapter"
    assert found["largest_micro_batch"] > 1
    assert any(line.startswith("Fits: ") for line in printed)


def test_what_does_not_fit_ends_with_status_1(capsys):
    """Four separate models with all weights trained. Only their weights are counted by name: no pass is that large."""
    large = ("--model", "33b", "--layout", "2xa100-80g", "--prompt_tokens", "8", "--completion_tokens", "8")
    status = cli.main(["plan", "--method", "ppo", "--roles", "separate", "--full", *large, "--json"])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert status == 1 and not found["fits"] and found["largest_micro_batch"] == 0
    assert "optimizer" in found["obstacle"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layout", "further"),
    [
        ("ppo", "4xa100-80g", ()),
        ("dpo", "2xa100-80g", ()),
        ("ppo", "2xa100-80g", ()),
        ("ppo", "1xa100-80g", ("--load_in_4bit",)),
    ],
)
def test_33b_fits_with_a_tenth_to_spare(method, layout, further, capsys):
    """And at the largest micro-batch it fits, where one more doesn't."""

    def plan(*more: str) -> dict[str, Any]:
        words = ["--method", method, "--model", "33b", "--layout", layout, *further, *more, "--json"]
        status = cli.main(["plan", *words])
        found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert status == (0 if found["fits"] else 1)
        return found

    found = plan()
    assert found["fits"] and found["free"] >= 0.1 and found["phases"]
    largest = found["largest_micro_batch"]
    chosen = ("--strategy", found["job"]["strategy"])  # or a larger batch would get another that fits
    assert plan(*chosen, "--batch", str(largest))["fits"]
    assert not plan(*chosen, "--batch", str(largest + 1))["fits"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "ppo", "--model", "33b", "--layout", "3xa100"], "--layout is '3xa100'"),
        (["--method", "sft", "--model", "33b", "--layout", "1xa100-80g"], "invalid choice"),
        (["--method", "dpo", "--model", "33b", "--layout", "1xa100-80g", "--vllm", "server"], "generates nothing"),
        (["--method", "ppo", "--model", "none", "--layout", "1xa100-80g"], "--model is 'none'"),
    ],
)
def test_wrong_command_lines_are_told_on_one_line(words, told, capsys):
    assert cli.main(["plan", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert told in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "config", "script", "strategy"),
    [
        ("ppo", PPOConfig, PPOArguments, "zero3"),
        ("ppo", PPOConfig, PPOArguments, "fsdp2"),
        ("dpo", DPOConfig, DPOArguments, "zero2"),
        ("dpo", DPOConfig, DPOArguments, "ddp"),
    ],
)
def test_files_are_read_by_those_who_use_them(method, config, script, strategy, tmp_path):
    """Accelerate's launcher and the recipe's parser take them as they are."""
    from accelerate.commands.config.config_args import load_config_from_file

    model, plan = str(folder(tmp_path / "model")), tmp_path / "plan"
    words = ["--method", method, "--model", model, "--layout", "2xa100-80g", *SMALL[2:], "--strategy", strategy]
    assert cli.main(["plan", *words, "--write", str(plan), "--picture", str(tmp_path / "plan.png")]) == 0
    read = load_config_from_file(str(plan / "accelerate.yaml"))
    assert read.num_processes == 2
    assert (plan / "deepspeed.json").exists() == strategy.startswith("zero")
    arguments = yaml.safe_load((plan / f"{method}.yaml").read_text())
    parser = TrlParser((script, config, ModelConfig))
    known = {action.dest for action in parser._actions}
    assert set(arguments) <= known
    assert f"run {method} --accelerate_config" in (plan / "launch.sh").read_text()
    subprocess.run(["sh", "-n", str(plan / "launch.sh")], check=True)
    assert (tmp_path / "plan.png").stat().st_size > 10_000
