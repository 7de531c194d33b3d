"""
Rewards in the background, through real training: the run is the one that TRL's single call gives, whatever finishes
first; what fails costs its group; chunks are scored while the next is generated.
"""

import asyncio
import random
import statistics
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pandas
import pytest
import tiny
import torch
from resume.test_trainers import assert_same_state
from safetensors.torch import load_file
from trainers.test_tools import Table, dice, last_word
from trainers.test_tools import run as run_with_tools

from trl_ext import DAPOConfig, DAPOTrainer, DUPOTrainer, GRPOConfig, GRPOTrainer, RewardFunctionError


# Prompts i with i % 20 in these have variance: 16 of 32
HALF = set(range(4, 24, 2))
PATIENCE = 20  # seconds; for what only runs out where the code is broken
SOON = 0.5  # seconds; for what has to run out


@dataclass
class Judge:
    """A reward function that logs what it sees and keeps what it was asked."""

    score: Callable[..., list[Any]] = field(default_factory=lambda: tiny.LiveFor(HALF))
    name: str = "judge"
    calls: list[dict[str, Any]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.__name__ = self.name

    def __call__(self, **columns: Any) -> list[Any]:
        copied = {key: list(value) if isinstance(value, list) else value for key, value in columns.items()}
        self.calls.append({**copied, "step": columns["trainer_state"].global_step})
        columns["log_extra"](f"{self.name} saw", [" ".join(map(str, ids)) for ids in columns["completion_ids"]])
        columns["log_metric"](f"{self.name}/even", statistics.fmean(target % 2 == 0 for target in columns["target"]))
        rewards = self.score(**columns)
        self.finished.append(columns["prompts"][0])
        return rewards

    def at_step(self, step: int) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["step"] == step]


def made_async(judge: Judge) -> Callable[..., Any]:
    async def judged(**columns: Any) -> list[Any]:
        await asyncio.sleep(0)
        return judge(**columns)

    judged.__name__ = judge.name
    return judged


def trained(trainer_class: type, directory: Path, reward: Any, arguments: Any = None, **settings: Any) -> Any:
    settings = {"max_steps": 2, "seed": 3, "log_completions": True, "num_completions_to_print": 1, **settings}
    return tiny.trained(trainer_class, directory, reward, arguments, **settings)


def tables(trainer: Any) -> list[pandas.DataFrame]:
    """The completions tables, in the order of the steps."""
    return [pandas.read_parquet(path) for path in sorted(Path(trainer.args.output_dir).glob("completions/*.parquet"))]


def logged(trainer: Any, *leave_out: str) -> list[dict[str, Any]]:
    """Logs of training and evaluation, without clocks and what only background scoring logs."""
    clocks = ("step_time", "runtime", "per_second", "failed_groups", *leave_out)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_reward" in entry]
    return [{key: value for key, value in e.items() if not key.endswith(clocks)} for e in entries]


def assert_same_run(one: Any, other: Any, *leave_out: str, rel: float = 0.0) -> None:
    for name, value in tiny.weights(one.model).items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert logged(one)
    for ours, theirs in zip(logged(one, *leave_out), logged(other, *leave_out), strict=True):
        assert ours == (pytest.approx(theirs, rel=rel, abs=0, nan_ok=True) if rel else theirs)
    assert tables(one)
    for ours, theirs in zip(tables(one), tables(other), strict=True):
        pandas.testing.assert_frame_equal(ours, theirs)


def failed_groups(trainer: Any, name: str = "judge") -> list[float]:
    return [entry[f"rewards/{name}/failed_groups"] for entry in tiny.history(trainer)]


def assert_selected(trainer: Any) -> None:
    """Something was refilled or copied, or the method does neither."""
    if isinstance(trainer, DAPOTrainer):
        assert any(len(batch.rounds) > 1 for batch in trainer.batches)
    if isinstance(trainer, DUPOTrainer):
        assert any(batch.selection.sources != [0, 1, 2, 3] for batch in trainer.batches)


# The run stays what it was


