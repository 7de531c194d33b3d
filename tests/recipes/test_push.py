"""`--push_to_hub`: the real client against a Hub of the tests' own, on this machine."""

import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sort_digits
import torch
from hub import running_hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from trl_ext.roles.critic import WEIGHTS_FILE


pytestmark = pytest.mark.train
ROOT = Path(sort_digits.__file__).parents[2]
WORKER = "tests/recipes/push_worker.py"
# PPO on an adapter with a head as critic, with a checkpoint after every step that is pushed
PPO = [
    *("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear", "--lora_dropout", "0"),
    *("--critic_head", "linear", "--kl_coef", "0.01", "--num_generations", "1", "--max_completion_length", "14"),
    *("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3", "--logging_steps", "1"),
    *("--hub_strategy", "checkpoint", "--hub_always_push", "--push_timeout", "5"),
]


@pytest.fixture
def hub():
    with running_hub() as running:
        yield running


@pytest.fixture
def command(tmp_path):
    """Arguments of a short run with a push."""
    tokenizer = sort_digits.build_tokenizer()
    sort_digits.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "init")
    tokenizer.save_pretrained(tmp_path / "init")
    sort_digits.build_data("N", tokenizer, 0, 8, 64, 16).save_to_disk(tmp_path / "data")
    return [
        *("--config", "recipes/configs/quickstart_dapo.yaml"),
        *("--model_name_or_path", str(tmp_path / "init"), "--dataset_name", str(tmp_path / "data")),
        *("--reward_funcs", "tests/tiny.py:first_token_even", "--held_out_prompts", "4"),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--per_device_train_batch_size", "16"),
        *("--push_to_hub", "--hub_model_id", "someone/tiny"),
    ]


@pytest.fixture
def environment(hub, tmp_path):
    return {
        **os.environ,
        "HF_ENDPOINT": hub[1],
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "no_proxy": "127.0.0.1",
    }


def run(command, environment):
    """In an interpreter of its own: the Hub's client reads its address when it is imported."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_whole_report_reaches_the_hub(hub, command, environment, tmp_path):
    received, _ = hub
    done = run(["recipes/dapo.py", *command, "--hub_token", "hf_from_the_command_line"], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Pushed to https://huggingface.co/someone/tiny" in done.stdout
    assert received.strange == []
    assert received.created[0]["name"] == "tiny"
    assert received.tokens == {"Bearer hf_from_the_command_line"}
    assert received.commits == 2  # of the last checkpoint and of the whole; none for a model without its report

    names = {"README.md", "learning.png", "summary.json", "model.safetensors", "config.json", "tokenizer.json"}
    assert names <= set(received.files)
    for name in names:
        assert received.files[name] == (tmp_path / "out" / name).read_bytes(), name
    card = received.files["README.md"].decode()
    assert "## Results" in card and "![" in card
    assert 'model="someone/tiny"' in card
    assert "training_args.bin" in received.files
    assert not [name for name, content in received.files.items() if b"hf_from_the_command_line" in content]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "every third", "away"])
def test_policy_and_critic_come_back_from_the_hub(fault, hub, command, environment, tmp_path):
    """They say what they said at the end of training, bit for bit. The card passes the Hub's client's validation."""
    received, _ = hub
    received.every = 0 if fault == "none" else 3
    received.away_after = 2 if fault == "away" else None
    done = run([WORKER, "train", str(tmp_path / "there"), *command[2:], *PPO], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and received.strange == []
    assert received.created[0]["visibility"] == "private"
    assert received.failed == 0 if fault == "none" else received.failed > 3
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    names = {"README.md", "learning.png", "tokens.png", "summary.json", "adapter_model.safetensors", "critic"}
    assert names <= kept
    if fault == "away":
        assert "Pushed to" not in done.stdout
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("Not pushed to someone/tiny (")]
        received.away_after, received.every = None, 0
        program, *arguments = shlex.split(line.partition("upload it with: ")[2])
        assert program == "hf"
        assert run(["-m", "huggingface_hub.cli.hf", *arguments], environment).returncode == 0
    else:
        assert "Pushed to https://huggingface.co/someone/tiny" in done.stdout
        assert "Not pushed" not in done.stderr and "not pushed" not in done.stderr
        # Of each checkpoint, the model and the whole; and the end
        assert received.commits == 7
        assert {f"{place}critic/{WEIGHTS_FILE}" for place in ("", "last-checkpoint/")} <= set(received.files)
    for name in names - {"critic"}:
        assert received.files[name] == (tmp_path / "out" / name).read_bytes(), name

    loaded = run([WORKER, "load", str(tmp_path / "here"), "someone/tiny"], environment)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    there, here = load_file(tmp_path / "there"), load_file(tmp_path / "here")
    for name in ("logps", "values"):
        assert torch.equal(there[name], here[name]), name
    assert here["values"].std() > 0 and here["logps"].std() > 0

    received.every = 0
    card = str(tmp_path / "out/README.md")
    check = f"from huggingface_hub import ModelCard; ModelCard.load({card!r}).validate()"
    validated = run(["-c", check], environment)
    assert validated.returncode == 0, validated.stderr[-2000:]
    results = ModelCard.load(card).data.eval_results
    assert {result.metric_type for result in results} == {"first_token_even"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refused", "silent"])
def test_a_push_that_fails_costs_the_push_alone(fault, hub, command, environment, tmp_path):
    """Checkpoints are pushed in training, too: by the same Hub, which is out of order from the start."""
    received, _ = hub
    received.refusing, received.silent = fault == "refused", threading.Event() if fault == "silent" else None
    environment["HF_TOKEN"] = "hf_of_the_environment"
    saving = ["--push_timeout", "2", "--save_strategy", "steps", "--save_steps", "1"]
    done = run(["recipes/dapo.py", *command, *saving], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "Pushed to" not in done.stdout and received.files == {} and received.commits >= 2
    names = {"README.md", "learning.png", "summary.json", "model.safetensors", "checkpoint-1"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "## Results" in (tmp_path / "out/README.md").read_text()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Not pushed to someone/tiny (")]
    assert ("Timeout" if fault == "silent" else "500") in line
    assert "A checkpoint was not pushed to someone/tiny" in done.stderr

    # The command that the line ends with
    if received.silent is not None:
        received.silent.set()
    received.refusing = False
    program, *arguments = shlex.split(line.partition("upload it with: ")[2])
    assert program == "hf"
    again = run(["-m", "huggingface_hub.cli.hf", *arguments], environment)
    assert again.returncode == 0, again.stderr
    assert received.files["summary.json"] == (tmp_path / "out/summary.json").read_bytes()
    assert not [name for name in received.files if name.startswith(("checkpoint", "_"))]


@pytest.mark.slow
def test_a_hub_that_is_away_from_the_start_costs_no_run(hub, command, environment, tmp_path):
    """It comes back when all is saved: the last upload creates the repository. The command does so, too."""
    received, _ = hub
    received.away_after = 0
    done = run(["recipes/dapo.py", *command, "--save_strategy", "steps", "--save_steps", "1"], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "The Hub could not be asked for a repository" in done.stderr and "A checkpoint was" not in done.stderr
    assert received.created == [] and (tmp_path / "out/model.safetensors").is_file()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Not pushed to someone/tiny (")]
    received.away_after = None
    _, *arguments = shlex.split(line.partition("upload it with: ")[2])
    assert run(["-m", "huggingface_hub.cli.hf", *arguments], environment).returncode == 0
    assert received.files["README.md"] == (tmp_path / "out/README.md").read_bytes()
    assert received.created[0]["visibility"] == "private"
