"""DAPO through real training: which groups are trained on, what they cost, and what is logged about them."""

import math
import statistics
from typing import Any

import pandas
import pytest
import tiny
import torch
from datasets import IterableDataset
from peft import LoraConfig
from trl.rewards import get_soft_overlong_punishment

from trl_ext import DAPOTrainer, GRPOTrainer


# Prompts i with i % 20 in these have variance: 16 of 32. A batch of 4 needs about as many again.
HALF = set(range(4, 24, 2))

# A completion is not truncated if it ends in one of these: pad and eos
ENDS = (0, 2)


def slow_advantages(rewards: list[float], size: int = 4) -> list[float]:
    """(R − mean) / (deviation + 1e-4) within each group."""
    advantages = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        deviation = statistics.stdev(group)
        advantages += [(reward - statistics.fmean(group)) / (deviation + 1e-4) for reward in group]
    return advantages


def by_completion(calls: list[tiny.Call]) -> dict[tuple[str, tuple[int, ...]], float]:
    """Reward of each completion of each prompt, as the reward function gave it."""
    return {
        (prompt, tuple(ids)): reward
        for call in calls
        for prompt, ids, reward in zip(call.prompts, call.completion_ids, call.rewards, strict=True)
    }


def texts(batch: tiny.TrainedBatch) -> list[str]:
    tokenizer = tiny.tokenizer()
    return [tokenizer.decode(ids) for ids in batch.prompts]


@pytest.fixture(scope="module")
def refilled(tmp_path_factory):
    """A run of 4 steps in which half of the prompts have no variance, and its reward function."""
    reward = tiny.Remembering(tiny.LiveFor(HALF))
    trainer = tiny.trained(
        DAPOTrainer, tmp_path_factory.mktemp("refilled"), reward, max_steps=4, log_completions=True, seed=3
    )
    return trainer, reward


