"""The engine's own axes through real training: estimators, rollouts without training, and TRL's behaviour kept."""

import math
import statistics
from typing import Any

import pandas
import pytest
import tiny
import torch
import trl
from transformers import TrainerCallback

from trl_ext import DUPOTrainer, GRPOTrainer


def trained(tmp_path: Any, reward: Any, arguments: dict | None = None, **settings: Any) -> Any:
    return tiny.trained(GRPOTrainer, tmp_path, reward, arguments, **settings)


def rewards_at(reward: tiny.Remembering, step: int) -> list[float]:
    (call,) = reward.at_step(step)
    return call.rewards


class TestLeaveOneOut:
    @pytest.mark.train
    @pytest.mark.parametrize("scale", [None, "group", "batch"])
    def test_advantages(self, tmp_path, scale):
        reward = tiny.Remembering(tiny.hashed)
        trainer = trained(tmp_path, reward, advantage_estimator="leave_one_out", scale_rewards=scale, max_steps=2)
        for step, batch in enumerate(trainer.batches):
            rewards = rewards_at(reward, step)
            expected = []
            for i, value in enumerate(rewards):
                group = rewards[i - i % 4 : i - i % 4 + 4]
                deviation = {"group": group, "batch": rewards}.get(scale)
                spread = statistics.stdev(deviation) + 1e-4 if deviation else 1.0
                expected.append((value - (sum(group) - value) / 3) / spread)
            torch.testing.assert_close(batch.output["advantages"], torch.tensor(expected))

    @pytest.mark.train
    def test_logged_advantages_are_those_trained_with(self, tmp_path):
        trainer = trained(
            tmp_path, tiny.hashed, advantage_estimator="leave_one_out", max_steps=2, log_completions=True
        )
        for step, batch in enumerate(trainer.batches):
            table = pandas.read_parquet(f"{tmp_path}/completions/completions_{step + 1:05d}.parquet")
            assert table["advantage"].tolist() == pytest.approx(batch.output["advantages"].tolist())

    @pytest.mark.train
    def test_none_rewards(self, tmp_path):
        def sometimes(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
            return [
                r if ids[0] % 2 else None for r, ids in zip(tiny.hashed(completion_ids), completion_ids, strict=True)
            ]

        reward = tiny.Remembering(sometimes)
        trainer = trained(tmp_path, reward, advantage_estimator="leave_one_out", max_steps=2)
        for step, batch in enumerate(trainer.batches):
            rewards = rewards_at(reward, step)
            assert None in rewards
            expected = []
            for i, value in enumerate(rewards):
                start = i - i % 4
                others = [rewards[j] for j in range(start, start + 4) if j != i and rewards[j] is not None]
                expected.append(value - statistics.fmean(others) if value is not None and others else 0.0)
            torch.testing.assert_close(batch.output["advantages"], torch.tensor(expected))

    def test_normalised_objectives(self, tmp_path):
        first, second = tiny.Remembering(tiny.hashed, "first"), tiny.Remembering(tiny.low_ids, "second")
        trainer = trained(
            tmp_path,
            [first, second],
            advantage_estimator="leave_one_out",
            multi_objective_aggregation="normalize_then_sum",
            reward_weights=[1.0, 3.0],
            max_steps=1,
        )
        columns = []
        for reward in (first, second):
            groups = [rewards_at(reward, 0)[i : i + 4] for i in range(0, 16, 4)]
            columns.append([(v - statistics.fmean(g)) / (statistics.stdev(g) + 1e-4) for g in groups for v in g])
        total = [a + 3 * b for a, b in zip(*columns, strict=True)]
        # centred already: leaving one out is G/(G − 1) times that
        expected = torch.tensor(total) * 4 / 3
        torch.testing.assert_close(trainer.batches[0].output["advantages"], expected, rtol=1e-4, atol=1e-5)


class TestReinforce:
    @pytest.mark.train
    def test_without_a_baseline(self, tmp_path):
        reward = tiny.Remembering(tiny.hashed)
        trainer = trained(tmp_path, reward, advantage_estimator="reinforce", max_steps=2)
        for step, batch in enumerate(trainer.batches):
            torch.testing.assert_close(batch.output["advantages"], torch.tensor(rewards_at(reward, step)))

    @pytest.mark.train
    def test_running_baseline(self, tmp_path):
        reward = tiny.Remembering(tiny.hashed)
        settings = {"advantage_estimator": "reinforce", "reinforce_baseline_momentum": 0.75}
        trainer = trained(tmp_path, reward, **settings, max_steps=4)
        baseline = None
        for step, batch in enumerate(trainer.batches):
            rewards = rewards_at(reward, step)
            # What the batch itself got is no part of its baseline
            expected = [value - (baseline or 0.0) for value in rewards]
            torch.testing.assert_close(batch.output["advantages"], torch.tensor(expected))
            mean = statistics.fmean(rewards)
            baseline = mean if baseline is None else 0.75 * baseline + 0.25 * mean
        assert trainer._baseline == pytest.approx(baseline)

    @pytest.mark.train
    def test_evaluation_does_not_move_the_baseline(self, tmp_path):
        settings = {
            "advantage_estimator": "reinforce",
            "reinforce_baseline_momentum": 0.5,
            "max_steps": 3,
            "per_device_eval_batch_size": 8,
        }
        plain = trained(tmp_path, tiny.hashed, **settings)
        data = {"eval_dataset": tiny.prompts(4)}
        baselines = []

        class Watch(TrainerCallback):
            def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
                baselines.append(trainer._baseline)

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                baselines.append(trainer._baseline)

        trainer = tiny.trainer(
            GRPOTrainer,
            tmp_path,
            tiny.hashed,
            {**data, "callbacks": [Watch()]},
            **settings,
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train()
        assert baselines[::2] == baselines[1::2]
        assert plain._baseline is not None

    def test_gradient_is_the_rewards(self, tmp_path):
        # No baseline, one update: ∇ = −Σ R ∇logp, here with TRL's "dapo" normalisation by all tokens
        trainer = trained(
            tmp_path,
            tiny.hashed,
            advantage_estimator="reinforce",
            loss_type="dapo",
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=1e9,
            max_steps=1,
        )
        (batch,) = trainer.batches
        model, loss = tiny.stopping(), 0.0
        tokens = sum(map(len, batch.completions))
        for prompt, ids, value in zip(batch.prompts, batch.completions, tiny.hashed(batch.completions), strict=True):
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            loss = loss - value * logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).sum() / tokens
        loss.backward()
        for (name, parameter), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected - 0.1 * expected.grad, msg=name)


