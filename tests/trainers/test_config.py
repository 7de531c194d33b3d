"""Defaults, refusals before anything is loaded, and configurations that were written for TRL."""

import json
from dataclasses import dataclass, fields
from typing import Any

import pytest
import tiny
import trl
import yaml
from datasets import Dataset, IterableDataset
from trl import TrlParser
from trl.rewards import get_soft_overlong_punishment

import trl_ext
from trl_ext import (
    DAPOConfig,
    DAPOTrainer,
    DUPOConfig,
    DUPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    GSPOConfig,
    GSPOTrainer,
)


CONFIGS = [GRPOConfig, DAPOConfig, DUPOConfig, GSPOConfig]
TRAINERS = [GRPOTrainer, DAPOTrainer, DUPOTrainer, GSPOTrainer]

# Nothing by this name is on disk and tests are offline: a load that is tried ends in an OSError
NOWHERE = "does/not-exist"


def settings(**changed: Any) -> dict[str, Any]:
    return {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none", **changed}


def small(config_class: type[GRPOConfig], **changed: Any) -> GRPOConfig:
    """Batches of 4 prompts × 4 completions."""
    return config_class(**tiny.cpu_settings("out", updates_per_generation=1, soft_punish_cache=0, **changed))


def comparable(config: trl.GRPOConfig) -> list[str]:
    """Names of arguments; accelerate's own object has no equality."""
    return [f.name for f in fields(config) if f.name != "accelerator_config"]


def assert_says(error: pytest.ExceptionInfo, *parts: str) -> None:
    for part in parts:
        assert part in str(error.value)


# Defaults


def test_dapo_defaults_are_the_papers():
    config = DAPOConfig(**settings())  # 2503.14476, section 4.1 and table 1
    assert (config.epsilon, config.epsilon_high) == (0.2, 0.28)
    assert config.beta == 0.0
    assert config.loss_type == "dapo"
    assert config.token_normalization == "mini_batch"
    assert config.rollout_selection == "refill"
    assert (config.refill_draws, config.similar_prompts_columns) == ("blind", None)
    assert config.num_generations == 16
    assert config.learning_rate == 1e-6
    assert (config.warmup_steps, config.lr_scheduler_type) == (20, "constant_with_warmup")
    # 16,384 expected tokens and 4,096 of soft punishment
    assert (config.max_completion_length, config.soft_punish_cache) == (20480, 4096)
    assert config.steps_per_generation == 16 * config.gradient_accumulation_steps
    assert config.advantage_estimator == "group"
    assert config.scale_rewards == "group"
    assert config.importance_sampling_level == "token"
    assert config.num_iterations == 1
    assert config.temperature == 1.0


def test_dapo_punishment_keeps_its_proportion():
    config = DAPOConfig(**settings(max_completion_length=1000))
    assert config.soft_punish_cache == 200
    assert DAPOConfig(**settings(max_completion_length=1000, soft_punish_cache=0)).soft_punish_cache == 0


def test_dupo_defaults_are_the_papers():
    config = DUPOConfig(**settings())  # 2507.02592, section 4.2 and appendix
    assert config.rollout_selection == "duplicate"
    assert config.num_generations == 8
    assert config.temperature == 1.0
    assert config.learning_rate == 1e-6
    assert (config.epsilon, config.epsilon_high) == (0.2, 0.28)
    assert config.loss_type == "dapo"
    assert config.token_normalization == "mini_batch"
    assert config.beta == 0.0
    # batches of 128 in mini-batches of 32
    assert config.steps_per_generation == 4 * config.gradient_accumulation_steps
    assert config.soft_punish_cache == 0


def test_gspo_defaults_are_the_papers():
    config = GSPOConfig(**settings())  # 2507.18071, eq. 5 and section 5.1
    assert config.importance_sampling_level == "sequence"
    assert (config.epsilon, config.epsilon_high) == (3e-4, 4e-4)
    assert config.loss_type == "grpo"  # a mean over sequences
    assert config.beta == 0.0
    assert config.steps_per_generation == 4 * config.gradient_accumulation_steps
    assert config.rollout_selection == "all"
    assert config.advantage_estimator == "group"


def test_grpo_defaults_are_trls():
    ours, theirs = GRPOConfig(**settings()), trl.GRPOConfig(**settings())
    for name in comparable(theirs):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.is_neutral


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_argument_of_ours_has_a_help_text(config_class):
    own = config_class.__annotations__.keys() - {"_has_critic", "_updates_per_generation", "_sizes"}
    for name in own:
        assert config_class.__dataclass_fields__[name].metadata.get("help"), name


@pytest.mark.parametrize(
    ("changed", "neutral"),
    [
        ({}, True),
        ({"importance_sampling_level": "sequence", "epsilon": 3e-4}, True),
        ({"rollout_selection": "refill"}, False),
        ({"rollout_selection": "duplicate"}, False),
        ({"advantage_estimator": "leave_one_out"}, False),
        ({"importance_sampling_level": "sequence_token", "epsilon": 3e-4}, False),
    ],
)
def test_is_neutral(changed, neutral):
    assert GRPOConfig(**settings(**changed)).is_neutral is neutral


def test_values_that_depend_on_others():
    assert GRPOConfig(**settings()).scale_rewards == "group"
    assert GRPOConfig(**settings(advantage_estimator="leave_one_out")).scale_rewards == "none"
    assert GRPOConfig(**settings(advantage_estimator="leave_one_out", scale_rewards="batch")).scale_rewards == "batch"
    assert GRPOConfig(**settings(scale_rewards=False)).scale_rewards == "none"  # TRL's older spelling
    assert GRPOConfig(**settings()).use_bias_correction_kl is True
    assert GSPOConfig(**settings(importance_sampling_level="sequence_token")).use_bias_correction_kl is False
    config = GRPOConfig(**settings(updates_per_generation=3, gradient_accumulation_steps=4))
    assert config.steps_per_generation == 12
    assert config.generation_batch_size == 12 * config.per_device_train_batch_size
    # A size that the user gives stands above the method's default
    assert DAPOConfig(**settings(steps_per_generation=6)).steps_per_generation == 6
    assert DAPOConfig(**settings(generation_batch_size=64)).generation_batch_size == 64


# Refusals by the configuration


@pytest.mark.parametrize(
    ("config_class", "changed", "said"),
    [
        (GRPOConfig, {"rollout_selection": "dynamic"}, ["rollout_selection='dynamic'", "'refill'", "'duplicate'"]),
        (GRPOConfig, {"advantage_estimator": "rloo"}, ["advantage_estimator='rloo'", "'leave_one_out'"]),
        (GRPOConfig, {"importance_sampling_level": "word"}, ["importance_sampling_level='word'", "'sequence_token'"]),
        (GRPOConfig, {"token_normalization": "none"}, ["token_normalization='none'", "'mini_batch'"]),
        (
            GRPOConfig,
            {"reinforce_baseline_momentum": 0.9},
            ["reinforce_baseline_momentum=0.9", "advantage_estimator='group'", "Set advantage_estimator='reinforce'"],
        ),
        (
            GRPOConfig,
            {"advantage_estimator": "reinforce", "reinforce_baseline_momentum": 1.0},
            ["reinforce_baseline_momentum=1.0", "[0, 1)"],
        ),
        (
            GRPOConfig,
            {"advantage_estimator": "reinforce", "reinforce_baseline_momentum": -0.1},
            ["reinforce_baseline_momentum=-0.1", "[0, 1)"],
        ),
        (DAPOConfig, {"max_refill_rounds": 0}, ["max_refill_rounds=0", "at least 1", "'duplicate'"]),
        (DAPOConfig, {"refill_draws": "clever"}, ["refill_draws='clever'", "'blind'", "'informed'"]),
        (
            GRPOConfig,
            {"refill_draws": "informed"},
            ["refill_draws='informed'", "rollout_selection='all'", "Set rollout_selection='refill'"],
        ),
        (DUPOConfig, {"refill_draws": "informed"}, ["refill_draws='informed'", "rollout_selection='duplicate'"]),
        (
            DAPOConfig,
            {"similar_prompts_columns": ["level"]},
            ["similar_prompts_columns=['level']", "refill_draws='blind'", "Set refill_draws='informed'"],
        ),
        (DAPOConfig, {"prompt_features": "none"}, ["prompt_features='none'", "Set refill_draws='informed'"]),
        (DAPOConfig, {"refill_value": "signal"}, ["refill_value='signal'", "Set refill_draws='informed'"]),
        (DAPOConfig, {"refill_draws": "informed", "refill_value": "long"}, ["'long'", "'live'", "'signal'"]),
        (DAPOConfig, {"refill_draws": "informed", "prompt_features": "words"}, ["'words'", "'hidden_states'"]),
        (
            DAPOConfig,
            {"refill_draws": "informed", "refill_exploration": 1.5},
            ["refill_exploration=1.5", "[0, 1]"],
        ),
        (
            DAPOConfig,
            {"refill_draws": "informed", "refill_exploration": -0.1},
            ["refill_exploration=-0.1", "[0, 1]"],
        ),
        # GSPO clips with a token ratio, and the reverse
        (
            GRPOConfig,
            {"epsilon": 3e-4, "epsilon_high": 4e-4},
            ["epsilon=0.0003", "importance_sampling_level='token'", "epsilon=0.2"],
        ),
        (GSPOConfig, {"importance_sampling_level": "token"}, ["epsilon=0.0003", "importance_sampling_level='token'"]),
        (GSPOConfig, {"epsilon": 0.2, "epsilon_high": None}, ["epsilon=0.2", "'sequence'", "epsilon=3e-4"]),
        (GSPOConfig, {"epsilon_high": 0.28}, ["epsilon_high=0.28", "'sequence'", "epsilon_high=4e-4"]),
        (
            GRPOConfig,
            {"importance_sampling_level": "sequence", "epsilon": 0.2},
            ["epsilon=0.2", "importance_sampling_level='sequence'", "epsilon=3e-4"],
        ),
        (
            DAPOConfig,
            {"importance_sampling_level": "sequence_token", "epsilon_high": 0.3},
            ["epsilon_high=0.3", "importance_sampling_level='sequence_token'", "epsilon=3e-4"],
        ),
        # What makes GSPO-token inexact
        (
            GSPOConfig,
            {"importance_sampling_level": "sequence_token", "use_bias_correction_kl": True},
            ["use_bias_correction_kl=True", "Set use_bias_correction_kl=False", "'sequence'"],
        ),
        (
            GSPOConfig,
            {"importance_sampling_level": "sequence_token", "top_entropy_quantile": 0.2},
            ["top_entropy_quantile=0.2", "Set top_entropy_quantile=1.0", "'sequence'"],
        ),
        (
            GSPOConfig,
            {"importance_sampling_level": "sequence_token", "loss_type": "vespo"},
            ["loss_type='vespo'", "'grpo'"],
        ),
        (
            DAPOConfig,
            {"max_completion_length": 100, "soft_punish_cache": 101},
            ["soft_punish_cache=101", "max_completion_length=100"],
        ),
        (DAPOConfig, {"soft_punish_cache": -1}, ["soft_punish_cache=-1", "0 (no punishment)"]),
        (
            GRPOConfig,
            {"updates_per_generation": 2, "steps_per_generation": 4},
            ["updates_per_generation=2", "steps_per_generation", "Set one of them"],
        ),
        (
            GRPOConfig,
            {"updates_per_generation": 2, "generation_batch_size": 64},
            ["updates_per_generation=2", "generation_batch_size", "Set one of them"],
        ),
        (GRPOConfig, {"updates_per_generation": 0}, ["updates_per_generation=0", "at least 1"]),
        (
            GRPOConfig,
            {"advantage_estimator": "reinforce", "scale_rewards": "group"},
            ["scale_rewards='group'", "advantage_estimator='reinforce'", "'batch'"],
        ),
        (
            DAPOConfig,
            {"loss_type": "grpo", "token_normalization": "mini_batch"},
            ["token_normalization='mini_batch'", "loss_type='grpo'", "'generation_batch'"],
        ),
        (
            DAPOConfig,
            {
                "steps_per_generation": 3,
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 16,
                "token_normalization": "mini_batch",
            },
            ["steps_per_generation=3", "gradient_accumulation_steps=2", "token_normalization='generation_batch'"],
        ),
        # Batches that don't hold whole groups
        (
            GRPOConfig,
            {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "num_generations": 4},
            ["generation_batch_size (6)", "num_generations (4)", "per_device_train_batch_size", "multiple"],
        ),
        (
            DAPOConfig,
            {"per_device_train_batch_size": 1, "updates_per_generation": 10},
            ["(10)", "num_generations (16)", "steps_per_generation"],
        ),
    ],
)
def test_refused_by_the_configuration(config_class, changed, said):
    with pytest.raises(ValueError) as error:
        config_class(**settings(**changed))
    assert_says(error, *said)


@pytest.mark.parametrize("config_class", [GRPOConfig, DAPOConfig, DUPOConfig])
@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_a_clip_range_that_was_left_alone_with_a_sequence_ratio_only_warns(config_class, level, caplog):
    # A script written for TRL that sets the level alone has to run as it does there, and axes combine freely
    config = config_class(**settings(importance_sampling_level=level, per_device_train_batch_size=16))
    assert config.epsilon == 0.2 and config.importance_sampling_level == level
    assert "almost no sequence would be clipped" in caplog.text
    adopted = config_class.adopt(trl.GRPOConfig(**settings(per_device_train_batch_size=16)))
    assert adopted.importance_sampling_level == "token"


# Refusals by the trainer, all before a model is loaded


def take_away(texts: list[str]) -> IterableDataset:
    """An iterable data set that can be read only once."""
    left = [{"prompt": text} for text in texts]

    def take():
        while left:
            yield left.pop(0)

    return IterableDataset.from_generator(take)


class Board:
    """An environment that owns the data."""

    def reset(self, **kwargs: Any) -> str:
        return "w1"

    def look(self) -> str:
        """Look."""
        return "w2"

    def get_reward(self) -> float:
        return 0.0


def words_without_prompt():
    yield from ({"question": "w1"} for _ in range(32))


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (None, ["train_dataset=None", "`prompt`"]),
        (Dataset.from_dict({"question": ["a"] * 32}), ["no column `prompt`", "question", "Rename"]),
        (
            Dataset.from_dict({"question": ["a"] * 32}).to_iterable_dataset(),
            ["no column `prompt`", "question", "Rename"],
        ),
        (tiny.prompts(3), ["3 prompts", "the 4 of one generation batch", "per_device_train_batch_size"]),
        (tiny.prompts(0), ["0 prompts", "the 4 of one generation batch"]),
    ],
    ids=["none", "no prompt", "no prompt, iterable", "too few", "empty"],
)
def test_refused_data(trainer_class, dataset, said):
    with pytest.raises(ValueError) as error:
        trainer_class(
            model=NOWHERE,
            reward_funcs=tiny.constant,
            args=small(trainer_class.config_class),
            train_dataset=dataset,
        )
    assert_says(error, *said)


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DAPOTrainer])
def test_refused_data_whose_columns_are_only_seen_by_reading(trainer_class):
    dataset = IterableDataset.from_generator(words_without_prompt)
    assert dataset.column_names is None
    with pytest.raises(ValueError) as error:
        trainer_class(
            model=NOWHERE, reward_funcs=tiny.constant, args=small(trainer_class.config_class), train_dataset=dataset
        )
    assert_says(error, "`prompt`", "question")


