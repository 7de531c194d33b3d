"""Pass rates and the prompts they drop, on a real trainer with rewards that are known beforehand."""

import json
import threading
from dataclasses import dataclass, field

import pytest
import tiny
from datasets import Dataset

from trl_ext import DUPOTrainer, GRPOTrainer
from trl_ext.curriculum.difficulty import drop_solved, pass_rates


@dataclass
class Solves:
    """Scores the first `right` completions of a prompt 1 and the others 0; `None` in `right`: not applicable."""

    name: str = "solves"
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.__name__ = self.name

    def __call__(self, prompts, right, **kwargs):
        self.asked += prompts
        return [None if k is None else float(i % 4 < k) for i, k in enumerate(right)]  # groups of 4


def length_bonus(prompts, **kwargs):
    return [10.0] * len(prompts)


def data(*right: int | None) -> Dataset:
    return tiny.prompts(len(right)).add_column("right", list(right))


def rater(tmp_path, rewards, trainer_class=GRPOTrainer, **settings):
    return tiny.trainer(trainer_class, tmp_path, rewards, {"train_dataset": data(0, 1, 2, 3)}, **settings)


def test_pass_rates_are_fractions_of_the_samples(tmp_path):
    trainer = rater(tmp_path, Solves())
    rated = pass_rates(trainer, data(0, 1, 2, 3, 4, None), batch_size=4)
    assert rated["pass_rate"] == [0.0, 0.25, 0.5, 0.75, 1.0, None]
    assert rated.column_names == ["prompt", "target", "right", "pass_rate"]
    assert rated["right"] == [0, 1, 2, 3, 4, None]  # rows in their order
    assert trainer.state.global_step == 0
    assert trainer.counters.generated_tokens == 0  # it wasn't training


def test_solved_prompts_are_dropped(tmp_path):
    rated = pass_rates(rater(tmp_path, Solves()), data(0, 1, 4, 3, 4, None))
    assert drop_solved(rated)["right"] == [0, 1, 3, None]
    assert drop_solved(rated, drop_unsolved=True)["right"] == [1, 3, None]


def test_only_outcome_rewards_decide(tmp_path):
    trainer = rater(
        tmp_path,
        [Solves(), length_bonus],
        outcome_reward_funcs=["solves"],
        reward_weights=[0.4, 1.0],
        success_threshold=0.4,
    )
    assert pass_rates(trainer, data(1, 4))["pass_rate"] == [0.25, 1.0]
    trainer.args.success_threshold = 0.41  # more than a right answer is worth
    assert pass_rates(trainer, data(1, 4))["pass_rate"] == [0.0, 0.0]


def test_every_batch_draws_samples_of_its_own(tmp_path):
    reward = tiny.Remembering(tiny.hashed)
    rows = tiny.prompts(2)
    twice = Dataset.from_list([*rows, *rows])  # so that both batches ask the same
    pass_rates(rater(tmp_path, reward), twice, batch_size=2)
    first, second = reward.calls
    assert first.prompts == second.prompts
    assert first.completion_ids != second.completion_ids


def read_anew(rows: Dataset) -> Dataset:
    """The same rows, by a function that can't be pickled, so that their fingerprint is random."""
    lock, targets = threading.Lock(), rows["target"]

    def target(row, index):
        with lock:
            return {"target": targets[index]}

    again = Dataset.from_list([{"prompt": prompt} for prompt in rows["prompt"]]).map(target, with_indices=True)
    assert again.to_list() == rows.to_list() and again._fingerprint != rows._fingerprint
    return again


class Stopped(Exception):
    """What a killed process looks like from inside."""


def stop_after_four(done: int, rows: int) -> None:
    if done == 4:
        raise Stopped


def test_a_stopped_roll_out_goes_on_where_it_was(tmp_path):
    def roll_out(partial_results, rows, on_progress=None):
        reward = tiny.Remembering(tiny.first_token_even)
        trainer = rater(tmp_path, reward, DUPOTrainer)
        rated = pass_rates(
            trainer, rows, batch_size=2, seed=3, partial_results=partial_results, on_progress=on_progress
        )
        return rated, [prompt for call in reward.calls for prompt in call.prompts[::4]]

    rows, partial = tiny.prompts(7), tmp_path / "deep" / "partial.jsonl"
    whole, asked = roll_out(None, rows)
    assert asked == rows["prompt"]
    assert 0 < sum(whole["pass_rate"]) < 7  # there is something to get wrong
    with pytest.raises(Stopped):
        roll_out(partial, rows, stop_after_four)
    with open(partial, "a") as file:
        file.write("[0.25, ")  # the process died while it wrote
    rest, asked = roll_out(partial, rows)
    assert asked == rows["prompt"][4:]
    assert rest["pass_rate"] == whole["pass_rate"]
    rows = read_anew(rows)
    again, asked = roll_out(partial, rows)
    assert asked == []
    assert again["pass_rate"] == whole["pass_rate"]


def test_partial_results_of_something_else_are_refused(tmp_path):
    trainer, partial = rater(tmp_path, Solves()), tmp_path / "partial.jsonl"
    pass_rates(trainer, data(1, 2), partial_results=partial)
    assert json.loads(partial.read_text().splitlines()[1]) == [0.25, 0.5]
    another = r"partial_results` is .*partial.jsonl, which holds results of a different call"
    with pytest.raises(ValueError, match=another):
        pass_rates(trainer, data(1, 3), partial_results=partial)
    with pytest.raises(ValueError, match=another):
        pass_rates(trainer, data(2, 1).select([1, 0]), partial_results=partial)  # other prompts
    trainer.reward_weights *= 0.4  # by which a pass rate is decided
    with pytest.raises(ValueError, match=another):
        pass_rates(trainer, data(1, 2), partial_results=partial)


def test_a_file_that_says_nothing_yet_is_begun_anew(tmp_path):
    """A process may be killed before the first line is whole; a torn last line goes, and nothing else is touched."""
    trainer, partial = rater(tmp_path, Solves()), tmp_path / "partial.jsonl"
    for torn in ("", '{"model": "ab'):
        partial.write_text(torn)
        assert pass_rates(trainer, data(1, 2), partial_results=partial)["pass_rate"] == [0.25, 0.5]
    whole = partial.read_text()
    partial.write_text(whole + "[0.25, ")
    assert pass_rates(trainer, data(1, 2), partial_results=partial)["pass_rate"] == [0.25, 0.5]
    assert partial.read_text() == whole


def test_bad_input_is_named(tmp_path):
    trainer = rater(tmp_path, Solves())
    with pytest.raises(ValueError, match="already has a column `pass_rate`"):
        pass_rates(trainer, data(1).add_column("pass_rate", [0.0]))
    with pytest.raises(TypeError, match="dataset is an IterableDataset"):
        pass_rates(trainer, data(1).to_iterable_dataset())
    with pytest.raises(ValueError, match=r"no column `pass_rate` \(it has \['prompt'"):
        drop_solved(data(1))
