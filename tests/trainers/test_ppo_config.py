"""PPO's defaults, and what it refuses before anything is loaded."""

import copy
import json
from dataclasses import fields
from typing import Any

import pytest
import tiny
import trl
from datasets import Dataset
from transformers import HfArgumentParser, Qwen2ForSequenceClassification

import trl_ext
from trl_ext import PPOConfig, PPOTrainer
from trl_ext.trainers.trl_1_12 import TRL112Arguments


# Nothing by this name is on disk and tests are offline: a load that is tried ends in an OSError
NOWHERE = "does/not-exist"


def config(config_class: Any = PPOConfig, **settings: Any) -> Any:
    base = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}
    return config_class(**{**base, **settings})


def classifier(num_labels: int = 1, **overrides: Any) -> Any:
    settings = copy.deepcopy(tiny.qwen2(**overrides).config)
    settings.num_labels = num_labels
    return Qwen2ForSequenceClassification(settings)


# Defaults


def test_defaults_are_those_of_trl_1_12_where_they_mean_the_same():
    made = config()
    expected = {
        "advantage_estimator": "gae",
        "num_generations": 1,
        "num_iterations": 4,
        "learning_rate": 3e-6,
        "epsilon": 0.2,
        "vf_coef": 0.1,
        "cliprange_value": 0.2,
        "gamma": 1.0,
        "lam": 0.95,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "whiten_rewards": False,
        "missing_eos_penalty": None,
        "beta": 0.0,
        "scale_rewards": "none",
    }
    assert {name: getattr(made, name) for name in expected} == expected


def test_a_head_learns_faster_than_a_model():
    assert config(learning_rate=1e-6).critic_learning_rate == pytest.approx(1e-4)
    assert config(learning_rate=1e-6, critic="model").critic_learning_rate == 1e-6
    assert config(critic_learning_rate=0.5).critic_learning_rate == 0.5


def test_a_target_brings_a_rule():
    assert config().kl_rule == "fixed"
    assert config(kl_target=6.0).kl_rule == "proportional"
    assert config(kl_target=6.0, kl_rule="ppo").kl_rule == "ppo"


def test_every_argument_has_a_help_text_and_a_line_in_the_docstring():
    inherited = {f.name for f in fields(TRL112Arguments)}
    for f in fields(PPOConfig):
        if f.name not in inherited:
            assert f.metadata.get("help"), f.name
            assert f.name in (PPOConfig.__doc__ or ""), f.name


def test_a_command_line():
    parser = HfArgumentParser(PPOConfig)  # type: ignore[arg-type]
    words = (
        "--output_dir out --use_cpu --bf16 False --critic model --kl_target 6 --missing_eos_penalty 1 --report_to none"
    )
    (made,) = parser.parse_args_into_dataclasses(words.split())
    assert (made.critic, made.kl_target, made.kl_rule, made.missing_eos_penalty) == ("model", 6.0, "proportional", 1.0)
    assert made.num_generations == 1


def test_a_configuration_can_be_logged_and_copied():
    made = config(num_mini_batches=1, total_episodes=64)
    assert json.loads(made.to_json_string())["gamma"] == 1.0
    assert copy.deepcopy(made).max_steps == made.max_steps


@pytest.mark.parametrize(("rows", "accumulation", "generations"), [(4, 2, 1), (1, 2, 1), (8, 1, 4), (2, 1, 1)])
def test_whole_groups_and_groups_of_one(rows, accumulation, generations):
    made = config(
        per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, num_generations=generations
    )
    assert made.num_generations == generations
    assert made.generation_batch_size == rows * accumulation


# Refusals