def test_refill_with_an_iterable_data_set_that_can_be_read_once():
    with pytest.raises(ValueError) as error:
        DAPOTrainer(
            model=NOWHERE,
            reward_funcs=tiny.constant,
            args=small(DAPOConfig),
            train_dataset=take_away(["a", "b", "c", "d", "e"]),
        )
    assert_says(error, "rollout_selection='refill'", "can't be read twice", "rollout_selection='duplicate'")


def test_refill_with_an_environment_that_owns_the_data():
    with pytest.raises(ValueError) as error:
        DAPOTrainer(
            model=NOWHERE,
            reward_funcs=None,
            args=small(DAPOConfig),
            environment_factory=Board,
        )
    assert_says(error, "rollout_selection='refill'", "environment owns the data", "rollout_selection='duplicate'")


def test_refill_with_rows_that_only_name_an_environment():
    with pytest.raises(ValueError) as error:
        DAPOTrainer(
            model=NOWHERE,
            reward_funcs=None,
            args=small(DAPOConfig),
            train_dataset=Dataset.from_dict({"environment": ["a", "b"] * 4}),
            environment_factory={"a": Board, "b": Board},
        )
    assert_says(error, "by the column `environment` alone", "rollout_selection='duplicate'", "such as a seed")


class AnotherReward:
    """A callable instance: its name in the logs is that of its class."""

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_unknown_outcome_reward(trainer_class):
    with pytest.raises(ValueError) as error:
        trainer_class(
            model=NOWHERE,
            # The reward model's name is known without loading it
            reward_funcs=[tiny.constant, AnotherReward(), "nobody/reward-model", get_soft_overlong_punishment(10, 2)],
            args=small(trainer_class.config_class, outcome_reward_funcs=["accuracy"]),
            train_dataset=tiny.prompts(),
        )
    names = ["constant", "AnotherReward", "reward-model", "soft_overlong_punishment_reward"]
    assert_says(error, "outcome_reward_funcs", "'accuracy'", *names)


