"""
What `trl-ext plan --write` writes is started as it is, for each way to spread: a tiny model on CPUs, with a local data
set and one step. Its roles are those that were planned.
"""

import json
import shlex
from pathlib import Path

import pytest
import tiny
import yaml
from processes import run
from safetensors.torch import load_file

from recipes.tasks.sort_digits import build_model, build_tokenizer
from trl_ext import cli


FSDP_RECIPE = Path(__file__).with_name("fsdp_recipe.py")
SIZES = ("--prompt_tokens", "32", "--completion_tokens", "6", "--per_device_train_batch_size", "4")
STEP = ("--gradient_accumulation_steps", "2")
# What a machine without a GPU and without the Hub needs
SMALL = ("--max_steps", "1", "--report_to", "none", "--held_out_prompts", "0", "--save_strategy", "no")
DATA = ("--dataset_name", "rows.jsonl", "--logging_steps", "1", "--learning_rate", "0.01")


def write_rows(file: Path, method: str) -> None:
    rows: list[dict[str, str]] = [{"question": f"s{i}=", "answer": f"#### {i}"} for i in range(16)]
    if method == "dpo":
        rows = [{"prompt": f"w{i} w2 ", "chosen": f"w{i} w4", "rejected": f"w{i} w5"} for i in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def planned(tmp_path: Path, method: str, strategy: str, *further: str) -> tuple[list[str], Path]:
    """Plans and writes; returns the words of the line that starts it, and the folder that it trains into."""
    layout = "1xa100-80g" if strategy == "none" else "2xa100-80g"
    words = ["--method", method, "--model", "base", "--layout", layout, "--strategy", strategy, "--write", "plan"]
    assert cli.main(["plan", *words, *SIZES, *STEP, *further]) == 0
    line = (tmp_path / "plan/launch.sh").read_text().splitlines()[-1]
    assert line.endswith(' "$@"')
    return shlex.split(line.removesuffix(' "$@"')), tmp_path / f"runs/{method}_base"


def start(tmp_path: Path, words: list[str], method: str) -> None:
    """On CPUs: the device is all that changes in the files."""
    file = tmp_path / "plan/accelerate.yaml"
    assert file.read_text().count("use_cpu: false") == 1
    file.write_text(file.read_text().replace("use_cpu: false", "use_cpu: true"))
    write_rows(tmp_path / "rows.jsonl", method)
    assert words[:2] == ["trl-ext", "run"]
    run(["-m", "trl_ext.cli", *words[1:], *SMALL, *DATA], {"DS_ACCELERATOR": "cpu"}, cwd=tmp_path)


@pytest.fixture
def four_roles(tmp_path, monkeypatch):
    """A base, and a reward adapter where the plan says that it lies."""
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()  # of the kind that AutoTokenizer makes for Qwen2
    tokenizer.chat_template = tiny.tokenizer().chat_template
    build_model(tokenizer, seed=0).save_pretrained(tmp_path / "base")
    folder = Path(tiny.reward_adapter(tmp_path))
    for place in (tmp_path / "base", folder):
        tokenizer.save_pretrained(place)
    (tmp_path / "runs").mkdir()
    folder.rename(tmp_path / "runs/reward_base")
    return tmp_path


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["none", "ddp", "zero2", "zero3", "fsdp2"])
def test_ppo_with_four_roles(four_roles, strategy):
    words, output = planned(four_roles, "ppo", strategy)
    if strategy == "fsdp2":
        words[words.index("ppo")] = str(FSDP_RECIPE)
    start(four_roles, words, "ppo")
    told = json.loads((output / "summary.json").read_text())
    assert (told["steps"], told["machine"]["processes"]) == (1, 1 if strategy == "none" else 2)
    assert told["reward_model"] == {"model": "runs/reward_base"}
    assert told["critic"]["value_loss"] > 0
    assert told["critic"]["kl"] == 0  # to the reference, before the first step
    weights = load_file(output / "adapter_model.safetensors")
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)  # which starts at 0
    assert (output / "critic").is_dir() and (output / "adapter_config.json").is_file()
    assert not (output / "reward").exists()


@pytest.mark.distributed
def test_dpo_of_all_weights_with_two_models(four_roles):
    words, output = planned(four_roles, "dpo", "zero2", "--full")
    start(four_roles, words, "dpo")
    assert (output / "model.safetensors").is_file()


def test_all_that_is_planned_is_written(four_roles):
    """Or the plan is refused: nothing is written then."""
    wanted = ["--share_prefixes", "--optimizer", "adamw_8bit", "--reference", "none", "--vllm", "server"]
    planned(four_roles, "ppo", "ddp", *wanted)
    written = yaml.safe_load((four_roles / "plan/ppo.yaml").read_text())
    assert (written["share_prefixes"], written["num_generations"], written["optim"]) == ("always", 8, "adamw_bnb_8bit")
    assert (written["kl_coef"], written["use_vllm"], written["vllm_mode"]) == (0.0, True, "server")
    assert (written["reward_model_name_or_path"], written["share_reward_base"]) == ("runs/reward_base", True)
    assert "trl vllm-serve --model base" in (four_roles / "plan/serve.sh").read_text()
    planned(four_roles, "grpo", "zero2", "--reference", "adapter")
    written = yaml.safe_load((four_roles / "plan/grpo.yaml").read_text())
    assert written["beta"] > 0 and written["updates_per_generation"] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "ppo", "--reference", "model"], "reference='model' with an adapter"),
        (["--method", "dpo", "--reference", "none"], "dpo without a reference"),
        (["--method", "dapo", "--share_prefixes", "--batch", "16"], "more than num_generations=8"),
    ],
)
def test_what_no_recipe_does_is_not_written(words, told, four_roles, capsys):
    given = ["--model", "base", "--layout", "1xa100-80g", *SIZES[:4], "--write", "plan"]
    assert cli.main(["plan", *words, *given]) == 2
    assert told in capsys.readouterr().err
    assert not (four_roles / "plan").exists()
