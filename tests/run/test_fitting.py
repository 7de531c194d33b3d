"""The check of memory before a model is loaded: recipes on models that have no weights, of which none may be read."""

import random
from dataclasses import dataclass
from typing import Any

import datasets
import pytest
import quickstart
import tiny
import torch
from datasets import Dataset
from planner.jobs import SHAPE
from run.weightless import LARGE, LORA, without_weights
from transformers.integrations import HfDeepSpeedConfig, set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

import trl_ext
from trl_ext.errors import UserError
from trl_ext.planner.layouts import GIB, find_layout
from trl_ext.run.arguments import PolicyArguments, parse_arguments
from trl_ext.run.fitting import Stage, plan_stage
from trl_ext.run.machine import NotPlanned, layout_of
from trl_ext.run.training import train_policy


NO_WEIGHTS = r"model\.safetensors"  # with which a run ends that is let through
LAYOUT = ("--layout", "2xa100-80g")


@pytest.fixture
def small(tmp_path):
    return without_weights(tmp_path / "small", **SHAPE)


@pytest.fixture
def large(tmp_path):
    return without_weights(tmp_path / "large", **LARGE)


@pytest.fixture
def words(tmp_path):
    """A command line of a recipe that samples, but for its model."""
    rows = Dataset.from_dict({"prompt": [f"s{i}=" for i in range(32)]})
    rows.to_json(tmp_path / "prompts.jsonl")
    (tmp_path / "rewards.py").write_text(
        "def even(completion_ids, **kwargs):\n    return [0.0] * len(completion_ids)\n"
    )
    files = ("--dataset_name", str(tmp_path / "prompts.jsonl"), "--reward_funcs", f"{tmp_path / 'rewards.py'}:even")
    small = ("--max_completion_length", "4", "--per_device_train_batch_size", "8", "--report_to", "none")
    datasets.disable_progress_bars()  # which a recipe does in a process of its own
    return ["--output_dir", str(tmp_path / "out"), *files, *small]


def start(words: list[str], model: str, *more: str) -> None:
    train_policy(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, [*words, "--model_name_or_path", model, *more])


@pytest.mark.slow
def test_what_does_not_fit_is_stopped(words, large, tmp_path, capsys):
    """And says which phase decides, what dominates it, and what to change."""
    with pytest.raises(UserError) as error:
        start(words, large, *LAYOUT, *LORA)
    said = str(error.value)
    assert "GRPO of" in said and "does not fit (2xa100-80g, 79.1 GiB a GPU, zero3)" in said
    assert "GiB on a GPU, of which" in said and "base weights" in said
    assert "Cheapest change that makes it fit: 4-bit base weights (load_in_4bit)" in said and "--force" in said
    assert "Planning the memory of a run on 2xa100-80g" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_force_goes_on_with_a_warning(words, large, capsys):
    """To the model, of which there are no weights."""
    with pytest.raises(UserError, match=NO_WEIGHTS):
        start(words, large, *LAYOUT, *LORA, "--force")
    assert "Warning: GRPO of" in capsys.readouterr().out


def test_what_fits_goes_on(words, small, capsys):
    with pytest.raises(UserError, match=NO_WEIGHTS):
        start(words, small, *LAYOUT)
    assert "Fits: " in capsys.readouterr().out


def test_without_gpus_and_without_a_layout_nothing_is_planned(words, large, capsys):
    with pytest.raises(UserError, match=NO_WEIGHTS):
        start(words, large)
    assert "Planning" not in capsys.readouterr().out


def test_what_is_not_known_stops_nothing(words, large, capsys):
    with pytest.raises(UserError, match=NO_WEIGHTS):
        start(words, large, *LAYOUT, "--optim", "adafactor")
    assert "Not planned, so not checked: the planner doesn't know optim=adafactor." in capsys.readouterr().out


@pytest.mark.slow
def test_a_recipe_ends_with_one_line_and_status_2(words, large, capsys):
    with pytest.raises(SystemExit) as end:
        quickstart.start("grpo", [*words, "--model_name_or_path", large, *LAYOUT, *LORA])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("grpo.py: error: GRPO of") and "does not fit" in line


def test_a_layout_that_there_is_not(words, small):
    with pytest.raises(UserError, match="--layout is '3xb200'"):
        start(words, small, "--layout", "3xb200")


@dataclass
class Plugin:
    """What Accelerate's launcher makes of a DeepSpeed file, on two processes."""

    deepspeed_config: dict[str, Any]
    dschf: Any


def staged(words: list[str], model: str, *more: str, method: str = "GRPO") -> tuple[Stage, Any]:
    argv = [*words, "--model_name_or_path", model, *LAYOUT, *more]
    arguments = parse_arguments(PolicyArguments, getattr(trl_ext, f"{method}Config"), argv)
    rows = Dataset.from_dict({"prompt": ["s12="] * 32})
    settings = {"args": arguments.training, "train_dataset": rows, "reward_funcs": [tiny.low_ids]}
    return Stage(getattr(trl_ext, f"{method}Trainer"), settings, arguments.script.on_gpus), arguments


def test_a_plan_leaves_the_run_as_it_is(words, small):
    """Random numbers, and ZeRO-3, under which transformers would spread the planner's models over processes."""
    stage, arguments = staged(words, small, "--critic_head", "mlp", method="PPO")
    zero = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    plugin = Plugin(zero, HfDeepSpeedConfig(zero))
    arguments.training.deepspeed_plugin = plugin
    set_hf_deepspeed_config(plugin.dschf)
    before, draw = torch.get_rng_state(), random.getstate()
    try:
        plan = plan_stage(stage, arguments, find_layout("2xa100-80g")).plan
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
    assert plan.job.strategy == "zero3" and plan.fits
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == draw


def test_prompts_are_shared_where_it_only_fits_that_way(words, small):
    """On a GPU that has room for the prompt once and not eight times."""

    def planned(gib: float, *more: str) -> Any:
        stage, arguments = staged(words, small, "--gradient_checkpointing", "false", *more)
        stage.settings["train_dataset"] = Dataset.from_dict({"prompt": ["s" + "12345" * 200] * 32})
        layout = layout_of("small GPU", int(gib * GIB), 1, 1, 100 * GIB)
        return plan_stage(stage, arguments, layout, search=False).plan

    alone = planned(100)
    assert alone.fits and not alone.job.share_prefixes
    less = (alone.peak - 1e6) / GIB
    shared = planned(less)
    assert shared.fits and shared.job.share_prefixes
    assert not planned(less, "--share_prefixes", "False").fits


def test_whatever_goes_wrong_in_the_planner_is_a_reason(words, small):
    stage, arguments = staged(words, small)
    stage.settings["train_dataset"] = Dataset.from_dict({"question": ["w1"]})
    with pytest.raises(NotPlanned, match="none of the columns"):
        plan_stage(stage, arguments, find_layout("2xa100-80g"))