def test_arguments_that_trl_does_not_have():
    with pytest.raises(TypeError, match="no_such_argument"):
        GRPOTrainer(model=NOWHERE, reward_funcs=tiny.constant, no_such_argument=1)


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_good_arguments_reach_the_load(trainer_class):
    # or the tests above would pass with a trainer that refuses everything
    with pytest.raises(OSError):
        trainer_class(
            model=NOWHERE,
            reward_funcs=tiny.constant,
            args=small(trainer_class.config_class),
            train_dataset=tiny.prompts(),
        )


# Configurations that were written for TRL


def test_adopt_keeps_sizes_and_what_was_set():
    theirs = trl.GRPOConfig(
        **settings(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=12,
            max_completion_length=77,
            learning_rate=3e-5,
            epsilon_high=0.4,
            seed=5,
            reward_weights=[1.0, 2.0],
            generation_kwargs={"eos_token_id": 3},
        )
    )
    ours = DAPOConfig.adopt(theirs)
    assert type(ours) is DAPOConfig
    # Sizes, also those that TRL's own defaults decided: a script's batch must not grow 16 times
    assert ours.generation_batch_size == theirs.generation_batch_size == 24
    assert (ours.steps_per_generation, ours.num_generations, ours.max_completion_length) == (12, 8, 77)
    # Set by the user
    assert (ours.learning_rate, ours.epsilon_high, ours.seed) == (3e-5, 0.4, 5)
    assert (ours.reward_weights, ours.generation_kwargs) == ([1.0, 2.0], {"eos_token_id": 3})
    # Left at TRL's default: the method's
    assert (ours.rollout_selection, ours.epsilon, ours.loss_type) == ("refill", 0.2, "dapo")
    assert (ours.warmup_steps, ours.lr_scheduler_type) == (20, "constant_with_warmup")
    assert ours.soft_punish_cache == 77 // 5
    # and theirs is left alone
    assert type(theirs) is trl.GRPOConfig
    assert theirs.steps_per_generation == 12


