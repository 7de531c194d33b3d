"""
Completions are sampled as the arguments say: what `generation_kwargs` adds is refused or honoured in the loss, and
what a model was saved with doesn't act.
"""

import copy
from typing import Any

import pytest
import tiny
import torch
import trl
from transformers import GenerationConfig

import trl_ext
from trl_ext.rewards.guard import RewardGuard
from trl_ext.trainers.sampling import ARGUMENT_OF, COMPUTE, ENDS, PLAIN


CONFIGS = [
    config_class
    for config_class in (getattr(trl_ext, name) for name in trl_ext.__all__)
    if isinstance(config_class, type) and issubclass(config_class, trl.GRPOConfig)
]

# Keys of `generation_kwargs`, and words of the error
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"temperature": 0.5}, ["temperature=1.0", "Set temperature=0.5"]),
    ({"top_p": 0.9}, ["top_p=1.0", "Set top_p=0.9"]),
    ({"top_k": 3}, ["top_k=0", "Set top_k=3"]),
    ({"min_p": 0.1}, ["min_p=None", "Set min_p=0.1"]),
    ({"repetition_penalty": 1.1}, ["repetition_penalty=1.0", "Set repetition_penalty=1.1"]),
    ({"max_new_tokens": 9}, ["max_completion_length=6", "Set max_completion_length=9"]),
    ({"max_length": 9}, ["max_completion_length=6", "Set max_completion_length=9"]),
    ({"num_return_sequences": 2}, ["num_generations=4", "Set num_generations=2"]),
    ({"cache_implementation": "static"}, ["cache_implementation=None", "Set cache_implementation='static'"]),
    ({"do_sample": False}, ["another distribution", "low temperature"]),
    ({"num_beams": 2}, ["another distribution", "Leave it out"]),
    ({"min_new_tokens": 2}, ["another distribution", "reward function"]),
    ({"min_length": 2}, ["another distribution", "reward function"]),
    ({"suppress_tokens": [5]}, ["another distribution", "reward function"]),
    ({"bad_words_ids": [[5]]}, ["another distribution", "reward function"]),
    ({"sequence_bias": [[[5], 1.0]]}, ["another distribution", "reward function"]),
    ({"no_repeat_ngram_size": 2}, ["another distribution", "reward function"]),
    ({"typical_p": 0.9}, ["another distribution", "Leave it out"]),
    ({"guidance_scale": 1.5}, ["another distribution", "Leave it out"]),
    ({"renormalize_logits": True}, ["another distribution", "Leave it out"]),
    ({"stop_strings": ["w5"]}, ["masks", "Set eos_token_id"]),
    ({"forced_eos_token_id": 2}, ["masks", "Leave it out"]),
    ({"pad_token_id": 3}, ["tokenizer"]),
    ({"return_dict_in_generate": True}, ["Leave it out"]),
    ({"disable_compile": False}, ["TRL to set"]),
    ({"temprature": 0.5}, ["nothing that transformers knows", "Did you mean 'temperature'"]),
    ({"stop_token_ids": [5]}, ["vLLM's name", "set 'eos_token_id'"]),
    ({"eos_token_id": "<eos>"}, ["id of a token"]),
    ({"eos_token_id": [2, -1]}, ["id of a token"]),
]
REFUSED_WITH_VLLM: list[tuple[dict[str, Any], list[str]]] = [
    ({"temperature": 0.5}, ["Set temperature=0.5"]),
    ({"max_tokens": 9}, ["Set max_completion_length=9"]),
    ({"n": 2}, ["Set num_generations=2"]),
    ({"stop": ["w5"]}, ["masks", "Set eos_token_id"]),
    ({"seed": 3}, ["completions of a group equal", "argument seed"]),
    ({"logprobs": 5}, ["TRL to set"]),
    ({"ignore_eos": True}, ["masks", "Leave it out"]),
]
# What vLLM's log-probabilities honour, if they enter the loss
RESHAPING: list[dict[str, Any]] = [
    {"presence_penalty": 0.5},
    {"frequency_penalty": 0.5},
    {"min_tokens": 2},
    {"logit_bias": {5: 1.0}},
    {"allowed_token_ids": [5]},
    {"bad_words": ["w5"]},
    {"structured_outputs": {"regex": "w5"}},
]
ACCEPTED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "max_new_tokens": 6, "top_p": 1.0, "top_k": 0},
    {"temperature": None, "suppress_tokens": None},
    PLAIN,
    dict.fromkeys(COMPUTE),
    {"max_time": 60.0, "use_cache": True},
    {"eos_token_id": 5},
    {"eos_token_id": [5, 6]},
]


