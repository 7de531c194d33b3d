"""A run's arguments as a job for the planner."""

from typing import Any

import pytest
import tiny
from planner.jobs import folder

import trl_ext
from trl_ext.planner.layouts import find_layout
from trl_ext.run.arguments import DPOArguments, PolicyArguments, PPOArguments, parse_arguments
from trl_ext.run.jobs import job_of_run, method_of
from trl_ext.run.lengths import Lengths
from trl_ext.run.machine import NotPlanned, Spread
from trl_ext.run.supervised import SFTTrainer


ALONE, LENGTHS = Spread("none"), Lengths(2, True, [5, 7], [4, 9])
KINDS = {"DPO": DPOArguments, "PPO": PPOArguments}


@pytest.fixture
def model(tmp_path):
    return str(folder(tmp_path / "model"))


@pytest.fixture
def job(model, tmp_path):
    def make(method: str, words: str = "", spread: Spread = ALONE, **settings: Any):
        config, trainer = getattr(trl_ext, f"{method}Config"), getattr(trl_ext, f"{method}Trainer")
        argv = ["--model_name_or_path", model, "--output_dir", str(tmp_path / "out"), "--layout", "1xa100-80g"]
        script, args, model_args, _ = parse_arguments(
            KINDS.get(method, PolicyArguments), config, [*argv, *words.split()]
        )
        given = {"args": args, "reward_funcs": [tiny.low_ids], **settings}
        return job_of_run(trainer, given, script.on_gpus, model_args, LENGTHS, find_layout("1xa100-80g"), spread)

    return make


def test_settings_are_those_on_gpus_not_those_of_this_machine(job):
    found = job("GRPO")
    assert found.gradient_checkpointing and found.method == "grpo"
    assert not job("GRPO", "--gradient_checkpointing false").gradient_checkpointing


def test_rollouts_are_those_of_a_generation_not_of_a_step(job):
    found = job("DAPO", "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_generations 4")
    assert found.rollouts == 4 * 2 * 16  # DAPO's 16 updates for each generation
    words = (
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 --rewards_in_flight 2 --generation_chunks 2"
    )
    assert job("GRPO", f"{words} --num_generations 2").rollouts == 8
    assert (found.prompt_tokens, found.num_generations) == (7, 4)


def test_ppo(job):
    found = job("PPO", "--critic adapter --use_peft --lora_r 4 --max_completion_length 33 --load_in_4bit")
    assert (found.method, found.critic, found.reference, found.reward) == ("ppo", "adapter", "adapter", None)
    assert (found.lora_r, found.quantization, found.completion_tokens) == (4, "4bit", 33)
    assert found.lora_target_modules and found.lora_target_modules != "all-linear"  # PEFT's own, of this model
    assert job("VAPO", "--critic head --critic_warmup_steps 1 --max_steps 3").method == "ppo"


def test_a_reference_is_there_if_its_kl_counts(job):
    assert job("GRPO").reference is None
    assert job("GRPO", "--beta 0.1").reference == "model"
    assert job("PPO", "--kl_coef 0").reference is None
    assert job("PPO").reference == "model"


def test_a_critic_or_reward_that_is_a_model(job, model, tmp_path):
    other = str(folder(tmp_path / "reward", num_hidden_layers=2))
    found = job("PPO", reward_model=other)
    assert found.reward == "model" and found.reward_model.layers == 2
    assert job("PPO", value_model=model).critic == "model"
    with pytest.raises(NotPlanned, match="larger or smaller"):
        job("PPO", value_model=other)
    with pytest.raises(NotPlanned, match="several reward models"):
        job("GRPO", reward_funcs=[other, model])


def test_pairs(job):
    found = job("DPO", "--max_length 12 --use_peft --lora_target_modules all-linear")
    assert (found.prompt_tokens, found.completion_tokens, found.rows) == (7, 5, 2 * found.per_device_train_batch_size)
    assert job("DPO", "--max_length 100").tokens == 16  # of the longest row
    assert found.reference == "adapter" and job("DPO").reference == "model"


def test_types_of_weights(job):
    assert job("GRPO").base_dtype == "float32"  # as TRL loads
    assert job("GRPO", "--dtype bfloat16").base_dtype == "bfloat16"
    assert job("GRPO", "--dtype auto").base_dtype == "float32"  # the configuration's


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--load_in_8bit", "load_in_8bit"),
        ("--bf16 false", "bf16=False"),
        ("--optim adafactor", "optim=adafactor"),
        ("--use_peft --use_dora", "use_dora"),
        ("--use_peft --lora_modules_to_save lm_head", "lora_modules_to_save"),
    ],
)
def test_what_the_planner_does_not_know(job, words, why):
    with pytest.raises(NotPlanned, match=why):
        job("GRPO", words)


def test_methods():
    assert method_of(trl_ext.RLOOTrainer) == "rloo"
    with pytest.raises(NotPlanned, match="SFTTrainer"):
        method_of(SFTTrainer)
