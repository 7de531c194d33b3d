"""
The numbers of an evaluation are those of its data set, whatever batches it is walked in: TRL's numbers for one batch.
"""

import math
import statistics
from pathlib import Path

import pandas
import pytest
import tiny
import trl
from datasets import Dataset
from distributed.dpo_worker import pairs
from distributed.evaluation_worker import PAIRS, PROMPTS, by_place, dpo, grpo, numbers
from transformers import EarlyStoppingCallback

from trl_ext import DPOConfig, DPOTrainer, GRPOTrainer, PPOTrainer
from trl_ext.run.supervised import RewardTrainer


class TRLsTrainer(trl.GRPOTrainer):
    """TRL's trainer, made as tests make ours."""

    class config_class(trl.GRPOConfig):
        def __init__(self, *args, soft_punish_cache=0, updates_per_generation=1, **kwargs):
            super().__init__(*args, **kwargs)


# Metrics of TRL's that are the same whatever the batches are
UNCHANGED = {"eval_num_tokens", "epoch"}


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "scale_rewards": "batch"},
        {"loss_type": "bnpo", "multi_objective_aggregation": "normalize_then_sum"},
        {"loss_type": "vespo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "reward_weights": [0.5, 2.0]},
    ],
)
def test_batches_of_any_size_measure_what_trl_measures_in_one(tmp_path, settings):
    settings = {"num_generations_eval": 2, **settings}
    whole = numbers(grpo(TRLsTrainer, tmp_path, per_device_eval_batch_size=2 * PROMPTS, **settings).evaluate())
    by_batch = grpo(GRPOTrainer, tmp_path, per_device_eval_batch_size=4, **settings).evaluate()
    trls = grpo(TRLsTrainer, tmp_path, per_device_eval_batch_size=4, **settings).evaluate()
    # What is taken over the batch, and not over groups, has no one value
    of_batch = {"eval_frac_reward_zero_std", "eval_loss"} if "vespo" not in settings.values() else set()
    depends = "scale_rewards" in settings or "multi_objective_aggregation" in settings
    compared = whole.keys() - (of_batch if depends else set())
    assert {key: by_batch[key] for key in compared} == pytest.approx({key: whole[key] for key in compared}, rel=1e-5)
    differs = {key for key in compared if trls[key] != pytest.approx(whole[key], rel=1e-5)}
    assert {"eval_reward", "eval_completions/mean_length", "eval_entropy"} <= differs


def test_a_short_last_batch_weighs_as_many_rows_as_it_has(tmp_path):
    """Three rows are right and one is wrong; the wrong one is alone in the second batch."""

    def right(prompts, **kwargs):
        return [float(prompt != rows[3]) for prompt in prompts]

    rows = tiny.prompts(4)["prompt"]
    arguments = {"eval_dataset": Dataset.from_dict({"prompt": rows})}
    settings = {"num_generations_eval": 1, "per_device_eval_batch_size": 3}
    for trainer_class in (GRPOTrainer, PPOTrainer):
        metrics = tiny.trainer(trainer_class, tmp_path, right, arguments, **settings).evaluate()
        assert metrics["eval_reward"] == metrics["eval_rewards/right/mean"] == 0.75
        if trainer_class is PPOTrainer:
            assert metrics["eval_objective/scores"] == pytest.approx(0.75)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_accuracy_of_pairs_is_a_mean_over_pairs(tmp_path, batch_size):
    whole = numbers(dpo(trl.DPOTrainer, trl.DPOConfig, tmp_path, PAIRS).evaluate())
    ours = numbers(dpo(DPOTrainer, DPOConfig, tmp_path, batch_size).evaluate())
    assert ours == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert (ours["eval_rewards/accuracies"] * PAIRS) % 1 == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_accuracy_of_a_reward_model_is_a_mean_over_pairs(tmp_path, batch_size):
    def evaluated(trainer_class, size):
        config = trl.RewardConfig(**tiny.pair_settings(tmp_path, per_device_eval_batch_size=size))
        given = {"train_dataset": pairs(4), "eval_dataset": pairs(PAIRS), "processing_class": tiny.tokenizer()}
        return numbers(trainer_class(tiny.classifier(), args=config, **given).evaluate())

    ours, whole = evaluated(RewardTrainer, batch_size), evaluated(trl.RewardTrainer, PAIRS)
    assert ours == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert {"eval_accuracy", "eval_loss", "eval_margin", "eval_min_reward"} <= ours.keys()