@pytest.mark.parametrize("config_class", CONFIGS)
def test_adopt_changes_nothing_but_the_methods_defaults(config_class):
    theirs = trl.GRPOConfig(**settings(per_device_train_batch_size=16))
    ours = config_class.adopt(theirs)
    fresh = config_class(**settings(per_device_train_batch_size=16))
    sizes = {"num_generations", "max_completion_length", "steps_per_generation", "generation_batch_size"}
    for name in comparable(theirs):
        expected = theirs if name in sizes else fresh
        assert getattr(ours, name) == getattr(expected, name), name


@pytest.mark.parametrize(
    ("config_class", "replaced"),
    [
        (GRPOConfig, None),
        (DUPOConfig, "epsilon_high=0.28 (was None)"),
        (
            DAPOConfig,
            "epsilon_high=0.28 (was None), lr_scheduler_type=constant_with_warmup (was linear), warmup_steps=20 ",
        ),
    ],
)
def test_adopt_says_once_which_defaults_it_replaced(config_class, replaced, caplog):
    # They may have been written down on purpose
    theirs = trl.GRPOConfig(**settings(per_device_train_batch_size=16, epsilon=0.2, warmup_steps=0))
    with caplog.at_level("WARNING"):
        config_class.adopt(config_class.adopt(theirs))
    said = [record.getMessage() for record in caplog.records if "defaults replace" in record.getMessage()]
    assert len(said) == (replaced is not None)
    if replaced:
        assert f"{config_class.__name__}'s defaults replace those of `args`, a GRPOConfig: {replaced}" in said[0]
        assert f"pass a {config_class.__name__}" in said[0]


