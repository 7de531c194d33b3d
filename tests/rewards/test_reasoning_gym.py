"""Reasoning Gym's tasks as a data set, and its verifiers as a reward."""

import ast
import inspect
import json
import os
import subprocess
import sys
import textwrap
from decimal import Decimal
from pathlib import Path

import pytest

from trl_ext.rewards import reasoning_gym
from trl_ext.rewards.reasoning_gym import EVALUATING, EVALUATING_ROWS, build_dataset, reasoning_gym_reward


EASY = {"max_terms": 2, "max_digits": 1, "size": 30, "test_size": 10}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_splits_have_the_same_columns_and_no_question_in_common():
    data = build_dataset(["chain_sum"], EASY | {"size": 400, "test_size": 100})
    questions = {split: [row["prompt"][0]["content"] for row in rows] for split, rows in data.items()}
    assert data["train"].column_names == data["test"].column_names == ["prompt", "completion", "task", "entry"]
    assert set(data["train"]["task"]) == {"chain_sum"}
    assert not set(questions["train"]) & set(questions["test"])
    for split, size in (("train", 400), ("test", 100)):  # two digits and a sign make 200 questions
        assert len(set(questions[split])) == len(questions[split]) < size
    assert all(question.endswith(reasoning_gym.INSTRUCTION) for question in questions["train"])


