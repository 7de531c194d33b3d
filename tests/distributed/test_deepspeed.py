"""
Selection with DeepSpeed ZeRO, under which the rounds of a refill generate with gathered weights.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
import yaml
from comparing import equal
from distributed.deepspeed_worker import read
from distributed.zero import launch_with_zero
from peft import load_peft_weights
from processes import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import trl_ext
from trl_ext import export_role
from trl_ext.curriculum.partial import weights_key


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("deepspeed_worker.py")


def start(tmp_path: Path, stage: int, *command: str | Path, **settings: Any) -> None:
    """Runs a worker with TRL's own configuration, on two processes without a GPU."""
    config = yaml.safe_load((Path(trl.__file__).parent / "accelerate_configs" / f"zero{stage}.yaml").read_text())
    config |= {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
    config["deepspeed_config"] |= settings
    file = tmp_path / f"zero{stage}.yaml"
    file.write_text(yaml.safe_dump(config))
    run(["-m", "accelerate.commands.launch", "--config_file", file, *command], {"DS_ACCELERATOR": "cpu"})


def launch(tmp_path: Path, stage: int, selection: str, checkpoint: Path | None = None) -> dict[str, Any]:
    """Trains and returns what the worker saved."""
    start(tmp_path, stage, WORKER, tmp_path, selection, *([checkpoint] if checkpoint else []))
    target = tmp_path / ("resumed" if checkpoint else "whole")
    result: dict[str, Any] = torch.load(target / "result.pt", weights_only=False)
    assert result["stage"] == stage
    assert result["rewards"].shape == (3, 2, 2)  # prompts, completions, the reward and the overlong punishment
    alone = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    trainer = tiny.trainer(trl_ext.GRPOTrainer, tmp_path / "alone", arguments={"model": alone})
    torch.testing.assert_close(result["states"], read(trainer), rtol=1e-5, atol=1e-5)
    # Spread over processes, the weights are told by the same key as in one piece
    assert result["key"] == weights_key(alone)
    return result | {"weights": load_file(target / "model.safetensors")}


def test_zero_3_refills_and_resumes(tmp_path: Path) -> None:
    whole = launch(tmp_path, 3, "refill")
    assert whole["counters"]["generation_rounds"] > 3  # three steps, and rounds beside them
    resumed = launch(tmp_path, 3, "refill", tmp_path / "checkpoint-2")
    assert resumed["counters"] == whole["counters"]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight)
    assert torch.equal(resumed["rewards"], whole["rewards"])
    assert equal(resumed["chooser"], whole["chooser"]) and whole["chooser"]["features"]["tokens"] > 0


def test_zero_2_duplicates(tmp_path: Path) -> None:
    result = launch(tmp_path, 2, "duplicate")
    assert result["counters"]["generation_rounds"] == 3


def test_zero_3_hands_an_adapter_from_stage_to_stage(tmp_path: Path) -> None:
    """Two rounds of pairs, DPO and PPO in one launch, each stage with an engine of its own around the same weights."""
    start(tmp_path, 3, WORKER.with_name("schedule_worker.py"), tmp_path)
    folders = ["start", "round_1/dpo", "round_1/ppo", "round_2/dpo", "round_2/ppo"]
    adapters = [load_peft_weights(str(tmp_path / folder), device="cpu") for folder in folders]
    for before, after in pairwise(adapters):
        assert all(before[name].shape == weight.shape for name, weight in after.items())
        assert 0 < max((before[name] - weight).abs().max().item() for name, weight in after.items()) < 0.5
    # The reference of a stage is what the one before left: at the first step there is no KL to it
    for round_ in (1, 2):
        log = json.loads((tmp_path / f"round_{round_}/ppo/trainer_state.json").read_text())["log_history"]
        kl = [entry["objective/kl"] for entry in log if "objective/kl" in entry]
        assert abs(kl[0]) < 1e-5 < abs(kl[-1])


def test_zero_3_refuses_a_reference_that_is_not_the_policy(tmp_path: Path) -> None:
    """Spread over processes, the policy can't be copied: what TRL loads again is compared with it."""
    tiny.qwen2().save_pretrained(tmp_path / "model")
    start(tmp_path, 3, WORKER.with_name("reference_worker.py"), tmp_path)


def test_zero_3_generates_a_layer_at_a_time_with_a_head_of_its_own(tmp_path: Path) -> None:
    """DeepSpeed fetches the head ahead after the last layer, where TRL gathers it for its fused head."""
    tiny.qwen2(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    launch_with_zero(tmp_path, "zero3", {"stage": 3}, WORKER.with_name("untied_worker.py"), tmp_path)


def test_what_zero_3_saves_in_parts_is_exported_whole(tmp_path: Path) -> None:
    start(tmp_path, 3, Path(__file__).with_name("export_worker.py"), tmp_path / "run", zero3_save_16bit_model=False)
    assert not list((tmp_path / "run").glob("*.safetensors"))
    expected = torch.load(tmp_path / "run" / "expected.pt")
    export = export_role(tmp_path / "run")
    assert export.form == "the policy, whole, put together from the parts of its processes, in float32"
    found = AutoModelForCausalLM.from_pretrained(export.folder).state_dict()
    policy = {name: weight for name, weight in expected.items() if not name.startswith("critic.")}
    assert len(policy) < len(expected)
    for name, weight in policy.items():
        assert torch.equal(found[name], weight)


def test_a_critic_that_is_an_adapter_learns_the_same_under_zero_2_and_zero_3(tmp_path: Path) -> None:
    found = {}
    for stage in (2, 3):
        folder = tmp_path / f"zero_{stage}"
        start(tmp_path, stage, WORKER.with_name("critic_worker.py"), folder)
        critic = folder / "critic"
        head = load_file(critic / "critic.safetensors")
        found[stage] = {
            "policy": load_peft_weights(str(folder), device="cpu"),
            "critic": load_peft_weights(str(critic / "adapter"), device="cpu"),
            "head": head,
        }
    for name, weights in found[2].items():
        assert weights.keys() == found[3][name].keys()
        for key, weight in weights.items():
            # B and the head start at zero
            assert weight.any() or ("lora_B" not in key and "out." not in key), key
            torch.testing.assert_close(found[3][name][key], weight, rtol=1e-3, atol=1e-4)