def test_adopt_keeps_vllm_and_generation_arguments():
    chosen = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": "http://127.0.0.1:1",
        "vllm_server_timeout": 3.0,
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_max": 2.5,
        "vllm_gpu_memory_utilization": 0.7,
        "vllm_tensor_parallel_size": 2,
        "top_p": 0.9,
        "use_transformers_continuous_batching": False,
    }
    theirs = trl.GRPOConfig(**settings(**chosen))
    for config_class in CONFIGS:
        direct, adopted = config_class(**settings(**chosen)), config_class.adopt(theirs)
        for name, value in chosen.items():
            assert getattr(direct, name) == getattr(adopted, name) == value


def test_adopt_returns_its_own_kind_as_it_is():
    config = DAPOConfig(**settings())
    assert DAPOConfig.adopt(config) is config
    assert GRPOConfig.adopt(config) is config


@pytest.mark.parametrize("config_class", [DAPOConfig, DUPOConfig, GSPOConfig])
@pytest.mark.parametrize("changed", [{}, {"updates_per_generation": 2}, {"success_threshold": 0.9}], ids=str)
def test_adopt_takes_our_grpo_config(config_class, changed):
    plain = GRPOConfig(**settings(per_device_train_batch_size=16, **changed))
    ours = config_class.adopt(plain)
    assert ours.generation_batch_size == plain.generation_batch_size
    fresh = config_class(**settings())
    for name in ("rollout_selection", "importance_sampling_level", "epsilon", "epsilon_high", "loss_type"):
        assert getattr(ours, name) == getattr(fresh, name), name
    assert ours.success_threshold == plain.success_threshold