@pytest.mark.train
class TestRefill:
    def test_took_several_rounds(self, refilled):
        trainer, reward = refilled
        assert len(trainer.batches) == 4
        rounds = [len(reward.at_step(step)) for step in range(4)]
        assert rounds == [len(batch.rounds) for batch in trainer.batches]
        assert max(rounds) > 1

    def test_draws_only_new_prompts(self, refilled):
        _, reward = refilled
        for step in range(4):
            groups = [call.prompts[i] for call in reward.at_step(step) for i in range(0, len(call.prompts), 4)]
            assert len(set(groups)) == len(groups)
            # whole groups: each prompt four times in a row
            for call in reward.at_step(step):
                assert call.prompts == [prompt for prompt in call.prompts[::4] for _ in range(4)]

    def test_kept_groups_survive(self, refilled):
        trainer, reward = refilled
        for step, batch in enumerate(trainer.batches):
            first = reward.at_step(step)[0]
            for slot in range(4):
                rows = slice(4 * slot, 4 * slot + 4)
                if len(set(first.rewards[rows])) > 1:
                    assert batch.completions[rows] == first.completion_ids[rows]
                    assert texts(batch)[rows] == first.prompts[rows]

    def test_trains_on_live_groups_only(self, refilled):
        trainer, reward = refilled
        for step, batch in enumerate(trainer.batches):
            known = by_completion(reward.at_step(step))
            keys = list(zip(texts(batch), map(tuple, batch.completions), strict=True))
            rewards = [known[key] for key in keys]
            for start in range(0, 16, 4):
                assert len(set(texts(batch)[start : start + 4])) == 1
                assert len(set(rewards[start : start + 4])) > 1
            assert len(set(texts(batch))) == 4
            torch.testing.assert_close(batch.output["advantages"], torch.tensor(slow_advantages(rewards)))

    def test_the_loss_gets_exactly_these_rows(self, refilled):
        """All that have an advantage, whatever micro-batch they are dealt to."""
        trainer, _ = refilled
        for step, batch in enumerate(trainer.batches):
            dealt = [tiny.TrainedBatch(inputs, None, []) for inputs in trainer.losses[2 * step : 2 * step + 2]]

            def rows(batch):
                pairs = zip(batch.completions, batch.output["advantages"].tolist(), strict=True)
                return [(*ids, advantage) for ids, advantage in pairs if advantage]

            assert sorted(row for part in dealt for row in rows(part)) == sorted(rows(batch))
            assert len(rows(batch)) > 12

    def test_generates_about_as_much_as_is_missing(self, refilled):
        _, reward = refilled
        for step in range(4):
            for call in reward.at_step(step)[1:]:
                assert len(call.prompts) <= 16  # never more than memory was sized for

    def test_thrown_away_groups_cost_no_forward(self, refilled):
        trainer, _ = refilled
        # 4 steps of 2 micro-batches; no pass for old log-probabilities with one step a generation
        assert trainer.forwards == 8

    def test_completions_are_counted_once(self, refilled):
        trainer, reward = refilled
        seen_tokens = 0
        for step, logged in enumerate(tiny.history(trainer)):
            calls = reward.at_step(step)
            ids = [row for call in calls for row in call.completion_ids]
            lengths = [len(row) for row in ids]
            ended = [len(row) for row in ids if row[-1] in ENDS]
            rewards = [value for call in calls for value in call.rewards]
            groups = [rewards[i : i + 4] for i in range(0, len(rewards), 4)]
            dead = [group for group in groups if len(set(group)) == 1]
            seen_tokens += sum(lengths) + 2 * len(ids)  # every prompt has two tokens
            recount = {
                "num_tokens": seen_tokens,
                "completions/mean_length": statistics.fmean(lengths),
                "completions/min_length": min(lengths),
                "completions/max_length": max(lengths),
                "completions/clipped_ratio": 1 - len(ended) / len(ids),
                "completions/mean_terminated_length": statistics.fmean(ended or [0]),
                "completions/min_terminated_length": min(ended or [0]),
                "completions/max_terminated_length": max(ended or [0]),
                "reward": statistics.fmean(rewards),
                "reward_std": statistics.stdev(rewards),
                "rewards/remembering/mean": statistics.fmean(rewards),
                "rewards/remembering/std": statistics.stdev(rewards),
                "frac_reward_zero_std": len(dead) / len(groups),
                "selection/groups_generated": len(groups),
                "selection/groups_dead": len(dead),
                "selection/groups_all_wrong": len(dead),  # a constant 0
                "selection/groups_all_right": 0,
                "selection/groups_kept": 4,
                "selection/groups_duplicated": 0,
                "selection/groups_surplus": len(groups) - len(dead) - 4,
                "selection/rounds": len(calls),
            }
            assert {key: logged[key] for key in recount} == pytest.approx(recount)

    def test_counters(self, refilled):
        trainer, reward = refilled
        generated = sum(len(ids) for call in reward.calls for ids in call.completion_ids)
        trained = sum(len(ids) for batch in trainer.batches for ids in batch.completions)
        assert trainer.counters.generated_tokens == generated
        assert trainer.counters.trained_tokens == trained
        assert trained < generated
        assert trainer.counters.generation_rounds == len(reward.calls)
        assert trainer.state.global_step == 4
        last = tiny.history(trainer)[-1]
        assert last["selection/generated_tokens"] == generated
        assert last["selection/trained_tokens"] == trained
        assert last["selection/generation_rounds"] == len(reward.calls)

    def test_table_of_completions(self, refilled):
        trainer, reward = refilled
        tokenizer = tiny.tokenizer()
        for step, batch in enumerate(trainer.batches):
            path = f"{trainer.args.output_dir}/completions/completions_{step + 1:05d}.parquet"
            table = pandas.read_parquet(path)
            assert table["prompt"].tolist() == texts(batch)
            expected = tokenizer.batch_decode(batch.completions, skip_special_tokens=True)
            assert table["completion"].tolist() == expected
            assert table["advantage"].tolist() == pytest.approx(batch.output["advantages"].tolist())
            known = by_completion(reward.at_step(step))
            keys = zip(texts(batch), map(tuple, batch.completions), strict=True)
            assert table["remembering"].tolist() == pytest.approx([known[key] for key in keys])


