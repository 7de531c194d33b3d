"""DUPO through real training: copies of live groups in the slots of dead ones."""

import statistics
from typing import Any

import pandas
import pytest
import tiny
import torch

from trl_ext import DUPOTrainer


# In a batch of 4 prompts some have variance and some don't
SOME = set(range(4, 24, 3))

SETTINGS = {"num_generations": 4, "max_steps": 4, "seed": 5}


def run(tmp_path: Any, reward: Any, arguments: dict | None = None, **settings: Any) -> Any:
    return tiny.trained(DUPOTrainer, tmp_path, reward, arguments, **{**SETTINGS, **settings})


def mixed(trainer: Any) -> list[tuple[int, tiny.TrainedBatch]]:
    """The batches in which something was copied."""
    found = [
        (step, batch)
        for step, batch in enumerate(trainer.batches)
        if any(batch.selection.live) and not all(batch.selection.live)
    ]
    assert found
    return found


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    reward = tiny.Remembering(tiny.LiveFor(SOME, otherwise=1.0))
    trainer = run(tmp_path_factory.mktemp("copied"), reward, log_completions=True)
    return trainer, reward


@pytest.mark.train
def test_one_round_and_nothing_more(copied):
    trainer, reward = copied
    assert len(reward.calls) == len(trainer.batches) == 4
    assert all(len(call.prompts) == 16 for call in reward.calls)
    assert trainer.forwards == 4 * 2
    assert trainer.counters.generation_rounds == 4


@pytest.mark.train
def test_dead_slots_hold_whole_live_groups(copied):
    trainer, reward = copied
    mixed(trainer)
    for step, batch in enumerate(trainer.batches):
        call = reward.at_step(step)[0]
        groups = [call.completion_ids[i : i + 4] for i in range(0, 16, 4)]
        live = [len(set(call.rewards[i : i + 4])) > 1 for i in range(0, 16, 4)]
        for slot in range(4):
            source = batch.selection.sources[slot]
            if not any(live):
                assert source == slot
            else:
                assert live[source]
                assert source == slot or not live[slot]
            rows = slice(4 * slot, 4 * slot + 4)
            assert batch.completions[rows] == groups[source]
            assert len({tuple(ids) for ids in batch.prompts[rows]}) == 1


@pytest.mark.train
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_copies_have_the_advantages_of_their_source(tmp_path, scale):
    # computed before copying: a deviation over the batch, copies included, would be another
    reward = tiny.Remembering(tiny.LiveFor(SOME, otherwise=1.0))
    trainer = run(tmp_path, reward, scale_rewards=scale)
    mixed(trainer)
    for step, batch in enumerate(trainer.batches):
        rewards = reward.at_step(step)[0].rewards
        groups = [rewards[i : i + 4] for i in range(0, 16, 4)]
        expected = []
        for source in batch.selection.sources:
            group = groups[source]
            deviation = {"group": group, "batch": rewards}.get(scale)
            spread = statistics.stdev(deviation) + 1e-4 if deviation else 1.0
            expected += [(value - statistics.fmean(group)) / spread for value in group]
        torch.testing.assert_close(batch.output["advantages"], torch.tensor(expected))


@pytest.mark.train
@pytest.mark.parametrize("estimator", ["leave_one_out", "reinforce"])
def test_copies_under_other_estimators(tmp_path, estimator):
    reward = tiny.Remembering(tiny.LiveFor(SOME, otherwise=1.0))
    trainer = run(tmp_path, reward, advantage_estimator=estimator)
    mixed(trainer)
    for step, batch in enumerate(trainer.batches):
        rewards = reward.at_step(step)[0].rewards
        groups = [rewards[i : i + 4] for i in range(0, 16, 4)]
        expected = [
            value - (sum(groups[source]) - value) / 3 if estimator == "leave_one_out" else value
            for source in batch.selection.sources
            for value in groups[source]
        ]
        torch.testing.assert_close(batch.output["advantages"], torch.tensor(expected))


def test_copies_weigh_in_the_gradient_and_in_the_normaliser(tmp_path):
    # A group that is trained k times has weight k, and its tokens count k times
    reward = tiny.LiveFor(SOME, otherwise=1.0)
    trainer = run(tmp_path, reward, max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=1e9)
    ((_, batch),) = mixed(trainer)
    tokens = sum(map(len, batch.completions))
    assert batch.output["num_items_in_batch"] == tokens
    model = tiny.stopping()
    loss = 0.0
    for prompt, ids, advantage in zip(
        batch.prompts, batch.completions, batch.output["advantages"].tolist(), strict=True
    ):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        loss = loss - advantage * logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).sum() / tokens
    loss.backward()
    for (name, parameter), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected - 0.5 * expected.grad, msg=name)