@pytest.mark.train
class TestNeutral:
    def test_a_trl_config_is_enough(self, tmp_path):
        # Change the import, keep the rest
        runs = []
        for trainer_class in (trl.GRPOTrainer, GRPOTrainer):
            trainer = trainer_class(
                model=tiny.stopping(),
                reward_funcs=tiny.hashed,
                args=trl.GRPOConfig(**tiny.cpu_settings(tmp_path, max_steps=3, num_iterations=2)),
                train_dataset=tiny.prompts(),
                processing_class=tiny.tokenizer(),
            )
            trainer.train()
            runs.append(trainer)
        # Micro-batches fit their rows: TRL's weights up to rounding, and its metrics
        torch.testing.assert_close(tiny.weights(runs[1].model), tiny.weights(runs[0].model), rtol=1e-4, atol=1e-5)
        for mine, other in zip(tiny.history(runs[1]), tiny.history(runs[0]), strict=True):
            only_ours = {"compute/saved", "computed/entropy"}
            only_ours |= {f"compute/saved_by_{what}" for what in ("dead_rows", "shared_prompts", "padding")}
            only_ours |= {"computed/step/clip_ratio/low_min", "step/clip_ratio/high_max"}
            assert mine.keys() - other.keys() <= only_ours and "computed/entropy" in mine
            for key in {"loss", "reward", "completions/mean_length", "grad_norm"} & other.keys():
                assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key

    def test_rewards_are_asked_for_once(self, tmp_path):
        reward = tiny.Remembering(tiny.hashed)
        trained(tmp_path, reward, max_steps=3)
        assert len(reward.calls) == 3

    @pytest.mark.parametrize("trainer_class", [GRPOTrainer, DUPOTrainer])
    def test_rewards_are_asked_for_once_when_selecting(self, tmp_path, trainer_class):
        reward = tiny.Remembering(tiny.first_token_even)
        settings = {"num_generations": 4, "max_steps": 3, "rollout_selection": "duplicate"}
        tiny.trainer(trainer_class, tmp_path, reward, **settings).train()
        assert len(reward.calls) == 3