def test_a_step_is_the_one_that_trl_takes_on_the_selected_rows(tmp_path):
    # The gradient must not remember that other groups were generated
    trainer = tiny.trained(
        DAPOTrainer, tmp_path, tiny.LiveFor(HALF), max_steps=1, optim="sgd", learning_rate=0.5, seed=3
    )
    (batch,) = trainer.batches
    assert len(batch.rounds) > 1
    model = tiny.stopping()
    total = 0.0
    tokens = sum(map(len, batch.completions))
    for prompt, ids, advantage in zip(
        batch.prompts, batch.completions, batch.output["advantages"].tolist(), strict=True
    ):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1))
        # At ratio 1 the gradient of the clipped surrogate is A ∇logp; DAPO divides by all tokens of the step
        total = total - advantage * logps.sum() / tokens
    total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad / max(1.0, grad_norm(model) / 1.0)  # clipped at TRL's max_grad_norm 1
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)


def grad_norm(model: torch.nn.Module) -> float:
    return math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))


@pytest.mark.train
class TestEnds:
    """What happens when there is nothing, or too little, to draw."""

    def test_at_the_cap_duplicates_fill(self, tmp_path):
        # Targets 4 and 5 belong to prompts 0, 1, 20 and 21: 4 live prompts in 32
        reward = tiny.Remembering(tiny.LiveFor({4, 5}, otherwise=1.0))
        trainer = tiny.trained(DAPOTrainer, tmp_path, reward, max_steps=4, max_refill_rounds=2)
        mixed = 0
        for step, (batch, logged) in enumerate(zip(trainer.batches, tiny.history(trainer), strict=True)):
            assert len(reward.at_step(step)) <= 3  # the batch, and two rounds
            known = by_completion(reward.at_step(step))
            keys = list(zip(texts(batch), map(tuple, batch.completions), strict=True))
            live = sum(batch.selection.live)
            assert logged["selection/groups_kept"] == live
            assert logged["selection/groups_duplicated"] == (4 - live if live else 0)
            assert logged["selection/groups_all_right"] == logged["selection/groups_dead"]
            if not live:
                continue
            mixed += live < 4
            for start in range(0, 16, 4):
                assert len({known[key] for key in keys[start : start + 4]}) > 1
            # each live group in turn before any twice
            copies = [batch.selection.sources.count(slot) for slot in range(4) if batch.selection.live[slot]]
            assert max(copies) - min(copies) <= 1 + (4 - live) // live
        assert mixed

    def test_prompts_run_out(self, tmp_path):
        # 6 prompts, 4 of which are in the batch: two are left to draw, once
        reward = tiny.Remembering(tiny.LiveFor({4}))
        trainer = tiny.trained(DAPOTrainer, tmp_path, reward, {"train_dataset": tiny.prompts(6)}, max_steps=2)
        for step in range(2):
            drawn = [call.prompts[i] for call in reward.at_step(step) for i in range(0, len(call.prompts), 4)]
            assert len(drawn) == len(set(drawn)) <= 6
        assert trainer.state.global_step == 2

    def test_all_dead_ends_with_a_warning(self, tmp_path, caplog):
        reward = tiny.Remembering(tiny.constant)
        trainer = tiny.trained(DAPOTrainer, tmp_path, reward, max_steps=3, max_refill_rounds=2)
        assert trainer.state.global_step == 3
        # said at the 1st and 2nd, not at every step
        warnings = [record for record in caplog.records if "reward variance" in record.getMessage()]
        assert len(warnings) == 2
        assert "after 3 round(s) of generation" in warnings[0].getMessage()
        assert trainer.counters.batches_without_variance == 3
        assert len(reward.calls) == 9
        before = tiny.stopping().state_dict()
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, before[name]), "no variance is no gradient"
        assert [entry["selection/groups_kept"] for entry in tiny.history(trainer)] == [0, 0, 0]
        # goes on with the batch as dealt
        assert texts(trainer.batches[0]) == reward.calls[0].prompts

    def test_all_live_needs_no_second_round(self, tmp_path):
        reward = tiny.Remembering(tiny.hashed)
        trainer = tiny.trained(DAPOTrainer, tmp_path, reward, max_steps=2)
        assert len(reward.calls) == 2
        assert [len(batch.rounds) for batch in trainer.batches] == [1, 1]