REFUSED = {
    "gamma": ({"gamma": 1.1}, r"gamma=1\.1 must lie in \[0, 1\]"),
    "lam": ({"lam": -0.1}, r"lam=-0\.1 must lie in \[0, 1\]"),
    "critic_lam": ({"critic_lam": 2.0}, r"critic_lam=2\.0 must lie in \[0, 1\]"),
    "lam_alpha": ({"lam_alpha": 0.0}, r"lam_alpha=0\.0 must be positive"),
    "reward_scaling": ({"reward_scaling": "group"}, "'group' is unknown. Choose one of 'none', 'batch', 'running'"),
    "reward_clip": ({"reward_clip": 0.0}, r"reward_clip=0\.0 must be positive"),
    "missing_eos_penalty": ({"missing_eos_penalty": -1.0}, r"missing_eos_penalty=-1\.0 must be positive"),
    "cliprange_value": ({"cliprange_value": 0.0}, r"cliprange_value=0\.0 must be positive"),
    "scale_rewards": ({"scale_rewards": "group"}, "scale_rewards='group' scales the advantages of groups"),
    "aggregation": ({"multi_objective_aggregation": "normalize_then_sum"}, "normalises within groups"),
    "vespo": ({"loss_type": "vespo"}, "takes one advantage a completion"),
    "truncated": (
        {"bootstrap_truncated": True, "mask_truncated_completions": True},
        "bootstrap_truncated=True says what truncated completions are worth",
    ),
    "penalty of nothing": (
        {"missing_eos_penalty": 1.0, "mask_truncated_completions": True},
        r"missing_eos_penalty=1\.0 punishes truncated completions, mask_truncated_completions=True leaves them out",
    ),
    "estimator": ({"advantage_estimator": "group"}, "advantage_estimator='group' is unknown. Choose one of 'gae'"),
    "critic": ({"critic": "none"}, "critic='none' is unknown. Choose one of 'head', 'adapter', 'model'"),
    "head of a model": ({"critic": "model", "critic_head": "mlp"}, "critic_head='mlp' has no effect"),
    "trunk of a model": ({"critic": "model", "critic_trunk_grad": 0.5}, r"critic_trunk_grad=0\.5 has no effect"),
    "init of a head": ({"critic_init": "reward"}, "critic_init='reward' has no effect with critic='head'"),
    "critic_head": ({"critic_head": "deep"}, "critic_head='deep' is unknown"),
    "critic_init": ({"critic": "model", "critic_init": "random"}, "critic_init='random' is unknown"),
    "critic_trunk_grad": ({"critic_trunk_grad": 1.5}, r"critic_trunk_grad=1\.5 is a share"),
    "critic_learning_rate": ({"critic_learning_rate": 0.0}, r"critic_learning_rate=0\.0 must be positive"),
    "vf_coef": ({"vf_coef": 0.0}, r"vf_coef=0\.0 must be positive"),
    "critic_warmup_steps": ({"critic_warmup_steps": -1}, "critic_warmup_steps=-1 must be at least 0"),
    "warm-up without an end": (
        {"critic_warmup_steps": 2, "max_steps": 2},
        "critic_warmup_steps=2 leaves none of the 2 optimizer steps to the policy",
    ),
    "explained variance of nothing": (
        {"critic_warmup_explained_variance": 0.5},
        r"critic_warmup_explained_variance=0\.5 has no effect with critic_warmup_steps=0",
    ),
    "explained variance": (
        {"critic_warmup_explained_variance": 1.0, "critic_warmup_steps": 1},
        r"critic_warmup_explained_variance=1\.0 must be less than 1",
    ),
    "value_updates": ({"value_updates_per_policy_update": 0}, "value_updates_per_policy_update=0 must be at least 1"),
    "kl_estimator": ({"kl_estimator": "k4"}, "kl_estimator='k4' is unknown"),
    "kl_coef": ({"kl_coef": -0.1}, r"kl_coef=-0\.1 must be at least 0"),
    "old_kl_coef": ({"old_kl_coef": -0.1}, r"old_kl_coef=-0\.1 must be at least 0"),
    "kl_rule": ({"kl_rule": "newton", "kl_target": 1.0}, "kl_rule='newton' is unknown"),
    "rule without target": ({"kl_rule": "ppo"}, "a rule needs a target, and a target a rule"),
    "target without rule": ({"kl_rule": "fixed", "kl_target": 1.0}, "a rule needs a target, and a target a rule"),
    "kl_target": ({"kl_target": 0.0}, r"kl_target=0\.0 must be positive"),
    "old_kl_target": ({"old_kl_target": -1.0, "old_kl_coef": 1.0}, r"old_kl_target=-1\.0 must be positive"),
    "kl_horizon": ({"kl_horizon": 0}, "kl_horizon=0 must be positive"),
    "kl_rate": ({"kl_rate": 0.0}, r"kl_rate=0\.0 must be positive"),
    "target of nothing": ({"kl_target": 1.0, "kl_coef": 0.0}, "there is no reference to keep close to"),
    "kl counted twice": ({"kl_coef": 0.1, "beta": 0.1}, "both punish the KL to the reference"),
    "old target of nothing": ({"old_kl_target": 0.1}, "needs a coefficient to start with"),
    "positive_nll_coef": ({"positive_nll_coef": -1.0}, r"positive_nll_coef=-1\.0 must be at least 0"),
    "ptx_coef": ({"ptx_coef": -1.0}, r"ptx_coef=-1\.0 must be at least 0"),
    "ptx_max_length": ({"ptx_max_length": 1}, "ptx_max_length=1 must be at least 2"),
    "replay_ratio": ({"replay_ratio": 1.0}, r"replay_ratio=1\.0 is a share of a step"),
    "replay of less than a row": ({"replay_ratio": 0.01}, "is less than one"),
    "replay_capacity": ({"replay_capacity": 0}, "replay_capacity=0 must be at least 1"),
    "groups of one": ({"rollout_selection": "refill"}, "num_generations=1 makes none"),
    "a single completion": (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
        "nothing to whiten advantages with",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_configuration_refuses(name):
    settings, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        config(**settings)


def build(settings: dict[str, Any] | None = None, **arguments: Any) -> Any:
    given = {
        "model": NOWHERE,
        "reward_funcs": tiny.hashed,
        "train_dataset": tiny.prompts(),
        "processing_class": tiny.tokenizer(),
        **arguments,
    }
    return PPOTrainer(args=config(per_device_train_batch_size=4, **(settings or {})), **given)


TEXT = Dataset.from_dict({"text": ["w1 w2"]})

# Arguments of the trainer, settings, and what is said
REFUSED_ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "reference without kl": ({"ref_model": tiny.qwen2}, {"kl_coef": 0.0}, "ref_model has no effect with kl_coef=0"),
    "value model with init": (
        {"value_model": classifier},
        {"critic": "model", "critic_init": "policy"},
        "critic_init='policy' has no effect with a value_model",
    ),
    "value model with a head": (
        {"value_model": classifier},
        {"critic_head": "mlp"},
        "critic_head='mlp' has no effect",
    ),
    "init of no reward model": (
        {},
        {"critic": "model", "critic_init": "reward"},
        "critic_init='reward' needs a reward_model",
    ),
    "two values a state": ({"value_model": lambda: classifier(2)}, {}, "value_model has 2 outputs"),
    "ptx without data": ({}, {"ptx_coef": 0.1}, r"ptx_coef=0\.1 without a ptx_dataset"),
    "ptx without weight": ({"ptx_dataset": lambda: TEXT}, {}, r"ptx_coef=0\.0 with a ptx_dataset"),
    "ptx without text": (
        {"ptx_dataset": lambda: TEXT.rename_column("text", "words")},
        {"ptx_coef": 0.1},
        r"ptx_dataset has only the columns \['words'\]",
    ),
    "ptx of nothing": ({"ptx_dataset": lambda: TEXT.select([])}, {"ptx_coef": 0.1}, "ptx_dataset is empty"),
    "few prompts": (
        {"train_dataset": lambda: tiny.prompts(3)},
        {},
        "train_dataset has 3 prompts, fewer than the 4 of one generation batch",
    ),
    "few tokenised prompts": (
        {"train_dataset": lambda: Dataset.from_dict({"input_ids": [[5], [6]]})},
        {},
        "train_dataset has 2 prompts, fewer than the 4 of one generation batch",
    ),
    "no prompts": (
        {"train_dataset": lambda: TEXT},
        {},
        "train_dataset has no column `prompt`",
    ),
}


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_what_a_trainer_refuses_before_it_loads_a_model(name):
    arguments, settings, said = REFUSED_ARGUMENTS[name]
    made = {key: make() for key, make in arguments.items()}
    with pytest.raises(ValueError, match=said):
        build(settings, **made)


def test_models_that_must_not_be_the_same_object():
    model, judge = tiny.qwen2(), classifier()
    with pytest.raises(ValueError, match="`model` and `ref_model` are the same object"):
        build(model=model, ref_model=model)
    with pytest.raises(ValueError, match="`reward_model` and `value_model` are the same object"):
        build(model=model, reward_model=judge, value_model=judge)


@pytest.mark.parametrize("name", ["value_model", "ref_model"])
def test_models_of_another_vocabulary_are_refused(name):
    other = {"value_model": classifier, "ref_model": tiny.qwen2}[name](vocab_size=20)
    with pytest.raises(ValueError, match=f"The policy has a vocabulary of 24 tokens, {name} one of 20"):
        build(model=tiny.qwen2(), **{name: other})


def test_a_reference_to_refresh_needs_a_kl():
    with pytest.raises(ValueError, match="there is no reference to refresh"):
        build({"kl_coef": 0.0, "sync_ref_model": True}, model=tiny.qwen2())


def test_gae_without_a_critic_is_refused():
    with pytest.raises(ValueError, match=r"advantage_estimator='gae' needs a critic\. Use PPOConfig"):
        config(trl_ext.GRPOConfig, advantage_estimator="gae")


# Configurations of others


def test_a_configuration_of_trl_is_taken_over():
    theirs = config(trl.GRPOConfig, learning_rate=5e-5, num_generations=4, max_completion_length=9, temperature=0.5)
    ours = PPOConfig.adopt(theirs)
    assert (ours.learning_rate, ours.num_generations, ours.max_completion_length) == (5e-5, 4, 9)
    assert (ours.temperature, ours.num_iterations, ours.advantage_estimator) == (0.5, 4, "gae")
    assert ours.critic_learning_rate == pytest.approx(5e-3)


@pytest.mark.parametrize("config_class", [trl.GRPOConfig, PPOConfig])
def test_a_beta_that_was_set_turns_off_the_default_kl_in_the_reward(config_class):
    # TRL's configuration has no kl_coef that a user could set to 0
    ours = PPOConfig.adopt(config(config_class, beta=0.1))
    assert (ours.kl_coef, ours.beta) == (0.0, 0.1)
    assert PPOConfig.adopt(config(config_class)).kl_coef == 0.05
