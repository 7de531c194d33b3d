"""The answer: what fits, by which phase, with how much in a micro-batch, and what would help."""

from dataclasses import replace

import pytest
from planner.jobs import folder, job, layout, shape

import trl_ext
from trl_ext.planner.job import CRITICS, Job
from trl_ext.planner.layouts import GIB, LAYOUTS, find_layout
from trl_ext.planner.models import check_layers_are_alike, count_numbers
from trl_ext.planner.phases import CUDA_BYTES, cache_bytes_per_token, phases_of
from trl_ext.planner.plan import CHANGES, cheapest_change, largest_micro_batch, make_plan
from trl_ext.planner.shapes import SHAPES, find_shape


def test_a_phase_is_what_persists_and_its_own_moment():
    """Nothing of one phase is in another; the worst decides."""
    plan = make_plan(job(reward="adapter"))
    names = [phase.name for phase in plan.phases]
    assert names == ["load", "generate", "score", "old and reference passes", "update", "save"]
    for phase in plan.phases:
        assert phase.parts["base weights"] == plan.phases[0].parts["base weights"]
        assert ("KV cache" in phase.parts) == (phase.name == "generate")
        assert ("activations kept" in phase.parts) == (phase.name == "update")
        assert phase.bytes >= CUDA_BYTES
    assert plan.peak == max(phase.bytes for phase in plan.phases) < sum(phase.bytes for phase in plan.phases)


@pytest.mark.parametrize("critic", CRITICS)
def test_every_critic_can_be_planned(critic):
    assert make_plan(job(critic=critic)).phases[0].parts["critic"] > 0


def test_the_cache_by_hand():
    """2 of keys and values × 6 layers × 2 heads × 32 numbers × 2 bytes × 64 tokens × 2 completions."""
    long_answers = job(prompt_tokens=4, completion_tokens=60)
    generate = next(phase for phase in phases_of(long_answers) if phase.name == "generate")
    assert generate.parts["KV cache"] == 2 * 6 * 2 * 32 * 2 * 64 * 2


def test_a_cache_of_a_policy_in_float32_is_in_float32():
    """Under autocast, what flows between weights in float32 is in float32. Without it, and in vLLM, in bfloat16."""
    full = job(lora_r=0, reference="model")
    assert cache_bytes_per_token(full) == 2 * cache_bytes_per_token(job())
    assert cache_bytes_per_token(full, in_vllm=True) == cache_bytes_per_token(job())
    for bfloat16 in ({"dtype": "bfloat16"}, {"strategy": "zero2", "layout": layout(2)}):
        assert cache_bytes_per_token(full.but(**bfloat16)) == cache_bytes_per_token(job())


def test_prompts_are_read_or_the_last_token_is_made():
    """The most of two moments, not their sum."""
    long_prompts, long_answers = (
        next(phase for phase in phases_of(job(prompt_tokens=p, completion_tokens=c)) if phase.name == "generate")
        for p, c in ((500, 4), (4, 500))
    )
    assert "activations" in long_prompts.parts and "logits of a token" not in long_prompts.parts
    assert "activations" not in long_answers.parts and "logits of a token" in long_answers.parts
    assert long_prompts.parts["KV cache"] == pytest.approx(500 / 504 * long_answers.parts["KV cache"])


TRAINERS = {name.lower(): name for name in ("PPO", "DAPO", "DUPO", "GSPO", "GRPO", "RLOO")}


@pytest.mark.parametrize(("method", "name"), TRAINERS.items())
def test_a_gpu_generates_for_as_many_steps_as_the_trainer_says(method, name):
    updates = getattr(trl_ext, f"{name}Config")._updates_per_generation or 1
    planned = job(method, per_device_train_batch_size=3, gradient_accumulation_steps=5)
    assert planned.updates == updates and planned.rollouts == 3 * 5 * updates
    assert planned.but(updates_per_generation=2).rollouts == 3 * 5 * 2


def test_fewer_steps_a_generation_are_tried_before_smaller_steps():
    planned = job("dapo", reference=None, gradient_accumulation_steps=64, layout=layout(gib=1.08))
    plan = make_plan(planned)
    assert not plan.fits and plan.deciding.name == "generate"
    assert cheapest_change(plan.job) == [
        "a quarter of the completions at once (updates_per_generation, gradient_accumulation_steps)"
    ]
    assert make_plan(planned.but(updates_per_generation=4)).fits


def test_at_the_largest_micro_batch_it_fits_and_one_more_does_not():
    tight = job("dpo", layout=layout(gib=1.018))
    size = largest_micro_batch(tight)
    assert size > 1
    assert make_plan(tight.but(per_device_train_batch_size=size)).fits
    assert not make_plan(tight.but(per_device_train_batch_size=size + 1)).fits


def test_where_nothing_fits_the_largest_is_zero():
    assert largest_micro_batch(job(layout=layout(gib=1.0))) == 0


def test_the_fastest_strategy_that_leaves_a_tenth_free_is_taken():
    """Everything everywhere if there is room; where nothing fits, the one that takes the least."""
    roomy, tight = (make_plan(job(strategy=None, layout=layout(4, gib))).job for gib in (3.0, 0.5))
    assert roomy.strategy == "ddp"
    assert (tight.strategy, tight.ds3_gather_for_generation) == ("zero3", False)