class RollsOut(TrainerCallback):
    """Asks for rollouts in the middle of training."""

    def __init__(self, **arguments: Any) -> None:
        self.trainer: Any = None
        self.arguments = arguments
        self.results: list[Any] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        rows = [tiny.prompts()[i] for i in range(3)]
        self.results.append(self.trainer.roll_out(rows, num_generations=5, **self.arguments))


class TestRollOut:
    def test_shapes_and_rewards(self, tmp_path):
        reward = tiny.Remembering(tiny.hashed)
        trainer = tiny.trainer(DUPOTrainer, tmp_path, [reward, tiny.low_ids], num_generations=4)
        rows = [tiny.prompts()[i] for i in range(3)]
        scored = trainer.roll_out(rows, num_generations=5, seed=1)
        assert scored.rewards.shape == (3, 5, 2)
        assert scored.reward_func_names == ["remembering", "low_ids"]
        assert len(scored.rollouts) == 15
        ids = [rollout.completion_ids for rollout in scored.rollouts]
        torch.testing.assert_close(scored.rewards[..., 0].flatten(), torch.tensor(tiny.hashed(ids)))
        assert [rollout.row["prompt"] for rollout in scored.rollouts[::5]] == [row["prompt"] for row in rows]
        assert scored.generated_tokens == sum(map(len, ids))
        assert rows == [tiny.prompts()[i] for i in range(3)]

    def test_seed_decides(self, tmp_path):
        trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed)
        rows = [tiny.prompts()[i] for i in range(3)]
        rewards = [trainer.roll_out(rows, 4, seed=seed).rewards for seed in (1, 1, 2)]
        assert torch.equal(rewards[0], rewards[1])
        assert not torch.equal(rewards[0], rewards[2])

    @pytest.mark.train
    @pytest.mark.parametrize("selection", ["all", "refill"])
    def test_leaves_no_trace_in_training(self, tmp_path, selection):
        settings = {"max_steps": 4, "rollout_selection": selection, "updates_per_generation": 2, "logging_steps": 2}
        judge = tiny.LiveFor(set(range(4, 24, 2)))

        def reward(completion_ids: list[list[int]], log_metric: Any, **kwargs: Any) -> list[float]:
            log_metric("first_id", statistics.fmean(ids[0] for ids in completion_ids))
            return judge(completion_ids, **kwargs)

        plain = trained(tmp_path, reward, **settings)
        assert ["first_id" in entry for entry in tiny.history(plain)] == [True, True]  # one for each batch
        callback = RollsOut(seed=3)
        trainer = tiny.trainer(GRPOTrainer, tmp_path, reward, {"callbacks": [callback]}, **settings)
        callback.trainer = trainer
        trainer.train()
        assert len(callback.results) == 4
        assert all(torch.equal(v, trainer.model.state_dict()[n]) for n, v in plain.model.state_dict().items())
        assert tiny.history(plain) == tiny.history(trainer)
        assert plain.counters == trainer.counters

    def test_keeps_the_mode(self, tmp_path):
        trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed)
        for training in (True, False):
            trainer.model.train(training)
            trainer.roll_out([tiny.prompts()[0]], 4)
            assert trainer.model.training is training

    def test_a_fault_is_named_and_leaves_the_trainer_usable(self, tmp_path):
        def fails(completions: list[str], **kwargs: Any) -> list[float]:
            if len(completions) == 3:
                raise RuntimeError("three")
            return [0.0] * len(completions)

        trainer = tiny.trainer(GRPOTrainer, tmp_path, fails)
        with pytest.raises(RuntimeError, match="`fails` raised RuntimeError: three"):
            trainer.roll_out([tiny.prompts()[0]], 3)
        assert trainer.roll_out([tiny.prompts()[0]], 4).rewards.tolist() == [[[0.0]] * 4]


class TestCard:
    def test_sections_follow_trls_card(self, tmp_path):
        trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed)
        trainer.card.sections.append(lambda: "## What it cost\n\nNothing.")
        trainer.create_model_card(model_name="tiny")
        card = (tmp_path / "README.md").read_text()
        assert card.endswith("## What it cost\n\nNothing.\n")
        assert "tiny" in card


@pytest.mark.train
def test_loss_of_a_batch_with_one_dead_group_is_finite(tmp_path):
    reward = tiny.LiveFor({4})
    trainer = trained(
        tmp_path, reward, rollout_selection="duplicate", advantage_estimator="leave_one_out", max_steps=3
    )
    assert all(math.isfinite(entry["loss"]) for entry in tiny.history(trainer))