def test_the_seed_decides_the_questions():
    first, again, other = (
        build_dataset(["chain_sum"], EASY | {"seed": seed})["train"]["prompt"][:] for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("task", ["chain_sum", "arc_agi", "knights_knaves", "time_intervals"])
def test_verifiers_accept_what_the_generator_knows_and_nothing_else(task):
    """Also where a verifier compares tuples, which JSON doesn't have."""
    rows = build_dataset([task], {"size": 3, "test_size": 1})["train"]
    assert reasoning_gym_reward(rows["completion"][:], rows["entry"][:]) == [1.0] * 3
    wrong = [said(f"<answer>{text}</answer>") for text in ("", "none", "((((")]
    assert max(reasoning_gym_reward(wrong, rows["entry"][:])) <= 0.05


def test_a_task_without_a_known_answer_has_nothing_to_imitate():
    rows = build_dataset(["rubiks_cube"], {"size": 2, "test_size": 1})["train"]
    assert rows.column_names == ["prompt", "task", "entry"]
    assert reasoning_gym_reward([said("<answer>F R U</answer>")] * 2, rows["entry"][:]) <= [0.1] * 2


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ransom_note", "isomorphic_strings", "acre"])
def test_every_process_makes_the_same_rows(task):
    """Though Python orders sets of texts differently in each, and one generator draws from the global state."""
    code = f"from trl_ext.rewards.reasoning_gym import build_dataset as b; print(b(['{task}'], SIZES)['train'][:])"
    command = [sys.executable, "-c", code.replace("SIZES", "{'size': 6, 'test_size': 2}")]
    printed = []
    for seed in ("1", "2"):  # new processes: a fork would have the order of this one
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        printed.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert printed[0] == printed[1] and task in printed[0]


def test_the_last_answer_between_tags_counts():
    row = build_dataset(["chain_sum"], EASY)["train"][0]
    right = row["completion"][0]["content"].removeprefix("<answer>").removesuffix("</answer>")
    texts = {
        f"<answer>{right}</answer>": 1.0,
        f"I think.\n<answer>99</answer> No: <answer>\n{right}\n</answer>": 1.0,
        f"<answer>{right}</answer> or <answer>99</answer>": 0.0,
        right: 0.0,
        f"<answer>{right}": 0.0,
        "": 0.0,
    }
    assert reasoning_gym_reward([said(text) for text in texts], [row["entry"]] * len(texts)) == list(texts.values())
    assert reasoning_gym_reward([*texts], [row["entry"]] * len(texts)) == list(texts.values())  # plain text


def test_a_verifier_that_fails_gives_nothing():
    """That of `prime_factorization` raises for what isn't a number."""
    rows = build_dataset(["prime_factorization"], {"size": 1, "test_size": 1})["train"]
    assert reasoning_gym_reward([said("<answer>two</answer>")], rows["entry"][:]) == [0.0]


def test_a_verifier_has_the_settings_of_its_rows():
    """`decimal_arithmetic` allows an error of one unit in the last place that its questions may have."""
    settings = {"min_num_decimal_places": 1, "max_num_decimal_places": 1, "precision": 4, "size": 4, "test_size": 1}
    row = build_dataset(["decimal_arithmetic"], settings)["train"][0]
    task, _, entry = json.loads(row["entry"])
    near = [said(f"<answer>{Decimal(entry['answer']) + Decimal('0.05')}</answer>")]
    assert reasoning_gym_reward(near, [row["entry"]]) == [1.0]
    by_default = json.dumps([task, "{}", entry])
    assert reasoning_gym_reward(near, [by_default]) == [0.0]


def test_several_tasks_in_turn_with_settings_of_their_own():
    told = {"size": 5, "test_size": 2, "chain_sum.max_terms": 2, "seed": 3}
    data = build_dataset(["chain_sum", "gcd"], told)
    assert data["train"]["task"][:] == ["chain_sum", "gcd", "chain_sum", "gcd", "chain_sum"]
    assert data["test"]["task"][:] == ["chain_sum", "gcd"]
    terms = [
        json.loads(row["entry"])[2]["metadata"]["num_terms"] for row in data["train"] if row["task"] == "chain_sum"
    ]
    assert terms == [2, 2, 2]
    assert reasoning_gym_reward(data["train"]["completion"][:], data["train"]["entry"][:]) == [1.0] * 5


def runs_text(function) -> bool:
    """Whether a verifier's source calls `eval`, `exec`, or SymPy's `parse_expr` or `sympify`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    called = [call.func for call in ast.walk(tree) if isinstance(call, ast.Call)]
    names = {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in called}
    if names & {"eval", "exec", "sympify"}:
        return True
    theirs = getattr(sys.modules[function.__module__].__dict__.get("parse_expr"), "__module__", "sympy")
    return "parse_expr" in names and theirs.startswith("sympy")


def test_every_task_that_runs_answers_as_code_is_known():
    found = {name for name, (dataset, _) in reasoning_gym._registry().items() if runs_text(dataset.score_answer)}
    # Of two, it is what the row has that is run; in one of them, by a function that its verifier calls
    assert found | {"bitwise_arithmetic"} == {*EVALUATING, *EVALUATING_ROWS}


def test_rows_from_elsewhere_run_no_code():
    for task in (*EVALUATING, *EVALUATING_ROWS):
        row = json.dumps([task, "{}", {"answer": "[1]", "metadata": {"source_dataset": task}}])
        with pytest.raises(ValueError, match=f"Make it anew, as reasoning_gym:{task}"):
            reasoning_gym_reward([said("<answer>[1]</answer>")], [row])


def test_answers_are_run_as_code_only_where_it_is_asked_for():
    with pytest.raises(ValueError, match=r"the verifier of n_queens runs what the policy writes as Python code"):
        build_dataset(["n_queens"], {"size": 1, "test_size": 1})
    data = build_dataset(["n_queens"], {"size": 1, "test_size": 1, "evaluate_answers": True})
    assert reasoning_gym_reward(data["train"]["completion"][:], data["train"]["entry"][:]) == [1.0]


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        ([], {}, "no task of Reasoning Gym is named"),
        (["chain_sun"], {}, r"'chain_sun' is no task of Reasoning Gym\. Did you mean 'chain_sum'"),
        (["composite"], {}, r"'composite' is no task"),
        (["gcd", "chain_sum", "gcd"], {}, "a task is named twice"),
        (["chain_sum"], {"chain_sum.size": 9}, r"can't be told 'chain_sum\.size'"),
        (["chain_sum"], {"terms": 2}, r"chain_sum can't be told 'terms', only allow_negation, .*, max_terms"),
        (["chain_sum"], {"gcd.max_terms": 2}, r"can't be told 'gcd\.max_terms'"),
        (["chain_sum"], {"min_terms": 9}, r"chain_sum refuses \{'min_terms': 9\}: max_terms must be >= min_terms"),
        (["chain_sum"], {"size": 0}, r"size=0 must be at least 1"),
        (
            ["chain_sum"],
            {"min_terms": 1, "max_terms": 1, "max_digits": 1},
            "has no question that isn't in the test split",
        ),
    ],
)
def test_what_cant_be_made_is_refused(tasks, settings, message):
    with pytest.raises(ValueError, match=message):
        build_dataset(tasks, settings)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ImportError, match=r"pip install trl_ext\[tasks\]"):
        build_dataset(["chain_sum"])
