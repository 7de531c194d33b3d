"""
Every benchmark runs to its end from its command line, once and at its smallest size. What it measures that way is no
result: asserted is what must hold at any size.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run

from recipes.tasks.sort_digits import DIGITS, build_model, build_tokenizer


pytestmark = [pytest.mark.slow, pytest.mark.train]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What scripts share, or no script; the last one runs in vLLM's environment
NOT_RUN = {
    "automaton",
    "fsdp_on_cpus",
    "learning_report",
    "learning_runs",
    "planner_runs",
    "task",
    "turns",
    "vllm_generation",
    "words",
}


def last_line(script: str, *arguments: Any) -> Any:
    """What a benchmark prints as JSON in its last line."""
    return json.loads(run([BENCHMARKS / f"{script}.py", *arguments, "--json"]).strip().splitlines()[-1])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """
    A model that can sort two or three digits, trained for half a second in place of the benchmarks' supervised starts:
    there has to be something that it does right and something that it doesn't.
    """
    folder, tokenizer, draw = tmp_path_factory.mktemp("start"), build_tokenizer(), random.Random(0)
    model = build_model(tokenizer, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        prompts = ["".join(draw.choices(DIGITS, k=draw.choice([2, 3]))) for _ in range(64)]
        texts = [f"s{digits}={''.join(sorted(digits))}{tokenizer.eos_token}" for digits in prompts]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        labels = inputs["input_ids"].clone()
        for i, digits in enumerate(prompts):
            labels[i, : -len(digits) - 1] = -100
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    return folder


def test_every_script_is_here():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - NOT_RUN <= tested


def test_overhead():
    found = last_line("overhead", "--pairs", 1, "--steps", 1)
    assert found["weights_equal"] and found["forward_calls_equal"] and found["tokens_equal"]
    assert found["ratio"] > 0


def test_known_prompts():
    found = last_line("known_prompts", "--prompts", 50, "--repeats", 2)
    assert {kind: list(sizes) for kind, sizes in found.items()} == {"informed": ["50"], "curriculum": ["50"]}
    assert all(value > 0 for sizes in found.values() for value in sizes["50"].values())


def test_many_prompts():
    found = last_line("many_prompts", "--prompts", 64, 128, "--kinds", "informed", "column")
    # Which rows are read depends on what is drawn, how many doesn't grow with the data set
    assert all(0 < sizes["128"]["rows_read"] <= 1.2 * sizes["64"]["rows_read"] for sizes in found.values())
    assert [sizes["128"]["values_read"] for sizes in found.values()] == [0, 128]


def test_two_processes():
    found = last_line("two_processes", "--rounds", 1, "--steps", 1, "--size", "tiny", "--json")
    assert found["ratio"] > 0 and 0 < found["collectives"] < 1
    assert found["work"] == pytest.approx(1, rel=0.05)  # the same global batch


def test_long_run():
    found = last_line("long_run", "--steps", 4, "--every", 1, "--prompts", 64)
    assert set(found) == {"DAPO", "PPO"}
    assert all(growth > -1 for columns in found.values() for growth in columns.values())


def test_train_phase():
    found = last_line("train_phase", "--longest", 24, "--pairs", 1)
    assert found["grad_relative_error"] < 1e-4
    assert found["real_tokens"] >= found["computed_tokens"] > 0
    assert found["padded_tokens"] < found["padded_tokens_trl"]


def test_reward_overlap():
    found = last_line("reward_overlap", "--pairs", 1, "--steps", 1, "--seconds-per-sample", 0.001)
    assert found["samples_scored_equal"]
    assert found["weights_equal_one_chunk"] and found["weights_equal_trl_async"]


def test_ppo():
    """Without TRL 1.12, which the script would install into an environment of its own."""
    size = ("--shape", "tiny", "--steps", 1)
    printed = run([BENCHMARKS / "ppo.py", *size, "--sides", "head", "--rounds", 1, "--json"])
    *_, head, nothing_to_compare_with = printed.strip().splitlines()
    assert head.split()[0] == "head" and all(float(cell) > 0 for cell in head.split()[1:5])
    assert json.loads(nothing_to_compare_with) == {}
    found = json.loads(run([BENCHMARKS / "ppo.py", *size, "--side", "model"]).strip().splitlines()[-1])
    assert len(found["steps"]) == 1 and 0 < found["steps"][0]["training"] < found["steps"][0]["seconds"]


def test_learning(tmp_path):
    """With its own start, by a recipe."""
    study = ("--study", "objectives", "--task", "automaton", "--methods", "GRPO", "DAPO", "PPO")
    sizes = ("--seeds", 1, "--sft_steps", 1, "--generations", 1, "--points", 1, "--test_prompts", 8)
    rows = last_line("learning", *study, *sizes, "--output_dir", tmp_path)
    assert [row["method"] for row in rows] == ["GRPO", "DAPO", "PPO"]
    assert all(row["tokens"] > 0 and 0 <= row["pass@1"][0] <= row["pass@8"][0] <= 1 for row in rows)
    assert (tmp_path / "objectives.png").is_file()


@pytest.mark.parametrize("study", ["outcome", "steps", "critics"])
def test_ppo_learning(study, start, tmp_path):
    sizes = ("--seeds", 1, "--generations", 1, "--points", 1, "--model", start)
    rows = last_line("ppo_learning", "--study", study, *sizes, "--output_dir", tmp_path)
    kinds = {"GRPO", "head", "adapter", "model"} if study == "critics" else {"GRPO", "PPO"}
    assert {row["method"].split(",")[0] for row in rows} == kinds
    assert all(row["tokens"] > 0 and 0 <= row["final"] <= 1 for row in rows)
    assert all(value <= 1 for row in rows for value in row["explained_variance"])
    assert (tmp_path / f"ppo_{study}.png").is_file()


def test_roles():
    found = last_line("roles", "--shape", "tiny", "--rounds", 1, "--steps", 1)
    assert found["weights_memory_ratio"] < 0.3 and found["time_ratio"] > 0 and found["peak_memory_ratio"] > 0


def test_critic_heads(start, tmp_path):
    sizes = ("--heads", 2, "--seeds", 1, "--generations", 2, "--model", start)
    found = last_line("critic_heads", *sizes, "--output_dir", tmp_path)
    assert [row["heads"] for row in found] == [2] and found[0]["spread"] > 0


def test_curriculum(start, tmp_path):
    sizes = ("--seeds", 1, "--batches", 1, "--points", 1, "--model", start)
    printed = run([BENCHMARKS / "curriculum.py", *sizes, "--output_dir", tmp_path])
    for arm in (
        "uniform",
        "frontier",
        "easy to hard",
        "mixed",
        "PPO",
        "DPO",
        "DPO then PPO",
        "all pairs, fitted critic",
        "the same, ended by reward",
    ):
        assert f"seed 0 {arm}: " in printed
    assert all((tmp_path / f"curriculum_{study}.png").is_file() for study in ("prompts", "stages"))


def test_cleaning(start, tmp_path):
    sizes = ("--seeds", 1, "--pairs", 64, "--folds", 2, "--rounds", 1, "--test_prompts", 64, "--model", start)
    (row,) = last_line("cleaning", *sizes, "--output_dir", tmp_path)
    assert all(0 <= row[arm] <= 1 for arm in ("clean", "noisy", "cleaned"))
    assert row["held_out_pairs"] > 0


def test_prefix_cost():
    lines = (
        run([BENCHMARKS / "prefix_cost.py", "--repetitions", 1, "--tokens", 64, "--columns", 16, 32])
        .strip()
        .splitlines()
    )
    assert len(lines) == 6 and all("times a linear layer" in line for line in lines)


def test_dpo_phase():
    found = last_line("dpo_phase", "--pairs", 1, "--prompt", 64)
    assert found["grad_relative_error"] <= 1e-5
    assert found["padded_tokens"] < found["padded_tokens_trl"]


def test_where_the_time_goes(tmp_path):
    found = last_line("where_the_time_goes", "--prompts", 32, "--runs", 1, "--picture", tmp_path / "picture.png")
    assert found["32"].keys() == {"trl", "unshared", "trl_ext"}
    assert (tmp_path / "picture.png").stat().st_size


@pytest.mark.parametrize("part", ["PPO 32B, 4 bits", "DPO 7B"])
def test_gpu_fit(part, tmp_path):
    """On a CPU, where no memory is measured, and through the code that measures it."""
    found = last_line("gpu_fit", "--tiny", "--parts", part, "--report", tmp_path / "report.md")["results"][part]
    phases = ["update"] if "DPO" in part else ["generate", "old and reference passes", "update"]
    assert sorted(found["seconds"]) == phases and min(found["seconds"].values()) > 0
    assert found["allocated"] == {} and set(phases) < set(found["planned"]["bytes"])
    assert "No memory was measured" in (tmp_path / "report.md").read_text()


def test_planner_accuracy():
    found = last_line("planner_accuracy", "--kind", "steps", "--cases", "dpo full")
    assert set(found) == {"totals", "parts"}
    assert max(map(abs, found["totals"].values())) <= 0.05
