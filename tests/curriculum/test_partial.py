"""Roll-outs of a data set that stop and go on, and how a policy and a data set are told from others."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, load_from_disk

from trl_ext import GRPOTrainer
from trl_ext.curriculum.partial import content_key, roll_out_all, weights_key


ROWS = tiny.prompts(5)


class Killed(Exception):
    """What the end of the process looks like from inside."""


def after(rows: int) -> Any:
    """A progress function that ends the process once so many rows are done."""

    def killed(done: int, total: int) -> None:
        if done == rows:
            raise Killed

    return killed


class RollOut:
    """`roll_out_all` of five prompts in batches of two, which keeps what it was asked and rolled out."""

    def __init__(self, tmp_path: Path, model: Any = None, **settings: Any) -> None:
        self.trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, model and {"model": model}, **settings)
        self.batches: list[tuple[list[str], int]] = []
        inner = self.trainer.roll_out

        def roll_out(rows: list[dict[str, Any]], num_generations: int, seed: int) -> Any:
            self.batches.append(([row["prompt"] for row in rows], seed))
            return inner(rows, num_generations, seed=seed)

        self.trainer.roll_out = roll_out

    def __call__(self, partial: Path | None = None, dataset: Dataset = ROWS, seed: int = 3, **more: Any) -> list[Any]:
        settings = {"num_generations": 2, "batch_size": 2, "depends_on": {"margin": 0.5}, **more}
        return roll_out_all(
            self.trainer,
            dataset,
            seed=seed,
            read=lambda groups: groups.rewards[..., 0].tolist(),
            partial_results=partial,
            **settings,
        )


@pytest.fixture
def roll_out(tmp_path):
    return RollOut(tmp_path)


def test_every_row_has_its_result_from_a_batch_with_a_seed_of_its_own(roll_out):
    progress: list[tuple[int, int]] = []
    results = roll_out(on_progress=lambda done, total: progress.append((done, total)))
    prompts = ROWS["prompt"]
    assert roll_out.batches == [(prompts[:2], 3), (prompts[2:4], 5), (prompts[4:], 7)]
    assert progress == [(2, 5), (4, 5), (5, 5)]
    rows = [ROWS[i] for i in (2, 3)]
    assert results[2:4] == roll_out.trainer.roll_out(rows, 2, seed=5).rewards[..., 0].tolist()
    assert len(results) == 5 and all(len(rewards) == 2 for rewards in results)


def test_it_goes_on_behind_the_last_finished_batch(roll_out, tmp_path):
    whole, partial = roll_out(), tmp_path / "deep" / "partial.jsonl"
    with pytest.raises(Killed):
        roll_out(partial, on_progress=after(4))
    assert len(partial.read_text().splitlines()) == 3  # what it belongs to, and two batches
    roll_out.batches.clear()
    assert roll_out(partial) == whole
    assert roll_out.batches == [(ROWS["prompt"][4:], 7)]
    roll_out.batches.clear()
    assert roll_out(partial) == whole
    assert roll_out.batches == []


def test_a_line_that_was_being_written_is_done_again(roll_out, tmp_path):
    whole, partial = roll_out(), tmp_path / "partial.jsonl"
    with pytest.raises(Killed):
        roll_out(partial, on_progress=after(2))
    kept = partial.read_text()
    with partial.open("a") as file:
        file.write("[[0.1, 0.")
    assert roll_out(partial) == whole
    assert partial.read_text().startswith(kept)
    assert [len(json.loads(line)) for line in partial.read_text().splitlines()[1:]] == [2, 2, 1]


def test_a_file_without_a_whole_line_begins_anew(roll_out, tmp_path):
    partial = tmp_path / "partial.jsonl"
    partial.write_text('{"model": "a1')
    assert roll_out(partial) == roll_out()
    assert len(partial.read_text().splitlines()) == 4


def test_another_roll_out_does_not_go_on_with_it(roll_out, tmp_path, subtests):
    partial = tmp_path / "partial.jsonl"
    roll_out(partial)
    before = partial.read_text()
    others: dict[str, tuple[RollOut, dict[str, Any]]] = {
        "seed": (roll_out, {"seed": 4}),
        "rows": (roll_out, {"dataset": tiny.prompts(6)}),
        "number of completions": (roll_out, {"num_generations": 3}),
        "batch size": (roll_out, {"batch_size": 3}),
        "what the caller adds": (roll_out, {"depends_on": {"margin": 0.6}}),
        "weights": (RollOut(tmp_path, tiny.stopping(seed=1)), {}),
        "temperature": (RollOut(tmp_path, temperature=0.9), {}),
        "sampling": (RollOut(tmp_path, generation_kwargs={"eos_token_id": 9}), {}),
    }
    for name, (other, arguments) in others.items():
        with subtests.test(name):
            with pytest.raises(ValueError, match=r"partial\.jsonl, which holds results of a different call"):
                other(partial, **arguments)
            assert partial.read_text() == before


# Identities


def test_a_policy_is_told_by_its_weights():
    model = tiny.qwen2()
    key = weights_key(model)
    assert weights_key(tiny.qwen2()) == key != weights_key(tiny.qwen2(seed=1))
    with torch.no_grad():
        list(model.parameters())[-1].view(-1)[-1] += 1e-6
    assert weights_key(model) != key


def test_a_data_set_is_told_by_its_rows_wherever_it_was_read(tmp_path):
    rows = tiny.prompts(7)
    rows.save_to_disk(tmp_path / "rows")
    key = content_key(rows)
    assert content_key(load_from_disk(str(tmp_path / "rows"))) == key
    assert content_key(Dataset.from_list(rows.to_list())) == key
    assert content_key(rows.with_format("torch")) == key


def test_any_change_of_a_row_is_another_data_set():
    rows = tiny.prompts(7).to_list()
    changed = [
        rows[:6],
        rows[::-1],
        [*rows[:3], {**rows[3], "target": 99}, *rows[4:]],
        [{"target": row["target"], "prompt": row["prompt"], "more": 0} for row in rows],
    ]
    assert len({content_key(Dataset.from_list(each)) for each in [rows, *changed]}) == 5