def test_several_sets_keep_their_own_numbers(tmp_path):
    sets = {"easy": tiny.prompts(3), "hard": tiny.prompts(8).select(range(3, 8))}
    settings = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}
    alone = {
        name: grpo(GRPOTrainer, tmp_path, {"eval_dataset": rows}, **settings).evaluate()["eval_reward"]
        for name, rows in sets.items()
    }
    trainer = grpo(GRPOTrainer, tmp_path, {"eval_dataset": sets}, **settings)
    metrics = trainer.evaluate()
    assert {name: metrics[f"eval_{name}_reward"] for name in sets} == alone and alone["easy"] != alone["hard"]
    assert "eval_reward" not in metrics
    logged = [entry for entry in trainer.state.log_history if any(key.endswith("_reward") for key in entry)]
    assert [sorted(key for key in entry if key.endswith("_reward")) for entry in logged] == [
        ["eval_easy_reward"],
        ["eval_hard_reward"],
    ]
    of_pairs = dpo(DPOTrainer, DPOConfig, tmp_path, 2, {"first": pairs(5), "all": pairs(9)}).evaluate()
    assert of_pairs["eval_first_rewards/chosen"] != of_pairs["eval_all_rewards/chosen"]
    assert "eval_rewards/chosen" not in of_pairs
    assert trainer.evaluate(sets["hard"], metric_key_prefix="test")["test_reward"] == alone["hard"]


class FailsAt:
    """A reward function that fails in one of its calls."""

    __name__ = "fails_at"

    def __init__(self, call):
        self.calls, self.call = 0, call

    def __call__(self, completion_ids, log_metric, log_extra, **kwargs):
        self.calls += 1
        log_metric("longest", 100.0 if self.calls == self.call else 1.0)
        log_extra("call", [self.calls] * len(completion_ids))
        if self.calls == self.call:
            raise KeyError("no answer")
        return [float(self.calls)] * len(completion_ids)


def test_an_evaluation_knows_nothing_of_one_that_failed(tmp_path):
    settings = {"num_generations_eval": 1, "per_device_eval_batch_size": 2}
    arguments = {"eval_dataset": tiny.prompts(4), "rollout_func": by_place}
    trainer = tiny.trainer(GRPOTrainer, tmp_path, FailsAt(2), arguments, **settings)
    with pytest.raises(Exception, match="fails_at"):
        trainer.evaluate()
    calls = trainer.reward_funcs[0].func
    calls.calls = 10
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == 11.5 and metrics["eval_longest"] == 1.0
    # What `predict` leaves is not there either
    trainer.predict(trainer.eval_dataset)
    calls.calls = 20
    assert trainer.evaluate()["eval_reward"] == 21.5
    assert not trainer._metrics["eval"]


def test_the_tables_of_training_and_of_evaluations_lie_side_by_side(tmp_path):
    sets = {"easy": tiny.prompts(2), "hard": tiny.prompts(5).select(range(2, 5))}
    trainer = tiny.trainer(
        GRPOTrainer,
        tmp_path,
        tiny.hashed,
        {"eval_dataset": sets},
        **{"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "log_completions": True},
        **{"num_generations_eval": 1, "per_device_eval_batch_size": 4},
    )
    trainer.train()
    tables = {path.name: len(pandas.read_parquet(path)) for path in Path(tmp_path, "completions").iterdir()}
    assert tables == {
        "completions_00001.parquet": 16,
        "eval_easy_completions_00001.parquet": 2,
        "eval_hard_completions_00001.parquet": 3,
    }
    assert len(trainer._logs["prompt"]) == 16  # those of training


@pytest.mark.train
def test_the_best_model_and_early_stopping_go_by_the_mean_of_the_set(tmp_path):
    """The mean of the batches is best at the end, the mean of the rows in the first step."""
    means = iter([(1.0, 0.0), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)])  # of the full batch and of the row after it

    def by_batch(completion_ids, trainer_state, **kwargs):
        if trainer.model.training:
            return tiny.hashed(completion_ids)
        if len(completion_ids) == 3:
            by_batch.last = next(means)
        return [by_batch.last[len(completion_ids) == 1]] * len(completion_ids)

    trainer = tiny.trainer(
        GRPOTrainer,
        tmp_path,
        by_batch,
        {"eval_dataset": tiny.prompts(4), "callbacks": [EarlyStoppingCallback(2)]},
        **{"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "save_steps": 1},
        **{"metric_for_best_model": "eval_reward", "greater_is_better": True, "load_best_model_at_end": True},
        **{"num_generations_eval": 1, "per_device_eval_batch_size": 3},
    )
    trainer.train()
    logged = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert logged == [0.75, 0.25, 0.25]
    assert trainer.state.best_metric == 0.75 and trainer.state.best_global_step == 1


def test_a_stream_is_weighed_by_its_rows(tmp_path):
    stream = tiny.prompts(PROMPTS).to_iterable_dataset()
    settings = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}
    trainer = grpo(GRPOTrainer, tmp_path, {"eval_dataset": stream}, **settings)
    seen = tiny.Remembering(tiny.hashed)
    trainer.reward_funcs[0].func = seen
    metrics = trainer.evaluate()
    rewards = [reward for call in seen.calls for reward in call.rewards]
    assert len(rewards) == 2 * PROMPTS
    assert metrics["eval_rewards/hashed/mean"] == pytest.approx(statistics.fmean(rewards))
    assert math.isfinite(metrics["eval_loss"])
