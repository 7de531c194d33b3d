"""Dry runs, as users start them, of models without weights."""

import json
from pathlib import Path

import datasets
import pytest
import quickstart
import tiny
from run.weightless import LARGE, LORA, without_weights


REWARDS = """
def even(completion_ids, **kwargs):
    return [float(len(ids) % 2 == 0) for ids in completion_ids]


def broken(completions, **kwargs):
    return [1.0]


def digits(row):
    return {"prompt": f"s{row['text']}="}
"""
SMALL = "--output_dir out --report_to none --model_name_or_path model"
SAMPLING = f"{SMALL} --dataset_name prompts.jsonl --reward_funcs rewards.py:even --max_completion_length 4"
OF_PAIRS = f"{SMALL} --dataset_name pairs.jsonl"
RIGHT = dict.fromkeys(("grpo", "dupo", "gspo", "ppo", "vapo", "rloo", "reinforce", "maxrl"), SAMPLING)
RIGHT |= {"make_pairs": SAMPLING, "filter_prompts": SAMPLING, "dpo_then_ppo": f"{SAMPLING} --use_peft true"}
RIGHT |= {"dapo": f"{SAMPLING} --gradient_accumulation_steps 1", "dpo": OF_PAIRS, "reward": OF_PAIRS}
RIGHT["sft"] = f"{SMALL} --dataset_name text.jsonl"
ROWS = {
    "prompts": [{"prompt": f"s{number}="} for number in range(100, 300)],
    "pairs": [{"prompt": f"s{number}=", "chosen": "123", "rejected": "3"} for number in range(100, 132)],
    "text": [{"text": f"{number}"} for number in range(100, 300)],
    "blank": [{"prompt": "~~~"}] * 64,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    without_weights(tmp_path / "model", vocab_size=32)
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()  # which a recipe does in a process of its own
    yield tmp_path
    datasets.enable_progress_bars()


def ended(recipe: str, words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The status of a dry run and what it printed."""
    files = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as end:
        quickstart.start(recipe, [*words.split(), "--dry_run"])
    assert sorted(path for path in Path.cwd().rglob("*") if "__pycache__" not in path.parts) == files
    assert isinstance(end.value.code, int)
    return end.value.code, capsys.readouterr().out


@pytest.mark.parametrize("recipe", RIGHT)
def test_every_recipe_has_one(recipe, capsys):
    status, said = ended(recipe, RIGHT[recipe], capsys)
    assert status == 0, said
    assert said.rstrip().endswith("All is well.")
    assert "Output folder: out: new." in said and "Tokens (all " in said
    if "reward_funcs" in RIGHT[recipe]:
        assert "even: 0, 1, 0, 1, 0, 1, 0, 1 in " in said  # a short text, and none
    assert "no GPUs here" in said


def test_every_recipe_is_here():
    trained = {path.stem for path in quickstart.RECIPES.glob("*.py")}
    assert set(RIGHT) == trained


def test_the_plan_of_a_layout(capsys):
    status, said = ended("ppo", f"{SAMPLING} --layout 1xa100-80g --use_peft true", capsys)
    assert status == 0
    assert "PPO of model (qwen2) on 1xa100-80g: LoRA of rank 16" in said and "Fits: " in said
    assert "critic head, reward functions, reference adapter" in said and "together" in said
    assert "tokens a second on all GPUs" in said


@pytest.mark.slow
def test_what_does_not_fit_has_status_1(folder, capsys):
    without_weights(folder / "model", **LARGE)
    status, said = ended("grpo", f"{SAMPLING} --layout 2xa100-80g {' '.join(LORA)}", capsys)
    assert status == 1, said
    assert "Does not fit: " in said and said.rstrip().endswith("All is well but for its size.")


def test_both_stages_are_planned(capsys):
    status, said = ended("dpo_then_ppo", f"{RIGHT['dpo_then_ppo']} --layout 1xa100-80g", capsys)
    assert status == 0
    assert "DPO of model" in said and "PPO of model" in said
    assert "x 5 + 4 tokens" in said  # pairs are yet to be sampled


@pytest.mark.parametrize(
    ("recipe", "words", "fault"),
    [
        ("grpo", SAMPLING.replace("even", "broken"), "`broken` returns 1 rewards for 8 completions"),
        (
            "grpo",
            SAMPLING.replace("prompts.jsonl", "text.jsonl"),
            "no column `prompt`, only ['text']",
        ),
        ("grpo", SAMPLING.replace("prompts.jsonl", "pairs.jsonl"), "fewer than the"),
        ("dpo", f"{OF_PAIRS} --resume_from_checkpoint true", "there is no checkpoint in 'out'"),
        ("dpo", f"{OF_PAIRS} --resume_from_checkpoint none/here", "'none/here', which is no folder"),
        ("grpo", SAMPLING.replace(" out ", " prompts.jsonl/out "), "nothing can be written to"),
    ],
    ids=["rewards", "column", "few", "resume", "no folder", "output"],
)
def test_what_is_wrong_is_told_with_status_2(recipe, words, fault, capsys):
    more = " --per_device_train_batch_size 512" if "pairs" in words and recipe == "grpo" else ""
    status, said = ended(recipe, f"{words}{more}", capsys)
    assert status == 2, said
    wrong = [line for line in said.splitlines() if line.startswith("Wrong: ")]
    assert any(fault in line for line in wrong), said
    assert said.rstrip().endswith("Can't be trained as it is.")


def test_everything_that_is_wrong_is_told(capsys):
    words = SAMPLING.replace("even", "broken") + " --resume_from_checkpoint true --reward_weights 1 2"
    status, said = ended("grpo", words, capsys)
    assert status == 2 and said.count("Wrong: ") == 3


def test_prepared_rows(capsys):
    words = SAMPLING.replace("prompts.jsonl", "text.jsonl")
    status, said = ended("grpo", f"{words} --prepare_row rewards.py:digits", capsys)
    assert status == 0
    assert "train 200 rows; columns: text, prompt" in said and "prompts longest 5, median 5" in said


def test_pairs_that_are_too_long(capsys):
    status, said = ended("dpo", f"{OF_PAIRS} --max_length 7", capsys)
    assert status == 0 and "max_length=7: 32 rows are cut, of which 0 are dropped" in said
    _, said = ended("dpo", f"{OF_PAIRS} --max_length 5", capsys)
    assert "32 are dropped, all prompt" in said


def test_a_tokenizer_that_reads_nothing(folder, capsys):
    """As AutoTokenizer makes of a kind that it doesn't expect beside this model."""
    tiny.tokenizer().save_pretrained(folder / "model")
    status, said = ended("grpo", SAMPLING, capsys)
    assert status == 2 and "the tokenizer makes no token of any row" in said


def test_a_folder_with_a_run_in_it(folder, capsys):
    (folder / "out" / "checkpoint-7").mkdir(parents=True)
    _, said = ended("dpo", OF_PAIRS, capsys)
    assert "the last checkpoint in it is checkpoint-7, from which nothing is resumed" in said
    _, said = ended("dpo", f"{OF_PAIRS} --resume_from_checkpoint true", capsys)
    assert "checkpoint-7, resumed" in said