@dataclass
class ForeignConfig(trl.GRPOConfig):
    """Some other method's."""

    loss_type: str = "sapo"


@pytest.mark.parametrize(
    ("trainer_class", "args", "said"),
    [
        (DAPOTrainer, lambda: small(DUPOConfig), ["DUPOConfig", "Pass a DAPOConfig"]),
        (GSPOTrainer, lambda: small(DAPOConfig), ["DAPOConfig", "Pass a GSPOConfig"]),
        (GSPOTrainer, lambda: trl.DPOConfig(**settings()), ["DPOConfig", "trl.GRPOConfig"]),
        (DAPOTrainer, lambda: {"output_dir": "out"}, ["DAPOConfig", "dict"]),
    ],
)
def test_foreign_configs_are_refused(trainer_class, args, said):
    with pytest.raises(TypeError) as error:
        trainer_class(model=NOWHERE, reward_funcs=tiny.constant, args=args(), train_dataset=tiny.prompts())
    assert_says(error, *said)


@dataclass
class DUPOConfigOnCPU(DUPOConfig):
    """TRL's default is bf16 on a GPU."""

    use_cpu: bool = True
    bf16: bool | None = False


class DUPOTrainerOnCPU(DUPOTrainer):
    config_class = DUPOConfigOnCPU