class TestOutcome:
    def test_overlong_punishment_is_added_once_and_judges_nothing(self, tmp_path):
        # Completions of different lengths in a group get different punishments: judged by them, every group would live
        trainer = tiny.trained(
            DAPOTrainer, tmp_path, tiny.constant, max_steps=1, soft_punish_cache=5, max_refill_rounds=1
        )
        assert trainer.reward_func_names == ["constant", "soft_overlong_punishment_reward"]
        assert trainer.reward_weights.tolist() == [1.0, 1.0]
        (batch,) = trainer.batches
        punished = torch.cat([scored.rewards for scored in batch.rounds])[:, 1].view(-1, 4)
        assert (punished.amax(1) > punished.amin(1)).any()
        assert batch.selection.live == [False] * 4

    def test_overlong_punishment_is_trls(self, tmp_path):
        trainer = tiny.trained(
            DAPOTrainer, tmp_path, tiny.hashed, max_steps=1, soft_punish_cache=5, reward_weights=[0.5]
        )
        (batch,) = trainer.batches
        # L_max 6, cache 5: up to 1 token no punishment, then (1 − n)/5 down to −1 at 6
        lengths = [len(ids) for ids in batch.completions]
        punishment = [(1 - n) / 5 for n in lengths]
        assert len(set(punishment)) > 1
        rewards = [0.5 * r + p for r, p in zip(tiny.hashed(batch.completions), punishment, strict=True)]
        torch.testing.assert_close(batch.output["advantages"], torch.tensor(slow_advantages(rewards)))
        assert trainer.reward_weights.tolist() == [0.5, 1.0]

    def test_a_punishment_of_the_users_is_not_doubled(self, tmp_path):
        own = get_soft_overlong_punishment(6, 2)
        config = {"soft_punish_cache": 5, "max_steps": 1}
        trainer = tiny.trainer(DAPOTrainer, tmp_path, [tiny.hashed, own], **config)
        assert trainer.reward_func_names == ["hashed", "soft_overlong_punishment_reward"]

    def test_callers_arguments_are_left_alone(self, tmp_path):
        funcs, weights = [tiny.hashed], [0.5]
        trainer = tiny.trainer(DAPOTrainer, tmp_path, funcs, soft_punish_cache=5, reward_weights=weights)
        assert (funcs, weights) == ([tiny.hashed], [0.5])
        assert trainer.is_outcome.tolist() == [True, False]

    @pytest.mark.train
    def test_named_outcome(self, tmp_path):
        # `hashed` would make every group live; by `live_for` half of them are
        reward = tiny.Remembering(tiny.LiveFor(HALF), "judge")
        trainer = tiny.trained(
            DAPOTrainer, tmp_path, [tiny.hashed, reward], max_steps=2, seed=3, outcome_reward_funcs=["judge"]
        )
        assert trainer.is_outcome.tolist() == [False, True]
        for step, batch in enumerate(trainer.batches):
            known = by_completion(reward.at_step(step))
            judged = [known[key] for key in zip(texts(batch), map(tuple, batch.completions), strict=True)]
            assert all(len(set(judged[i : i + 4])) > 1 for i in range(0, 16, 4))
            # but the advantage is that of the sum
            total = [a + b for a, b in zip(tiny.hashed(batch.completions), judged, strict=True)]
            torch.testing.assert_close(batch.output["advantages"], torch.tensor(slow_advantages(total)))
        assert any(len(batch.rounds) > 1 for batch in trainer.batches)

    def test_overlong_filtering_masks(self, tmp_path):
        trainer = tiny.trained(DAPOTrainer, tmp_path, tiny.hashed, max_steps=1, mask_truncated_completions=True)
        (batch,) = trainer.batches
        mask = batch.output["completion_mask"]
        completions = [rollout.completion_ids for rollout in batch.rounds[0].rollouts]
        ended = [ids[-1] in ENDS for ids in completions]
        assert 0 < sum(ended) < 16
        assert mask.sum(dim=1).tolist() == [len(ids) * e for ids, e in zip(completions, ended, strict=True)]
        assert batch.output["num_items_in_batch"] == mask.sum()
        assert trainer.counters.trained_tokens == int(mask.sum())
        assert trainer.counters.generated_tokens > int(mask.sum())


