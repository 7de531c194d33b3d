"""The `trl-ext` command, from a checkout and from a wheel."""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import quickstart
import tiny
import torch
from transformers import AutoModelForCausalLM

from trl_ext import GRPOTrainer, cli
from trl_ext.errors import UserError
from trl_ext.run import launching
from trl_ext.run.arguments import PolicyArguments, parse_arguments
from trl_ext.run.files import recipes_folder
from trl_ext.run.loading import load_reward_funcs
from trl_ext.trainers.dapo import DAPOConfig


ROOT = quickstart.ROOT
SOURCE = ("trl_ext", "recipes", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def run_python(code: str, cwd: Path, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a new process, without this one's `trl_ext`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "COLUMNS": "100", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the files that a wheel is built from, as pip does, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCE:
        (folder / "source" / name).symlink_to(ROOT / name)
    code = "import setuptools.build_meta as backend, sys; backend.build_wheel(sys.argv[1])"
    built = run_python(code, folder / "source", folder / "source", str(folder))
    assert built.returncode == 0, built.stderr[-3000:]
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Where the wheel's files are, and nothing else of the repository."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def started(monkeypatch):
    """What would be started."""
    calls = []
    monkeypatch.setattr(launching, "run_here", lambda *call: calls.append(call))
    monkeypatch.setattr(launching, "run_by_accelerate", lambda *call: calls.append(call))
    return calls


def test_recipes_are_listed_at_once(tmp_path):
    code = "import sys; from trl_ext.cli import main; main(['recipes']); print('torch' in sys.modules)"
    begun = time.perf_counter()
    run = run_python(code, tmp_path, ROOT)
    assert time.perf_counter() - begun < 3  # torch and TRL alone take longer
    *lines, imports_torch = run.stdout.splitlines()
    assert imports_torch == "False"
    names = [line.split()[0] for line in lines if line[0] != " "]
    assert names == [
        *sorted(path.stem for path in (ROOT / "recipes").glob("*.py")),
        "kind_sentence",
        "smollm2",
        "sort_digits",
    ]
    assert all(len(line) <= 100 for line in lines)
    assert "dpo             DPO: a policy from pairs of a better and a worse completion, no sampling" in lines
    assert (
        "                configs: quickstart_dpo.yaml, dpo_tutorial.yaml, dpo_qwen2.5_7b.yaml, smoke_dpo.yaml" in lines
    )


def test_help_and_version(capsys):
    for argv in (["--help"], ["recipes", "--help"], ["copy", "--help"], ["export", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(argv)
        assert exit.value.code == 0
    assert cli.main(["run", "--help"]) == 0
    said = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name:<10}{command.__doc__}" in said
    assert "--accelerate_config FILE" in said and "\ntrl_ext " in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["run"], "name a recipe first"),
        (["run", "--config", "a.yaml"], "name a recipe first"),
        (["run", "trpo"], "there is no recipe 'trpo'"),
        (["run", "dapo", "--config", "none.yaml"], "--config is 'none.yaml', which is no file in"),
        (["run", "dapo", "--accelerate_config", "8xh100"], "--accelerate_config is '8xh100'"),
        (["run", "dapo", "--num_processes", "two"], "--num_processes is 'two', but takes a whole number"),
        (["run", "dapo", "--launch", "'"], "No closing quotation"),
        (["run", "dapo", "--launch", "--cpu '\n"], "--launch is '--cpu ' ': No closing quotation"),
        (["run", "dapo", "--launch"], "--launch: expected one argument"),
        (["copy", "dapo"], "required: DIR"),
        (["recipes", "dapo"], "unrecognized arguments: dapo"),
        (["export"], "required: RUN"),
        (["export", "runs/none"], "'runs/none' is no folder. Pass the output folder of a run"),
        (["export", ".", "--checkpoint", "7"], "'.' has no checkpoint-7. There are none."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(argv) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("trl-ext: error: ") and message in said


def test_an_error_of_a_recipe_is_its_own(tmp_path, capsys, monkeypatch):
    """Said once, by the recipe, which `--debug` reaches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as exit:
        cli.main(["run", "dapo", "--max_steps", "1"])
    assert exit.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("dapo.py: error: --model_name_or_path is missing.")
    for argv in (["run", "dapo", "--max_steps", "1", "--debug"], ["run", "trpo", "--debug"]):
        with pytest.raises(UserError):
            cli.main(argv)


def test_what_is_started(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    recipes, accelerate = recipes_folder(), recipes_folder() / "accelerate"
    given = ["--max_steps", "2", "--reward_funcs", "a", "b", "--lr", "-1"]
    cli.main(["run", "dapo", *given[:2], "--config", "quickstart_dapo", *given[2:]])
    cli.main(["run", "ppo", "--config=mine.yaml", "--help"])
    cli.main(["run", "sort_digits", "--output_dir", "out"])
    cli.main(["run", "dpo", "--num_processes", "2", *given, "--launch", "--main_process_port 1"])
    cli.main(["run", "dpo", "--accelerate_config", "2xa100_80g", *given])
    cli.main(["run", "dpo", "--launch", "--cpu", *given])
    here, with_own, task, processes, machine, one_option = started
    assert one_option == (recipes / "dpo.py", given, ["--cpu"])
    assert here == (recipes / "dapo.py", ["--config", str(recipes / "configs/quickstart_dapo.yaml"), *given])
    assert with_own == (recipes / "ppo.py", ["--config", "mine.yaml", "--help"])
    assert task == (recipes / "tasks/sort_digits.py", ["--output_dir", "out"])
    assert processes == (recipes / "dpo.py", given, ["--main_process_port", "1", "--num_processes", "2"])
    zero3 = str(recipes / "deepspeed/zero3.json")
    config = ["--config_file", str(accelerate / "2xa100_80g.yaml"), "--deepspeed_config_file", zero3]
    assert machine == (recipes / "dpo.py", given, config)


def test_options_of_the_launcher_add_up(started, tmp_path):
    (tmp_path / "mine.yaml").write_text("mixed_precision: bf16\n")
    file = str(tmp_path / "mine.yaml")
    cli.main(["run", "dpo", "--num_processes", "2", "--accelerate_config", file, "--launch", "--main_process_port 1"])
    options = ["--main_process_port", "1", "--config_file", file, "--num_processes", "2"]
    assert started == [(recipes_folder() / "dpo.py", [], options)]


def test_a_copy_takes_its_own_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["copy", "dapo", "my recipes"]) == 0
    said = capsys.readouterr().out.splitlines()
    config = "my recipes/quickstart_dapo.yaml"
    assert said[-1] == f"Run it: accelerate launch 'my recipes/dapo.py' --config '{config}'"
    assert said[:-1] == [str(path.relative_to(tmp_path)) for path in map(Path.absolute, map(Path, said[:-1]))]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    arguments = parse_arguments(PolicyArguments, DAPOConfig, ["--config", str(tmp_path / config)])
    (reward,) = load_reward_funcs(arguments.script, arguments.training)
    assert Path(reward.__code__.co_filename) == tmp_path / "my recipes/tasks/sort_digits.py"


@pytest.mark.train
def test_a_role_is_exported_in_a_process_of_its_own(tmp_path):
    """What the last line says loads what the run has trained, with plain transformers."""
    tiny.stopping().save_pretrained(tmp_path / "base")
    given = {"model": str(tmp_path / "base"), "peft_config": tiny.lora()}
    trainer = tiny.trainer(GRPOTrainer, tmp_path / "runs" / "grpo", tiny.hashed, given, max_steps=1)
    trainer.train()
    trainer.save_model()
    code = "import sys; from trl_ext.cli import main; sys.exit(main())"
    command = ("export", "runs/grpo", "--role", "policy", "--merge", "--output", "whole")
    run = run_python(code, tmp_path, ROOT, *command)
    assert run.returncode == 0, run.stderr[-3000:]
    saved, load = run.stdout.splitlines()
    assert saved == f"Saved to whole: the policy, merged into {tmp_path / 'base'}, in float32."
    assert load == "Load it: AutoModelForCausalLM.from_pretrained('whole')"
    ids = torch.tensor([[5, 9, 4, 17, 8, 2]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(ids).logits
        torch.testing.assert_close(found, trainer.model.eval()(ids).logits, rtol=0.0, atol=2e-5)
    again = run_python(code, tmp_path, ROOT, *command)
    assert again.returncode == 2 and not again.stdout
    assert again.stderr.splitlines()[-1].startswith("trl-ext: error: output is 'whole', which is not empty.")


def test_a_wheel_has_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.startswith("trl_ext-")}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "trl-ext = trl_ext.cli:main" in archive.read(entry_points).decode()
    files = [path for folder in SOURCE[:2] for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.is_file()}
    assert packed == {f"trl_ext/{name}" if name.startswith("recipes/") else name for name in names}


def test_an_installed_wheel_lists_its_own_recipes(installed, tmp_path):
    code = "import trl_ext.cli; print(trl_ext.cli.__file__); trl_ext.cli.main(['recipes'])"
    said = run_python(code, tmp_path, installed).stdout
    assert said.startswith(str(installed)) and "quickstart_dapo.yaml" in said


@pytest.mark.slow
@pytest.mark.train
def test_an_installed_wheel_trains(installed, tmp_path):
    """The quickstart's data and DAPO, with the task's own reward, without the repository."""
    code = "import sys; from trl_ext.cli import main; sys.exit(main())"
    sizes = ["--sft_size", "8", "--train_size", "64", "--test_size", "8", "--pairs_size", "0"]
    small = ["--max_steps", "1", "--per_device_train_batch_size", "16", "--held_out_prompts", "4"]
    small += ["--model_name_or_path", "runs/sort_digits/init"]
    for argv in (
        ["run", "sort_digits", "--output_dir", "runs/sort_digits", *sizes],
        ["run", "dapo", "--config", "quickstart_dapo.yaml", *small],
    ):
        run = run_python(code, tmp_path, installed, *argv)
        assert run.returncode == 0, run.stderr[-3000:]
        # Nothing that nobody can act on; a bar only where something takes long
        said = [line for line in run.stderr.splitlines() if line and "it/s" not in line and "s/it" not in line]
        # Two of a model that never trained: nothing to learn from, and not what the configuration expects
        assert [line for line in said if not ("reward variance" in line or "what `expect` says" in line)] == []
    assert {path.name for path in (tmp_path / "runs/quickstart").iterdir()} >= {
        *("model.safetensors", "README.md", "summary.json", "learning.png"),
    }
    card = (tmp_path / "runs/quickstart/README.md").read_text()
    assert "trl-ext run dapo --config quickstart_dapo.yaml --max_steps 1" in card and str(installed) not in card