@pytest.mark.parametrize(
    "changed",
    [{"loss_type": "grpo"}, {"steps_per_generation": 3, "gradient_accumulation_steps": 2}],
    ids=["loss", "misaligned"],
)
def test_the_papers_normalisation_gives_way_where_it_does_not_apply(changed):
    # A TRL user who set these never heard of token_normalization
    args = trl.GRPOConfig(**settings(per_device_train_batch_size=16, **changed))
    assert DAPOConfig.adopt(args).token_normalization == "generation_batch"


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_users_own_subclass_of_trls_config_is_taken_over(config_class):
    # The usual way to add arguments to a script
    config = config_class.adopt(ForeignConfig(**settings(temperature=0.7)))
    assert isinstance(config, config_class)
    assert config.loss_type == "sapo"  # what the subclass changed was meant
    assert config.temperature == 0.7


def test_without_args_the_methods_defaults_apply(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default output folder is in the working directory
    # 8 rows × 4 updates: 4 groups of 8
    trainer = DUPOTrainerOnCPU(
        model=tiny.qwen2(),
        reward_funcs=tiny.constant,
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    assert (trainer.num_generations, trainer.args.generation_batch_size) == (8, 32)
    assert trainer.args.output_dir.endswith("-DUPO")
    assert trainer.selects


# To text and back


@pytest.mark.parametrize("config_class", CONFIGS)
def test_to_dict_is_json(config_class):
    config = config_class(**settings(outcome_reward_funcs=["accuracy"], success_threshold=0.7))
    made = json.loads(config.to_json_string())
    assert made["outcome_reward_funcs"] == ["accuracy"]
    assert made["success_threshold"] == 0.7
    assert made["rollout_selection"] == config.rollout_selection
    assert made["epsilon"] == config.epsilon


@pytest.mark.parametrize("config_class", CONFIGS)
def test_yaml_round_trip(config_class, tmp_path):
    chosen = settings(
        rollout_selection="refill",
        max_refill_rounds=3,
        refill_draws="informed",
        similar_prompts_columns=["source", "level"],
        refill_exploration=0.5,
        outcome_reward_funcs=["accuracy", "format"],
        success_threshold=0.25,
        advantage_estimator="reinforce",
        reinforce_baseline_momentum=0.75,
        soft_punish_cache=7,
        updates_per_generation=2,
        scale_rewards="batch",
        per_device_train_batch_size=16,
        learning_rate=2e-6,
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(chosen))
    (parsed,) = TrlParser(config_class).parse_args_and_config(["--config", str(path)])
    direct = config_class(**chosen)
    assert type(parsed) is config_class
    for name in comparable(direct):
        assert getattr(parsed, name) == getattr(direct, name), name


def test_command_line(tmp_path):
    arguments = [
        *["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"],
        *["--outcome_reward_funcs", "a", "b", "--epsilon_high", "0.3"],
        *["--rollout_selection", "duplicate", "--updates_per_generation", "2"],
    ]
    (parsed,) = TrlParser(DAPOConfig).parse_args_and_config(arguments)
    assert parsed.outcome_reward_funcs == ["a", "b"]
    assert (parsed.epsilon_high, parsed.rollout_selection, parsed.updates_per_generation) == (0.3, "duplicate", 2)
    assert parsed.soft_punish_cache == 4096


def test_the_package_exports_subclasses_of_trls():
    assert all(issubclass(trainer, trl.GRPOTrainer) for trainer in TRAINERS)
    assert set(trl_ext.__all__) >= {cls.__name__ for cls in [*TRAINERS, *CONFIGS]}