def config(tmp_path: Any, config_class: Any = trl_ext.GRPOConfig, **settings: Any) -> Any:
    return config_class(**tiny.cpu_settings(tmp_path, **settings))


class TestChecks:
    def test_all_methods_are_there(self):
        assert {"GRPOConfig", "DAPOConfig", "DUPOConfig", "GSPOConfig", "PPOConfig"} <= {c.__name__ for c in CONFIGS}

    @pytest.mark.parametrize(("settings", "words"), REFUSED, ids=lambda value: str(value))
    def test_what_contradicts_the_arguments(self, settings, words, tmp_path):
        with pytest.raises(ValueError) as error:
            config(tmp_path, generation_kwargs=settings)
        key = next(iter(settings))
        assert all(word in str(error.value) for word in [f"generation_kwargs={{{key!r}: ", *words])

    @pytest.mark.parametrize(("settings", "words"), REFUSED_WITH_VLLM, ids=lambda value: str(value))
    def test_with_vllm(self, settings, words, tmp_path):
        with pytest.raises(ValueError) as error:
            config(tmp_path, generation_kwargs=settings, use_vllm=True)
        assert all(word in str(error.value) for word in ["generation_kwargs={", *words])

    @pytest.mark.parametrize("settings", RESHAPING, ids=str)
    def test_with_vllm_the_correction_honours_a_reshaped_distribution(self, settings, tmp_path):
        config(tmp_path, generation_kwargs=settings, use_vllm=True)
        with pytest.raises(ValueError, match=r"vllm_importance_sampling_correction=True|reward function"):
            config(tmp_path, generation_kwargs=settings, use_vllm=True, vllm_importance_sampling_correction=False)

    @pytest.mark.parametrize("settings", ACCEPTED, ids=str)
    def test_what_contradicts_nothing(self, settings, tmp_path):
        config(tmp_path, generation_kwargs=settings)

    @pytest.mark.parametrize("config_class", CONFIGS)
    def test_every_configuration_checks(self, config_class, tmp_path):
        with pytest.raises(ValueError, match=r"Set temperature=0\.5"):
            config(tmp_path, config_class, generation_kwargs={"temperature": 0.5})

    @pytest.mark.parametrize("config_class", CONFIGS)
    def test_so_do_those_that_are_adopted(self, config_class, tmp_path):
        theirs = config(tmp_path, trl.GRPOConfig, generation_kwargs={"num_beams": 2})
        with pytest.raises(ValueError, match="num_beams"):
            config_class.adopt(theirs)

    def test_a_penalty_that_continuous_batching_leaves_out(self, tmp_path):
        with pytest.raises(ValueError, match=r"repetition_penalty=1\.1 has no effect"):
            config(tmp_path, repetition_penalty=1.1, use_transformers_continuous_batching=True)
        config(tmp_path, repetition_penalty=1.1)

    def test_one_of_ppos_ends(self, tmp_path):
        with pytest.raises(ValueError, match="Set one of them"):
            config(tmp_path, trl_ext.PPOConfig, stop_token_id=5, generation_kwargs={"eos_token_id": 6})

    def test_keys_are_transformers(self):
        known = vars(GenerationConfig())
        of_vllm = {"max_tokens", "n", "min_tokens", "stop_token_ids"}
        assert {*ARGUMENT_OF, *PLAIN, *COMPUTE, *ENDS} - known.keys() == of_vllm


# What a model was saved with

QWEN2_5_INSTRUCT = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
LEFTOVERS = {
    **{"do_sample": False, "temperature": 0.1, "top_k": 2, "top_p": 0.3, "min_p": 0.5, "repetition_penalty": 3.0},
    **{"num_beams": 3, "no_repeat_ngram_size": 1, "suppress_tokens": [*range(4, 14)], "min_new_tokens": 4},
    **{"max_length": 3, "typical_p": 0.2, "bad_words_ids": [[15]], "num_return_sequences": 3, "guidance_scale": 1.5},
    **{"begin_suppress_tokens": [16], "exponential_decay_length_penalty": [1, 2.0], "stop_strings": ["w9"]},
}
CONTINUOUS = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
}


def saved_with(leftovers: dict[str, Any]) -> Any:
    model = tiny.stopping()
    for name, value in leftovers.items():
        setattr(model.generation_config, name, value)
    return model


def completions(model: Any, tmp_path: Any, training: bool, arguments: Any = None, **settings: Any) -> list[Any]:
    """Those of the first generation batch of a training, or of a roll-out."""
    reward = tiny.Remembering(tiny.low_ids)
    given = {"model": model, **(arguments or {})}
    torch.manual_seed(0)
    trainer = tiny.trainer(trl_ext.GRPOTrainer, tmp_path, reward, given, max_steps=1, **settings)
    assert isinstance(trainer.reward_funcs[0], RewardGuard)
    if training:
        trainer.train()
    else:
        trainer.roll_out(list(tiny.prompts(4)), 4, seed=0)
    return reward.calls[0].completion_ids