@pytest.mark.train
class TestTokenNormalization:
    """Which tokens the token-level loss is divided by."""

    settings = {"max_steps": 2, "updates_per_generation": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.0}

    def windows(self, tmp_path, **settings: Any) -> tuple[Any, list[list[dict]]]:
        trainer = tiny.trained(DAPOTrainer, tmp_path, tiny.hashed, **self.settings, **settings)
        assert len(trainer.batches) == 1  # one generation, two optimizer steps of two micro-batches
        return trainer, [trainer.losses[:2], trainer.losses[2:]]

    @staticmethod
    def by_hand(window: list[dict], tokens: float) -> float:
        # Learning rate 0: every ratio is 1, and the surrogate of a token is its advantage
        total = sum(float((inputs["advantages"].unsqueeze(1) * inputs["completion_mask"]).sum()) for inputs in window)
        return -total / tokens

    @staticmethod
    def tokens(window: list[dict]) -> int:
        return sum(int(inputs["completion_mask"].sum()) for inputs in window)

    def test_mini_batch_divides_by_the_tokens_of_the_step(self, tmp_path):
        _, windows = self.windows(tmp_path, token_normalization="mini_batch")
        for window in windows:
            loss = sum(inputs["loss"] for inputs in window)
            assert loss == pytest.approx(self.by_hand(window, self.tokens(window)), rel=1e-4, abs=1e-6)

    def test_generation_batch_divides_by_the_mean_over_its_steps(self, tmp_path):
        _, windows = self.windows(tmp_path, token_normalization="generation_batch")
        per_step = sum(map(self.tokens, windows)) / 2
        for window in windows:
            loss = sum(inputs["loss"] for inputs in window)
            assert loss == pytest.approx(self.by_hand(window, per_step), rel=1e-4, abs=1e-6)

    def test_they_differ(self, tmp_path):
        _, windows = self.windows(tmp_path, token_normalization="mini_batch")
        assert self.tokens(windows[0]) != self.tokens(windows[1])

    def test_they_agree_with_one_step_a_generation(self, tmp_path):
        weights = []
        for name in ("mini_batch", "generation_batch"):
            trainer = tiny.trained(DAPOTrainer, tmp_path, tiny.hashed, max_steps=2, token_normalization=name)
            weights.append(tiny.weights(trainer.model))
        for name in weights[0]:
            torch.testing.assert_close(weights[0][name], weights[1][name])

    def test_tokens_of_the_environment_do_not_count(self, tmp_path):
        def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
            # The third token of each completion is the environment's
            generator = torch.Generator().manual_seed(len(trainer.batches))
            ids = [torch.randint(4, 24, (4 + i % 3,), generator=generator).tolist() for i in range(len(prompts))]
            return {
                "prompt_ids": [tiny.tokenizer()(prompt)["input_ids"] for prompt in prompts],
                "completion_ids": ids,
                "logprobs": None,
                "env_mask": [[1, 1, 0] + [1] * (len(row) - 3) for row in ids],
            }

        trainer = tiny.trainer(
            tiny.recorded(DAPOTrainer),
            tmp_path,
            tiny.hashed,
            {"rollout_func": rollout},
            **self.settings,
            token_normalization="mini_batch",
        )
        trainer.train()
        for window in (trainer.losses[:2], trainer.losses[2:]):
            written = [inputs["completion_mask"] * inputs["tool_mask"] for inputs in window]
            tokens = sum(int(mask.sum()) for mask in written)
            assert tokens == self.tokens(window) - 16
            total = sum(
                float((inputs["advantages"].unsqueeze(1) * mask).sum())
                for inputs, mask in zip(window, written, strict=True)
            )
            loss = sum(inputs["loss"] for inputs in window)
            assert loss == pytest.approx(-total / tokens, rel=1e-4, abs=1e-6)


class LogsExtra:
    """Logs columns and a number; one column only now and then."""

    def __call__(self, completion_ids: Any, prompts: Any, target: Any, log_extra: Any, log_metric: Any, **_: Any):
        log_extra("ids", [" ".join(map(str, ids)) for ids in completion_ids])
        log_extra("asked", list(prompts))
        log_metric("calls", 1.0)
        return tiny.LiveFor(HALF)(completion_ids=completion_ids, target=target)


@pytest.mark.train
def test_extra_columns_stay_aligned(tmp_path):
    trainer = tiny.trained(DAPOTrainer, tmp_path, LogsExtra(), max_steps=3, seed=3, log_completions=True)
    assert any(len(batch.rounds) > 1 for batch in trainer.batches)
    for step, batch in enumerate(trainer.batches):
        table = pandas.read_parquet(f"{tmp_path}/completions/completions_{step + 1:05d}.parquet")
        assert table["ids"].tolist() == [" ".join(map(str, ids)) for ids in batch.completions]
        assert table["asked"].tolist() == texts(batch) == table["prompt"].tolist()
    assert all(entry["calls"] == 1.0 for entry in tiny.history(trainer))