def test_what_does_not_fit_says_what_would():
    """All weights of four models don't fit; a trunk that is shared and LoRA do. Each change alone is tried first."""
    separate = {"critic": "model", "reward": "model", "reference": "model"}
    sizes = {"model": shape(hidden_size=512, intermediate_size=2048), "layout": layout(gib=1.13)}
    plan = make_plan(job(lora_r=0, **separate, **sizes))
    assert not plan.fits and plan.obstacle is not None and "GiB on a GPU" in plan.obstacle
    change = cheapest_change(plan.job)
    assert change is not None and any("LoRA" in name for name in change)

    def fits_with(names):
        changed = plan.job
        for name in names:
            changed = CHANGES[name](changed) or changed
        return make_plan(changed).fits

    assert fits_with(change) and not any(fits_with([other for other in change if other != name]) for name in change)


def test_more_completions_than_there_is_room_for():
    many = job(prompt_tokens=8, completion_tokens=56, gradient_accumulation_steps=512, layout=layout(gib=1.06))
    plan = make_plan(many)
    assert not plan.fits and plan.deciding.name == "generate" and plan.deciding.dominated_by == "KV cache"
    assert cheapest_change(plan.job) == [
        "a quarter of the completions at once (updates_per_generation, gradient_accumulation_steps)"
    ]


def test_zero3_gathers_the_whole_model_to_generate_unless_told_otherwise():
    spread = {"strategy": "zero3", "layout": layout(2), "model": shape(num_hidden_layers=6)}
    whole, by_layer = (make_plan(job(ds3_gather_for_generation=on, **spread)).phases[1] for on in (True, False))
    numbers = count_numbers(job())
    assert whole.parts["weights gathered"] == 2 * (numbers.base + numbers.adapter + numbers.critic)
    assert by_layer.parts["weights gathered"] <= whole.parts["weights gathered"]


def test_a_colocated_engine_without_room_for_its_weights():
    plan = make_plan(job(vllm="colocate", vllm_gpu_memory_utilization=0.1))
    assert not plan.fits and "vllm_gpu_memory_utilization=0.1" in str(plan.obstacle)


def test_an_adapter_that_is_sent_alone_gathers_nothing_of_the_base():
    spread = {"strategy": "zero3", "layout": layout(4), "vllm": "colocate"}
    merged, alone = (make_plan(job(vllm_sync=sync, **spread)).phases[1] for sync in ("weights", "adapter"))
    numbers, gathered = count_numbers(job()), "weights gathered for vLLM"
    assert merged.parts[gathered] == 2 * numbers.base
    assert alone.parts[gathered] == 4 * numbers.adapter


def test_a_host_that_is_too_small():
    full = {"lora_r": 0, "reference": "model", "strategy": "zero3", "offload": "optimizer"}
    small = replace(layout(2, 2.0), host_bytes=1000)
    plan = make_plan(job("dpo", **full, layout=small))
    assert not plan.fits and "in a host's memory" in str(plan.obstacle)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"critic": None}, "ppo needs one of"),
        ({"quantization": "4bit", "lora_r": 0, "reference": None}, "4-bit weights can't learn"),
        ({"lora_r": 0}, "an adapter on the policy's base"),
        ({"strategy": "none", "layout": layout(2)}, "is one process"),
        ({"offload": "all", "strategy": "none"}, "is DeepSpeed's"),
        ({"vllm_gpu_memory_utilization": 1.0}, "is a share"),
        ({"vllm_sync": "adapter", "vllm": "server"}, "an engine in the same processes"),
        ({"vllm_sync": "all"}, "vllm_sync='all'"),
        ({"per_device_train_batch_size": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_go_together_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        job(**settings)


# Shapes and layouts


def test_named_shapes_have_the_sizes_that_they_are_named_for():
    billions = {name: count_numbers(Job("grpo", find_shape(name), layout())).base / 1e9 for name in SHAPES}
    assert billions["33b"] == pytest.approx(32.53, abs=0.01)  # LLaMA-33B's 32.5e9
    assert billions["32b"] == pytest.approx(32.76, abs=0.01)  # Qwen2.5-32B's 32.8e9
    assert billions["0.5b"] == pytest.approx(0.494, abs=0.001)
    assert billions["7b"] == pytest.approx(7.62, abs=0.01)
    assert billions["14b"] == pytest.approx(14.77, abs=0.01)
    assert billions["70b"] == pytest.approx(70.55, abs=0.01)


def test_a_folder_with_a_configuration(tmp_path):
    found = find_shape(str(folder(tmp_path)))
    assert found.layers == 6 and found == shape()
    check_layers_are_alike(found)


def test_a_name_without_a_configuration():
    with pytest.raises(ValueError, match="no configuration is here"):
        find_shape("nowhere/at-all")
    with pytest.raises(ValueError, match=r"Did you mean '4xa100-80g'"):
        find_layout("4xa100-8g")


def test_layers_of_several_kinds_are_refused(tmp_path):
    kinds = ["full_attention", "sliding_attention"] * 3
    path = folder(tmp_path, layer_types=kinds, use_sliding_window=True, sliding_window=8)
    with pytest.raises(ValueError, match="of several kinds"):
        find_shape(str(path))


def test_layouts():
    assert find_layout("4xA100_80G") is LAYOUTS["4xa100-80g"]
    assert find_layout("2x4xa100-80g").gpus_per_node == 4
    assert find_layout("2x4xa100-80g").slowest_link < find_layout("4xa100-80g").slowest_link
    assert find_layout("2xa100-80g-pcie").host_bytes == 340 * GIB