@pytest.mark.train
@pytest.mark.parametrize("leftovers", [QWEN2_5_INSTRUCT, LEFTOVERS], ids=["qwen2.5", "many"])
@pytest.mark.parametrize(
    ("training", "arguments", "settings"),
    [
        (True, {}, {}),
        (True, {}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}),
        (False, {}, {}),
        (True, {"peft_config": tiny.lora()}, {}),
        (True, {}, CONTINUOUS),
    ],
    ids=["training", "arguments", "roll_out", "lora", "continuous_batching"],
)
def test_what_a_model_was_saved_with_does_not_act(leftovers, training, arguments, settings, tmp_path):
    model = saved_with(leftovers)
    before = copy.deepcopy(model.generation_config.to_dict())
    found = completions(model, tmp_path / "saved", training, copy.deepcopy(arguments), **settings)
    assert found == completions(tiny.stopping(), tmp_path / "plain", training, copy.deepcopy(arguments), **settings)
    assert model.generation_config.to_dict() == before
    assert len({tuple(ids) for ids in found}) > len(found) / 2


def test_it_stays_with_a_model_whose_generation_fails(tmp_path):
    model = saved_with(QWEN2_5_INSTRUCT)
    trainer = tiny.trainer(trl_ext.GRPOTrainer, tmp_path, tiny.low_ids, {"model": model})
    generation_config = model.generation_config
    trainer.generation_config.stop_strings = ["w9"]  # needs a tokenizer that TRL doesn't pass
    with pytest.raises(ValueError, match="stop"):
        trainer.roll_out(list(tiny.prompts(2)), 4)
    assert model.generation_config is generation_config


# Tokens that end a completion

CLIPPED = "completions/clipped_ratio"
ENDS_OF = {
    "generation_kwargs": (trl_ext.GRPOTrainer, {"generation_kwargs": {"eos_token_id": [9, 10]}}, {2, 9, 10}),
    "one": (trl_ext.GRPOTrainer, {"generation_kwargs": {"eos_token_id": 9}}, {2, 9}),
    "ppo": (trl_ext.PPOTrainer, {"generation_kwargs": {"eos_token_id": 9}}, {2, 9}),
    "ppo_stop_token_id": (trl_ext.PPOTrainer, {"stop_token_id": 9}, {9}),
    "continuous": (trl_ext.GRPOTrainer, {"generation_kwargs": {"eos_token_id": 9}, **CONTINUOUS}, {2, 9}),
}


def ends_right(ids: list[int], ends: set[int], longest: int) -> bool:
    """Whether a completion ends at the first of its ends, or at its length."""
    return not ends & set(ids[:-1]) and (len(ids) == longest or ids[-1] in ends)


@pytest.mark.train
@pytest.mark.parametrize("name", ENDS_OF)
def test_completions_end_where_they_are_told(name, tmp_path):
    trainer_class, settings, ends = ENDS_OF[name]
    trainer = tiny.trained(trainer_class, tmp_path, tiny.low_ids, max_completion_length=16, **settings)
    found = [ids for batch in trainer.batches for ids in batch.completions]
    assert all(ends_right(ids, ends, 16) for ids in found)
    assert set(trainer.eos_token_ids) == ends
    last = {ids[-1] for ids in found if len(ids) < 16}
    assert last == ends or len(last) > 1
    if ends == {9}:
        assert any(2 in ids for ids in found)  # the tokenizer's own is a token like others
    clipped = [log[CLIPPED] for log in trainer.state.log_history if CLIPPED in log]
    per_batch = [sum(ids[-1] not in ends for ids in b.completions) / len(b.completions) for b in trainer.batches]
    assert clipped == pytest.approx(per_batch)
    if isinstance(trainer, trl_ext.PPOTrainer):
        for batch in trainer.batches:
            assert trainer._ended(batch.output).tolist() == [ids[-1] in ends for ids in batch.completions]


@pytest.mark.train
def test_several_ends_of_a_model(tmp_path):
    """As Llama 3 is saved."""
    model = saved_with({"eos_token_id": [2, 9]})
    trainer = tiny.trained(trl_ext.GRPOTrainer, tmp_path, tiny.low_ids, {"model": model}, max_completion_length=16)
    found = [ids for batch in trainer.batches for ids in batch.completions]
    assert all(ends_right(ids, {2, 9}, 16) for ids in found)
    assert {ids[-1] for ids in found} >= {2, 9}