def functions(kind: str) -> tuple[list[Judge], list[Any]]:
    """Judges that remember, and what the trainer gets."""
    if kind == "mixed":  # the async one first: TRL calls it last all the same
        judges = [Judge(tiny.low_ids, "graded"), Judge()]
        return judges, [made_async(judges[0]), judges[1]]
    judges = [Judge()]
    return judges, judges if kind == "sync" else [made_async(judges[0])]


KINDS = {GRPOTrainer: ("sync", "async", "mixed"), DAPOTrainer: ("sync", "mixed"), DUPOTrainer: ("mixed",)}


@pytest.fixture(
    scope="module",
    params=[(trainer_class, kind) for trainer_class, kinds in KINDS.items() for kind in kinds],
    ids=lambda param: f"{param[0].__name__}-{param[1]}",
)
def pair(request, tmp_path_factory):
    """The same run with rewards ahead and without, each with its judges."""
    trainer_class, kind = request.param
    runs = []
    for in_flight in (3, None):
        judges, funcs = functions(kind)
        directory = tmp_path_factory.mktemp("run")
        settings = {"rewards_in_flight": in_flight, "outcome_reward_funcs": ["judge"]}
        runs.append((trained(trainer_class, directory, funcs, **settings), judges))
    return runs


@pytest.mark.train
def test_one_chunk_is_the_same_run(pair):
    (ahead, _), (whole, _) = pair
    assert_selected(whole)
    # What a function logs with `log_metric` is averaged over its calls, and a call is a group or a round
    assert_same_run(ahead, whole, *(["/even"] if isinstance(whole, DAPOTrainer) else []))
    assert "judge saw" in tables(ahead)[0]
    assert failed_groups(ahead) == [0, 0]
    assert not any("failed_groups" in key for entry in tiny.history(whole) for key in entry)


@pytest.mark.train
def test_functions_get_whole_groups_and_trls_columns(pair):
    (ahead, ours), (_, theirs) = pair
    for judge, reference in zip(ours, theirs, strict=True):
        assert len(judge.calls) > len(reference.calls)
        for call in judge.calls:
            assert len(call["prompts"]) == 4
            assert len(set(call["prompts"])) == 1
            assert call["trainer_state"] is ahead.state
        for step in (0, 1):
            by_prompt = {call["prompts"][0]: call for call in judge.at_step(step)}
            calls = reference.at_step(step)
            assert sum(len(call["prompts"]) for call in calls) == 4 * len(by_prompt)
            for call in calls:
                for start in range(0, len(call["prompts"]), 4):
                    group = by_prompt[call["prompts"][start]]
                    assert group.keys() == call.keys()
                    lists = {key for key, value in call.items() if isinstance(value, list)}
                    assert {"prompts", "completions", "completion_ids", "target"} <= lists
                    for key in lists:
                        assert group[key] == call[key][start : start + 4]


class LateFirst:
    """Holds the first group of every batch back until the others are scored; they take random times."""

    def __init__(self, score: Callable[..., list[Any]]) -> None:
        self.score = score
        self.random = random.Random(0)  # not the generator that a run is drawn from
        self.lock = threading.Lock()
        self.last = threading.Event()
        self.begun = self.done = 0

    def __call__(self, **columns: Any) -> list[Any]:
        with self.lock:
            first = self.begun % 4 == 0
            self.begun += 1
            pause = self.random.random() / 50
            if first:
                self.last.clear()
        if first:
            assert self.last.wait(PATIENCE)
        else:
            time.sleep(pause)
        with self.lock:
            self.done += not first
            if self.done % 3 == 0:
                self.last.set()
        return self.score(**columns)


@pytest.mark.train
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_order_of_arrival_changes_nothing(tmp_path, kind):
    slow, plain = Judge(LateFirst(tiny.hashed)), Judge(tiny.hashed)

    async def in_a_thread(**columns: Any) -> list[Any]:
        return await asyncio.to_thread(slow, **columns)

    in_a_thread.__name__ = "judge"
    funcs = [slow if kind == "sync" else in_a_thread, tiny.low_ids]
    # 4 groups × 2 functions: all in flight
    ahead = trained(GRPOTrainer, tmp_path / "ahead", funcs, rewards_in_flight=8)
    whole = trained(GRPOTrainer, tmp_path / "whole", [plain, tiny.low_ids])
    dealt = [list(dict.fromkeys(table["prompt"])) for table in tables(ahead)]
    assert [slow.finished[:4], slow.finished[4:]] != dealt
    assert sorted(slow.finished) == sorted(chain(*dealt))
    assert_same_run(ahead, whole)