@pytest.mark.train
def test_metrics_count_every_completion_once(copied):
    trainer, reward = copied
    seen = 0
    for step, logged in enumerate(tiny.history(trainer)):
        call = reward.at_step(step)[0]
        lengths = [len(ids) for ids in call.completion_ids]
        groups = [call.rewards[i : i + 4] for i in range(0, 16, 4)]
        dead = sum(len(set(group)) == 1 for group in groups)
        seen += sum(lengths) + 2 * 16
        recount = {
            "num_tokens": seen,
            "completions/mean_length": statistics.fmean(lengths),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": statistics.fmean(ids[-1] not in (0, 2) for ids in call.completion_ids),
            "reward": statistics.fmean(call.rewards),
            "reward_std": statistics.stdev(call.rewards),
            "frac_reward_zero_std": dead / 4,
            "selection/groups_generated": 4,
            "selection/groups_dead": dead,
            "selection/groups_all_right": dead,
            "selection/groups_kept": 4 - dead,
            "selection/groups_duplicated": dead if dead < 4 else 0,
            "selection/rounds": 1,
        }
        assert {key: logged[key] for key in recount} == pytest.approx(recount)
    assert trainer.counters.generated_tokens == sum(len(ids) for call in reward.calls for ids in call.completion_ids)
    assert trainer.counters.trained_tokens == sum(len(ids) for batch in trainer.batches for ids in batch.completions)


@pytest.mark.train
def test_table_holds_every_completion_once(copied):
    trainer, reward = copied
    tokenizer = tiny.tokenizer()
    for step, _ in mixed(trainer):
        call = reward.at_step(step)[0]
        table = pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_{step + 1:05d}.parquet")
        assert table["prompt"].tolist() == call.prompts
        assert table["completion"].tolist() == tokenizer.batch_decode(call.completion_ids, skip_special_tokens=True)
        assert table["remembering"].tolist() == pytest.approx(call.rewards)
        groups = [call.rewards[i : i + 4] for i in range(0, 16, 4)]
        means = [statistics.fmean(group) for group in groups for _ in group]
        # the advantage of the completion that is shown, not of the copy that took its slot
        signs = [value - mean for value, mean in zip(call.rewards, means, strict=True)]
        for advantage, sign in zip(table["advantage"].tolist(), signs, strict=True):
            assert advantage * sign > 0 or abs(advantage) < 1e-3


class LogsIds:
    def __call__(self, completion_ids: Any, target: Any, log_extra: Any, **_: Any) -> list[float]:
        log_extra("ids", [" ".join(map(str, ids)) for ids in completion_ids])
        return tiny.LiveFor(SOME)(completion_ids=completion_ids, target=target)


@pytest.mark.train
def test_extra_columns_stay_aligned(tmp_path):
    reward = tiny.Remembering(tiny.LiveFor(SOME))
    trainer = run(tmp_path, [LogsIds(), reward], log_completions=True, outcome_reward_funcs=["LogsIds"])
    for step, _ in mixed(trainer):
        table = pandas.read_parquet(f"{tmp_path}/completions/completions_{step + 1:05d}.parquet")
        call = reward.at_step(step)[0]
        assert table["ids"].tolist() == [" ".join(map(str, ids)) for ids in call.completion_ids]


@pytest.mark.train
def test_all_dead_goes_on_as_trl_would(tmp_path, caplog):
    trainer = run(tmp_path, tiny.constant, max_steps=2)
    assert "reward variance" in caplog.text
    assert trainer.counters.batches_without_variance == 2
    assert all(batch.selection.sources == [0, 1, 2, 3] for batch in trainer.batches)
    before = tiny.stopping().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.train
def test_seed_decides_the_copies(tmp_path):
    def sources(seed: int) -> list[list[int]]:
        trainer = run(tmp_path, tiny.LiveFor(SOME), seed=seed)
        return [batch.selection.sources for batch in trainer.batches]

    assert sources(5) == sources(5)


@pytest.mark.train
def test_works_with_several_updates_a_batch(tmp_path):
    trainer = run(tmp_path, tiny.LiveFor(SOME), updates_per_generation=2, num_iterations=2)
    assert len(trainer.batches) == 1
    ((_, batch),) = mixed(trainer)
    assert len(batch.completions) == 32
    old = batch.output["old_per_token_logps"].view(8, 4, -1)
    for slot, source in enumerate(batch.selection.sources):
        torch.testing.assert_close(old[slot], old[source])