class TestTrlsFeatures:
    """What TRL's trainer can do still works while prompts are drawn."""

    @pytest.mark.train
    def test_async_rewards(self, tmp_path):
        async def judge(completion_ids: Any, target: Any, **kwargs: Any) -> list[float]:
            return tiny.LiveFor(HALF)(completion_ids=completion_ids, target=target)

        one = tiny.trained(DAPOTrainer, tmp_path, judge, max_steps=2, seed=3)
        two = tiny.trained(DAPOTrainer, tmp_path, tiny.LiveFor(HALF), max_steps=2, seed=3)
        for name, value in tiny.weights(one.model).items():
            assert torch.equal(value, two.model.state_dict()[name])

    @pytest.mark.train
    def test_none_rewards(self, tmp_path):
        def sometimes(completion_ids: list[list[int]], target: list[int], **kwargs: Any) -> list[float | None]:
            # Nothing applies to half of the prompts, and never to a completion that begins with an odd token
            live = tiny.hashed(completion_ids)
            return [
                reward if ids[0] % 2 == 0 and t in HALF else None
                for reward, ids, t in zip(live, completion_ids, target, strict=True)
            ]

        reward = tiny.Remembering(sometimes)
        trainer = tiny.trained(DAPOTrainer, tmp_path, reward, max_steps=3, seed=3)
        nones = 0
        for step, batch in enumerate(trainer.batches):
            known = by_completion(reward.at_step(step))
            values = [known[key] for key in zip(texts(batch), map(tuple, batch.completions), strict=True)]
            advantages = batch.output["advantages"].tolist()
            for start in range(0, 16, 4):
                group = values[start : start + 4]
                applies = [value for value in group if value is not None]
                assert len(set(applies)) > 1
                for value, advantage in zip(group, advantages[start : start + 4], strict=True):
                    nones += value is None
                    expected = (
                        0.0
                        if value is None
                        else (value - statistics.fmean(applies)) / (statistics.stdev(applies) + 1e-4)
                    )
                    assert advantage == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert nones
        logged = tiny.history(trainer)[0]["reward"]
        applies = [value for call in reward.at_step(0) for value in call.rewards if value is not None]
        assert logged == pytest.approx(statistics.fmean(applies))

    @pytest.mark.train
    @pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
    def test_several_rewards(self, tmp_path, aggregation):
        first, second = tiny.Remembering(tiny.LiveFor(HALF), "first"), tiny.Remembering(tiny.low_ids, "second")
        trainer = tiny.trained(
            DAPOTrainer,
            tmp_path,
            [first, second],
            max_steps=2,
            seed=3,
            reward_weights=[2.0, 0.5],
            outcome_reward_funcs=["first"],
            multi_objective_aggregation=aggregation,
        )
        for step, batch in enumerate(trainer.batches):
            keys = list(zip(texts(batch), map(tuple, batch.completions), strict=True))
            rewards = [[by_completion(f.at_step(step))[key] for key in keys] for f in (first, second)]
            if aggregation == "sum_then_normalize":
                expected = slow_advantages([2 * a + 0.5 * b for a, b in zip(*rewards, strict=True)])
            else:
                # GDPO: each function in its group, then the sum over the batch
                total = [2 * a + 0.5 * b for a, b in zip(*map(slow_advantages, rewards), strict=True)]
                spread = statistics.stdev(total) + 1e-4
                expected = [(value - statistics.fmean(total)) / spread for value in total]
            torch.testing.assert_close(batch.output["advantages"], torch.tensor(expected), rtol=1e-4, atol=1e-4)

    @pytest.mark.train
    def test_batch_scaling_is_over_the_selected_rows(self, tmp_path):
        reward = tiny.Remembering(tiny.LiveFor(HALF))
        trainer = tiny.trained(DAPOTrainer, tmp_path, reward, max_steps=2, seed=3, scale_rewards="batch")
        for step, batch in enumerate(trainer.batches):
            known = by_completion(reward.at_step(step))
            values = [known[key] for key in zip(texts(batch), map(tuple, batch.completions), strict=True)]
            spread = statistics.stdev(values) + 1e-4
            means = [statistics.fmean(values[i : i + 4]) for i in range(0, 16, 4)]
            expected = [(value - means[i // 4]) / spread for i, value in enumerate(values)]
            torch.testing.assert_close(batch.output["advantages"], torch.tensor(expected))

    @pytest.mark.train
    def test_conversational_prompts(self, tmp_path):
        reward = tiny.Remembering(tiny.LiveFor(HALF))
        data = tiny.prompts(conversational=True)
        trainer = tiny.trained(DAPOTrainer, tmp_path, reward, {"train_dataset": data}, max_steps=2, seed=3)
        assert any(len(batch.rounds) > 1 for batch in trainer.batches)
        for call in reward.calls:
            assert all(completion[0]["role"] == "assistant" for completion in call.completions)
        for step in range(2):
            asked = [
                call.prompts[i][0]["content"] for call in reward.at_step(step) for i in range(0, len(call.prompts), 4)
            ]
            assert len(set(asked)) == len(asked)

    @pytest.mark.train
    def test_iterable_data_set(self, tmp_path):
        def words():
            yield from tiny.prompts(32)

        reward = tiny.Remembering(tiny.LiveFor(HALF))
        data = IterableDataset.from_generator(words)
        trainer = tiny.trained(DAPOTrainer, tmp_path, reward, {"train_dataset": data}, max_steps=3)
        assert any(len(batch.rounds) > 1 for batch in trainer.batches)
        for step in range(3):
            asked = [call.prompts[i] for call in reward.at_step(step) for i in range(0, len(call.prompts), 4)]
            assert len(set(asked)) == len(asked)

    @pytest.mark.train
    def test_peft(self, tmp_path):
        lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
        trainer = tiny.trained(
            DAPOTrainer, tmp_path, tiny.LiveFor(HALF), {"peft_config": lora}, max_steps=2, seed=3, beta=0.1
        )
        assert any(len(batch.rounds) > 1 for batch in trainer.batches)
        base = tiny.stopping().state_dict()
        state = trainer.model.state_dict()
        assert any(value.abs().sum() > 0 for name, value in state.items() if "lora_B" in name)
        for name, value in base.items():
            key = name.replace("q_proj.", "q_proj.base_layer.").replace("v_proj.", "v_proj.base_layer.")
            if f"base_model.model.{key}" in state:
                assert torch.equal(state[f"base_model.model.{key}"], value)
        assert all("kl" in entry for entry in tiny.history(trainer))

    def test_reward_model_and_its_tokenizer(self, tmp_path):
        # DAPO's punishment is a second reward function, but the processing class is still that of the first
        from transformers import Qwen2Config, Qwen2ForSequenceClassification

        torch.manual_seed(0)
        judge = Qwen2ForSequenceClassification(
            Qwen2Config(
                vocab_size=24,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                pad_token_id=0,
                num_labels=1,
                initializer_range=0.5,
            )
        )
        judge.config._name_or_path = "nobody/judge"
        arguments = {"reward_processing_classes": tiny.tokenizer()}
        trainer = tiny.trained(DAPOTrainer, tmp_path, judge, arguments, max_steps=1, soft_punish_cache=5)
        assert trainer.reward_func_names == ["judge", "soft_overlong_punishment_reward"]
        rewards = trainer.batches[0].rounds[0].rewards
        assert rewards[:, 0].unique().numel() > 1

    @pytest.mark.train
    def test_off_policy_steps(self, tmp_path):
        trainer = tiny.trained(
            DAPOTrainer,
            tmp_path,
            tiny.LiveFor(HALF),
            max_steps=8,
            seed=3,
            updates_per_generation=2,
            num_iterations=2,
        )
        assert len(trainer.batches) == 2
        assert any(len(batch.rounds) > 1 for batch in trainer.batches)
        # 8 steps of 2 micro-batches, and for each generation batch of 32 rows 4 passes for old log-probabilities:
        # as many as without selection
        plain = tiny.trained(
            GRPOTrainer, tmp_path, tiny.hashed, max_steps=8, updates_per_generation=2, num_iterations=2
        )
        assert trainer.forwards == plain.forwards == 16 + 2 * 4
        # The old log-probabilities are of the rows that are trained on
        model = tiny.stopping()
        batch = trainer.batches[0]
        for row in (0, 9, 31):
            ids = batch.prompts[row] + batch.completions[row]
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(batch.prompts[row])
            expected = torch.stack([logps[t - 1, ids[t]] for t in range(start, len(ids))])
            old = batch.output["old_per_token_logps"][row, : len(expected)]
            torch.testing.assert_close(old, expected.detach(), rtol=1e-4, atol=1e-5)

    @pytest.mark.train
    def test_evaluation_selects_nothing(self, tmp_path):
        reward = tiny.Remembering(tiny.LiveFor(HALF))
        data = {"eval_dataset": tiny.prompts(6)}
        settings = {"max_steps": 2, "seed": 3}
        trainer = tiny.trained(
            DAPOTrainer,
            tmp_path,
            reward,
            data,
            **settings,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=12,
        )
        evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
        assert len(evaluations) == 2
        # 6 prompts × 4 in batches of 12, without rounds of refilling
        calls = [call for call in reward.calls if len(call.prompts) == 12][-2:]
        rewards = [value for call in calls for value in call.rewards]
        assert evaluations[-1]["eval_reward"] == pytest.approx(statistics.fmean(rewards))
        assert not any(key.startswith("eval_selection") for entry in evaluations for key in entry)
        assert trainer.counters.generation_rounds == sum(len(batch.rounds) for batch in trainer.batches)

    @pytest.mark.train
    def test_rollout_func(self, tmp_path):
        def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(len(prompts) + 100 * trainer.state.global_step)
            ids = [torch.randint(4, 24, (1 + i % 5,), generator=generator).tolist() for i in range(len(prompts))]
            return {
                "prompt_ids": [tiny.tokenizer()(prompt)["input_ids"] for prompt in prompts],
                "completion_ids": ids,
                "logprobs": [[-token / 100 for token in row] for row in ids],
                "env_mask": [[1] * (len(row) - 1) + [0] for row in ids],
                "score": [float(sum(row)) for row in ids],
                "tag": "same for all",
            }

        seen = []

        def judge(completion_ids: Any, score: list[float], tag: list[str], target: Any, **kwargs: Any) -> list[float]:
            assert score == [float(sum(ids)) for ids in completion_ids]
            assert set(tag) == {"same for all"}
            seen.append(len(score))
            return tiny.LiveFor(HALF)(completion_ids=completion_ids, target=target)

        trainer = tiny.trained(DAPOTrainer, tmp_path, judge, {"rollout_func": rollout}, max_steps=2, seed=3)
        assert len(seen) > 2
        for batch in trainer.batches:
            lengths = [len(ids) for ids in batch.completions]
            written = (batch.output["tool_mask"] * batch.output["completion_mask"]).sum(dim=1)
            assert written.tolist() == [length - 1 for length in lengths]
            assert batch.output["num_items_in_batch"] == written.sum()
            # Sampling log-probabilities stay with their tokens
            sampled = batch.output["sampling_per_token_logps"].tolist()
            for ids, logps in zip(batch.completions, sampled, strict=True):
                assert logps[: len(ids)] == pytest.approx([-token / 100 for token in ids])


@pytest.mark.train
def test_seed_decides_the_run(tmp_path):
    runs = [tiny.trained(DAPOTrainer, tmp_path, tiny.LiveFor(HALF), max_steps=3, seed=seed) for seed in (3, 3, 4)]
    weights = [tiny.weights(run.model) for run in runs]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())


@pytest.mark.train
def test_the_epoch_is_the_main_samplers(tmp_path):
    # 8 prompts, batches of 4: two steps an epoch, however many prompts refilling drew
    reward = tiny.Remembering(tiny.LiveFor({4, 5, 6}))
    trainer = tiny.trained(
        DAPOTrainer, tmp_path, reward, {"train_dataset": tiny.prompts(8)}, max_steps=-1, num_train_epochs=2
    )
    assert trainer.state.global_step == 4
    for epoch in range(2):
        first = [reward.at_step(2 * epoch + step)[0].prompts for step in range(2)]
        assert sorted(first[0][::4] + first[1][::4]) == sorted(tiny.prompts(8)["prompt"])