# Chunks


class InTurns(GRPOTrainer):
    """Generates a second chunk only once the first one's rewards are there, and counts."""

    scored: Any  # a semaphore: one for each group that was scored

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sizes: list[int] = []
        self.finished = 0
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if len(self.sizes) % 2:
            for _ in range(self.sizes[-1] // 4):
                assert self.scored.acquire(timeout=PATIENCE)
        result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.sizes.append(len(prompt_ids))
        self.finished += 1
        return result


@pytest.fixture(scope="module", params=[(4, 8), (3, 6), (4, 8, "async")], ids=["even", "3 groups in 2", "even, async"])
def chunked(request, tmp_path_factory):
    """A run with two chunks a batch of so many groups, its judge, and how many chunks were there at each call."""
    groups, rows = request.param[:2]
    scored = threading.Semaphore(0)
    chunks_there: list[int] = []

    def score(**columns: Any) -> list[float]:
        chunks_there.append(trainer.finished)
        scored.release()
        return tiny.hashed(**columns)

    judge = Judge(score)
    trainer = tiny.trainer(
        tiny.recorded(InTurns),
        tmp_path_factory.mktemp("chunked"),
        made_async(judge) if "async" in request.param else judge,
        per_device_train_batch_size=rows,
        log_completions=True,
        rewards_in_flight=2,
        generation_chunks=2,
    )
    trainer.scored = scored
    trainer.train()
    return trainer, judge, groups, chunks_there


@pytest.mark.train
def test_groups_are_scored_while_the_next_are_generated(chunked):
    trainer, _, groups, chunks_there = chunked
    first, second = 4 * (groups // 2), 4 * (groups - groups // 2)
    assert trainer.sizes == [first, second] * 2
    assert chunks_there[: first // 4] == [1] * (first // 4)  # the second was not
    assert Counter(chunks_there) == Counter({1: first / 4, 2: second / 4, 3: first / 4, 4: second / 4})


@pytest.mark.train
def test_each_completion_is_scored_and_trained_on_once(chunked):
    trainer, judge, groups, _ = chunked
    for step, (batch, table) in enumerate(zip(trainer.batches, tables(trainer), strict=True)):
        calls = {call["prompts"][0]: call for call in judge.at_step(step)}
        assert len(calls) == len(judge.at_step(step)) == groups
        order = list(dict.fromkeys(table["prompt"]))
        assert sorted(calls) == sorted(order)
        ids = [row for prompt in order for row in calls[prompt]["completion_ids"]]
        assert batch.completions == ids
        rewards = [tiny.hashed(calls[prompt]["completion_ids"]) for prompt in order]
        assert table["judge"].tolist() == pytest.approx(list(chain(*rewards)))
        assert table["judge saw"].tolist() == [" ".join(map(str, row)) for row in ids]
        advantages = [
            (reward - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4)
            for group in rewards
            for reward in group
        ]
        assert batch.output["advantages"].tolist() == pytest.approx(advantages, rel=1e-4, abs=1e-5)


@pytest.mark.train
def test_metrics_are_over_the_whole_batch(chunked):
    trainer, judge, groups, _ = chunked
    tokens = 0
    for step, entry in enumerate(tiny.history(trainer)):
        ids = [row for call in judge.at_step(step) for row in call["completion_ids"]]
        assert len(ids) == 4 * groups
        lengths, ended = [len(row) for row in ids], [len(row) for row in ids if row[-1] in (0, 2)]
        assert 0 < len(ended) < len(ids)
        tokens += sum(lengths) + 2 * len(ids)  # prompts of two words
        assert entry["num_tokens"] == tokens
        assert entry["completions/mean_length"] == pytest.approx(statistics.fmean(lengths))
        assert entry["completions/min_length"] == min(lengths)
        assert entry["completions/max_length"] == max(lengths)
        assert entry["completions/clipped_ratio"] == pytest.approx(1 - len(ended) / len(ids))
        assert entry["completions/mean_terminated_length"] == pytest.approx(statistics.fmean(ended))
        assert entry["completions/min_terminated_length"] == min(ended)
        assert entry["completions/max_terminated_length"] == max(ended)
        assert entry["reward"] == pytest.approx(statistics.fmean(tiny.hashed(ids)))
    assert trainer.counters.generated_tokens == sum(len(ids) for call in judge.calls for ids in call["completion_ids"])


class Rollouts:
    """A `rollout_func` that doesn't notice with whom a prompt is generated, so that chunks change nothing."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        self.sizes.append(len(prompts))
        ids, seen = [], Counter[str]()
        for prompt in prompts:
            seed = zlib.crc32(f"{prompt} {seen[prompt]} {trainer.state.global_step}".encode())
            generator = torch.Generator().manual_seed(seed)
            seen[prompt] += 1
            length = int(torch.randint(2, 7, (), generator=generator))
            ids.append(torch.randint(2, 24, (length,), generator=generator).tolist())
        return {
            "prompt_ids": [tiny.tokenizer()(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": ids,
            "logprobs": [[-token / 100 for token in row] for row in ids],
            "env_mask": [[1] * (len(row) - 1) + [0] for row in ids],
            "summed": [float(sum(row)) for row in ids],
            "tag": "same for all",
        }


def looks_at_fields(completion_ids: Any, summed: list[float], tag: list[str], target: Any, **_: Any) -> list[float]:
    assert summed == [float(sum(ids)) for ids in completion_ids]
    assert tag == ["same for all"] * len(completion_ids)
    return tiny.LiveFor(HALF)(completion_ids=completion_ids, target=target)


def rolled_out(trainer_class: type, directory: Path, **settings: Any) -> tuple[Any, list[int]]:
    """A run on [`Rollouts`] with an evaluation of 3 groups at its end, and how many prompts each call got."""
    rollouts = Rollouts()
    arguments = {"rollout_func": rollouts, "eval_dataset": tiny.prompts(3)}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 12}
    return trained(trainer_class, directory, Judge(looks_at_fields), arguments, **settings), rollouts.sizes


@pytest.fixture(scope="module")
def unchunked(tmp_path_factory):
    """The run of a trainer in which a batch is generated and scored as one."""
    return cache(lambda trainer_class: rolled_out(trainer_class, tmp_path_factory.mktemp("unchunked")))


@pytest.mark.train
@pytest.mark.parametrize(
    ("trainer_class", "chunks", "first", "last"),
    [
        (GRPOTrainer, 2, [8, 8], [4, 8]),
        (GRPOTrainer, 3, [4, 4, 8], [4, 4, 4]),
        (GRPOTrainer, 9, [4, 4, 4, 4], [4, 4, 4]),
        (DAPOTrainer, 2, [8, 8], [4, 8]),
        (DUPOTrainer, 2, [8, 8], [4, 8]),
    ],
)
def test_chunks_of_the_same_rollouts_are_the_same_run(tmp_path, unchunked, trainer_class, chunks, first, last):
    trainer, sizes = rolled_out(trainer_class, tmp_path, rewards_in_flight=3, generation_chunks=chunks)
    whole, whole_sizes = unchunked(trainer_class)
    assert (sizes[: len(first)], sizes[-len(last) :]) == (first, last)
    assert (whole_sizes[0], whole_sizes[-1]) == (16, 12)
    assert_selected(whole)
    # Means of means round differently
    assert_same_run(trainer, whole, *(["/even"] if trainer_class is DAPOTrainer else []), rel=1e-6)
    for batch in trainer.batches:
        written = batch.output["tool_mask"] * batch.output["completion_mask"]
        assert written.sum(dim=1).tolist() == [len(ids) - 1 for ids in batch.completions]


def test_chunks_in_an_evaluation(tmp_path):
    judge = Judge(tiny.hashed)
    trainer = trained(
        GRPOTrainer,
        tmp_path,
        judge,
        {"eval_dataset": tiny.prompts(6)},
        rewards_in_flight=2,
        generation_chunks=2,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=12,  # 3 groups, twice
    )
    (entry,) = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    ids = [row for call in judge.at_step(1) for row in call["completion_ids"]]
    assert len(ids) == 24
    assert entry["eval_reward"] == pytest.approx(statistics.fmean(tiny.hashed(ids)))
    assert entry["eval_completions/mean_length"] == pytest.approx(statistics.fmean(map(len, ids)))
    assert entry["eval_rewards/judge/failed_groups"] == 0
    # and where groups are of another size than in training
    judge.calls.clear()
    measured = trainer.roll_out([trainer.train_dataset[i] for i in range(3)], 2, seed=1)
    expected = tiny.hashed([rollout.completion_ids for rollout in measured.rollouts])
    assert measured.rewards.flatten().tolist() == pytest.approx(expected)
    assert [len(call["prompts"]) for call in judge.calls] == [2, 2, 2]


def test_a_generation_that_fails_leaves_nothing_behind(tmp_path):
    class FailsLate(Rollouts):
        def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
            if len(self.sizes) == 3:  # the second chunk of the second batch
                self.sizes.append(len(prompts))
                raise ConnectionError("no server")
            return super().__call__(prompts, trainer)

    judge = Judge(looks_at_fields)
    trainer = tiny.trainer(
        GRPOTrainer, tmp_path, judge, {"rollout_func": FailsLate()}, rewards_in_flight=1, generation_chunks=2
    )
    with pytest.raises(ConnectionError):
        trainer.train()
    rollouts = trainer.roll_out([trainer.train_dataset[i] for i in range(3)], 2)
    expected = tiny.LiveFor(HALF)([r.completion_ids for r in rollouts.rollouts], [4, 4, 5, 5, 6, 6])
    assert rollouts.rewards.flatten().tolist() == pytest.approx(expected)


# Functions that fail on a group


@dataclass
class FailsFor:
    """[`tiny.hashed`], but for a target: `how` then."""

    targets: set[int]
    how: Callable[[], Any]

    def __call__(self, completion_ids: Any, target: list[int], **columns: Any) -> list[Any]:
        if target[0] in self.targets:
            return self.how()
        return tiny.hashed(completion_ids)


def raises() -> None:
    raise ZeroDivisionError("no such thing")


def not_for(targets: set[int], completion_ids: Any, target: Any, **columns: Any) -> list[float | None]:
    """What [`FailsFor`] should come to."""
    rewards = tiny.hashed(completion_ids)
    return [None if t in targets else reward for t, reward in zip(target, rewards, strict=True)]


@pytest.fixture(scope="module")
def without_group(tmp_path_factory):
    """Runs of TRL's way in which `judge` doesn't apply to the prompt with target 6, by whether it is alone."""
    runs = {}
    for others in ([], [tiny.low_ids]):
        judge = Judge(lambda **columns: not_for({6}, **columns))
        directory = tmp_path_factory.mktemp("without")
        runs[not others] = trained(GRPOTrainer, directory, [judge, *others], {"train_dataset": tiny.prompts(8)})
    return runs


def assert_group_failed(trainer: Any, without: Any, caplog: Any, said: str) -> None:
    for name, value in tiny.weights(trainer.model).items():
        assert torch.equal(value, without.model.state_dict()[name])
    assert logged(trainer, "/even") == [pytest.approx(entry, nan_ok=True) for entry in logged(without, "/even")]
    assert sorted(failed_groups(trainer)) == [0, 1]  # 8 prompts in two steps: each once
    for table in tables(trainer):
        failed = (table["prompt"] == "w2 w0").tolist()
        assert table["judge"].isna().tolist() == failed
        assert table["judge saw"].isna().tolist() == failed
    (record,) = [record for record in caplog.records if "`judge`" in record.message]
    for part in (said, "prompts: 'w2 w0'", "target: 6", "Its group has no reward"):
        assert part in record.message
    assert record.levelname == "WARNING"


@pytest.mark.train
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("others", [[], [tiny.low_ids]], ids=["alone", "with another"])
def test_a_group_that_fails(tmp_path, caplog, without_group, kind, others):
    judge = Judge(FailsFor({6}, raises))
    trainer = trained(
        GRPOTrainer,
        tmp_path,
        [judge if kind == "sync" else made_async(judge), *others],
        {"train_dataset": tiny.prompts(8)},
        rewards_in_flight=2,
    )
    said = "ZeroDivisionError: no such thing (for this sample)"
    assert_group_failed(trainer, without_group[not others], caplog, said)


@pytest.mark.train
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_group_that_takes_too_long(tmp_path, caplog, without_group, kind):
    go = threading.Event()
    judge = Judge(FailsFor({6}, lambda: go.wait(PATIENCE)))

    async def slow(target: list[int], **columns: Any) -> list[Any]:
        if target[0] == 6:
            await asyncio.sleep(PATIENCE)
        return judge(target=target, **columns)

    slow.__name__ = "judge"
    trainer = trained(
        GRPOTrainer,
        tmp_path,
        judge if kind == "sync" else slow,
        {"train_dataset": tiny.prompts(8)},
        rewards_in_flight=1,
        reward_timeout=SOON,
    )
    go.set()
    assert_group_failed(trainer, without_group[True], caplog, "took longer than 0.5 seconds")


@pytest.mark.train
def test_a_time_limit_alone(tmp_path, caplog):
    """The function gets the whole batch, as without a limit; a batch that takes too long has no rewards from it."""
    go, sizes = threading.Event(), []

    def judge(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        sizes.append(len(completion_ids))
        if len(sizes) == 2:
            go.wait(PATIENCE)
        return tiny.hashed(completion_ids)

    trainer = trained(GRPOTrainer, tmp_path, judge, reward_timeout=SOON, max_steps=3)
    go.set()
    assert sizes == [16, 16, 16]
    assert failed_groups(trainer) == [0, 1, 0]
    assert "`judge` took longer than 0.5 seconds" in caplog.text
    plain = trained(GRPOTrainer, tmp_path, tiny.hashed, max_steps=1)
    assert tiny.history(trainer, "failed_groups")[0]["reward"] == tiny.history(plain)[0]["reward"]


@pytest.mark.parametrize("reward_timeout", [None, 30.0])
def test_a_time_limit_tolerates_no_errors(tmp_path, reward_timeout):
    judge = Judge(FailsFor(set(range(24)), raises))
    with pytest.raises(RewardFunctionError, match="`judge` raised"):
        trained(GRPOTrainer, tmp_path, judge, reward_timeout=reward_timeout, max_steps=1)


@pytest.mark.train
def test_refilling_replaces_groups_that_fail(tmp_path):
    judge = Judge(FailsFor(set(range(5, 24, 2)), raises))  # every other prompt
    trainer = trained(DAPOTrainer, tmp_path, judge, rewards_in_flight=2, max_steps=3)
    assert any(len(batch.rounds) > 1 for batch in trainer.batches)
    for step, batch in enumerate(trainer.batches):
        # Attempts to find the sample are calls of one
        asked = [call["target"][0] for call in judge.at_step(step) if len(call["prompts"]) == 4]
        bad = sum(target % 2 for target in asked)
        assert bad
        assert failed_groups(trainer)[step] == bad  # of all rounds together
        assert all(batch.selection.live)
        assert batch.output["advantages"].isfinite().all()
    assert all(table["judge"].notna().all() for table in tables(trainer))


# Functions that are broken


class FailsFrom:
    """[`tiny.hashed`] until a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, completion_ids: Any, trainer_state: Any, **columns: Any) -> list[float]:
        return tiny.hashed(completion_ids) if trainer_state.global_step < self.step else raises()


@pytest.mark.train
@pytest.mark.parametrize(
    ("trainer_class", "kind"), [(GRPOTrainer, "sync"), (DAPOTrainer, "sync"), (DUPOTrainer, "async")]
)
def test_a_function_that_always_fails_stops_the_run(tmp_path, trainer_class, kind):
    def build(directory: Path, score: Any) -> Any:
        judge = Judge(score)
        func = judge if kind == "sync" else made_async(judge)
        settings = {"max_steps": 3, "rewards_in_flight": 2, "generation_chunks": 2}
        return tiny.trainer(tiny.recorded(trainer_class), directory, func, **settings)

    failing = build(tmp_path, FailsFrom(2))
    with pytest.raises(RewardFunctionError, match=r"`judge` raised ZeroDivisionError.*\(for this sample\)") as error:
        failing.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert str(checkpoint) in "".join(error.value.__notes__)
    for name, value in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(value, failing.model.state_dict()[name])
    mended = build(tmp_path, tiny.hashed)
    mended.train(resume_from_checkpoint=True)
    whole = build(tmp_path / "whole", tiny.hashed)
    whole.train()
    assert_same_state(whole, mended)


@pytest.mark.train
def test_a_few_groups_are_not_enough_to_stop(tmp_path):
    # Two groups a batch: a step passes with no rewards at all and moves nothing, the next one stops
    trainer = tiny.trainer(
        tiny.recorded(GRPOTrainer),
        tmp_path,
        Judge(FailsFrom(1)),
        per_device_train_batch_size=4,
        max_steps=5,
        rewards_in_flight=2,
    )
    with pytest.raises(RewardFunctionError, match="`judge` raised ZeroDivisionError"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2").exists()
    assert failed_groups(trainer) == [0, 2]
    assert trainer.batches[0].output["advantages"].any()
    assert not trainer.batches[1].output["advantages"].any()
    assert all(value.isfinite().all() for value in tiny.weights(trainer.model).values())


# Tools and environments


@pytest.mark.train
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DAPOTrainer, DUPOTrainer])
def test_environments(tmp_path, trainer_class):
    runs = []
    for in_flight in (4, None):
        settings = {"rewards_in_flight": in_flight, "outcome_reward_funcs": ["Table"], "log_completions": True}
        directory = tmp_path / str(in_flight)
        runs.append(run_with_tools(trainer_class, directory, last_word, {"environment_factory": Table}, **settings))
    assert_selected(runs[1])
    assert_same_run(*runs)


@pytest.mark.train
def test_tools(tmp_path):
    runs = []
    for in_flight in (4, None):
        settings = {"rewards_in_flight": in_flight, "log_completions": True}
        runs.append(run_with_tools(DUPOTrainer, tmp_path / str(in_flight), last_word, {"tools": [dice]}, **settings))
    assert_selected(runs[1])
    assert_same_run(*runs)


# What is refused


@pytest.mark.parametrize(
    "arguments", [{"tools": [dice]}, {"environment_factory": Table}], ids=["tools", "environment"]
)
def test_chunks_with_tools_are_refused(tmp_path, arguments):
    # An OSError where the model is loaded
    model = {"model": "does/not-exist", "train_dataset": tiny.prompts(conversational=True)}
    settings = {"rewards_in_flight": 2, "generation_chunks": 2}
    with pytest.raises(ValueError, match="generation_chunks=2 can't be used with tools or environments"):
        tiny.trainer(GRPOTrainer, tmp_path, last_word, {**model, **arguments}, **settings)
    with pytest.raises(OSError):  # all else is well
        tiny.trainer(GRPOTrainer, tmp_path, last_word, {**model, **arguments}, rewards_in_flight=2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rewards_in_flight": 0}, ["rewards_in_flight=0", "at least 1", "None"]),
        ({"reward_timeout": 0.0}, ["reward_timeout=0.0", "seconds", "None"]),
        (
            {"generation_chunks": 2},
            ["generation_chunks=2", "without rewards_in_flight", "leave generation_chunks out"],
        ),
        ({"rewards_in_flight": 2, "reward_timeout": 0.0}, ["reward_timeout=0.0", "seconds", "None"]),
        ({"rewards_in_flight": 2, "reward_timeout": -1.0}, ["reward_timeout=-1.0", "seconds", "None"]),
        ({"rewards_in_flight": 2, "generation_chunks": 0}, ["generation_chunks=0", "at least 1"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("config_class", [GRPOConfig, DAPOConfig])
def test_refused_by_the_configuration(tmp_path, config_class, changed, said):
    with pytest.raises(ValueError) as error:
        config_class(**tiny.cpu_settings(tmp_path, **changed))
    for part in said:
        assert part in str(error.value)
