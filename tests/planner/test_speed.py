"""Operations, bytes and what slows a phase."""

import pytest
from planner.jobs import job, layout

from trl_ext.planner.job import Job
from trl_ext.planner.layouts import find_layout
from trl_ext.planner.models import count_numbers
from trl_ext.planner.shapes import find_shape
from trl_ext.planner.speed import Efficiencies, forecast, work_of


def phases(planned):
    return {work.name: work for work in work_of(planned)}


def test_operations_by_hand():
    """Two rows of 64 tokens: 2 for each weight and token, and 2 × 6 layers × 64 × 64² of causal attention a row."""
    base = count_numbers(job()).base
    forward = 2 * (2 * base * 64 + 2 * 6 * 64 * 64**2)
    # The policy and the reference; then forward, recomputation and the gradient of activations
    assert phases(job())["old and reference passes"].flops == pytest.approx(2 * forward)
    assert phases(job())["update"].flops == pytest.approx(3 * forward)
    everything = job(lora_r=0, reference="model", gradient_checkpointing=False)
    assert phases(everything)["update"].flops == pytest.approx(3 * forward)  # no recomputation, gradients of weights


def test_bytes_over_links_by_hand():
    """ZeRO-3 on four GPUs gathers three quarters of the base twice a micro-batch, and for each token or once."""
    spread = {"strategy": "zero3", "layout": layout(4)}
    numbers = count_numbers(job())
    gathered = 2 * numbers.base * 3 / 4
    trained = 2 * (numbers.adapter + numbers.critic) * 3 / 4
    by_layer, whole = (phases(job(ds3_gather_for_generation=on, **spread)) for on in (False, True))
    assert by_layer["update"].link_bytes == pytest.approx(2 * 2 * gathered + trained)
    assert by_layer["generate"].link_bytes == pytest.approx(32 * gathered)
    assert whole["generate"].link_bytes == pytest.approx(gathered)
    assert phases(job())["update"].link_bytes == 0


def test_what_is_slow_on_an_a100():
    """33B that is gathered for each token waits for the links. With half their bandwidth it takes twice as long."""
    planned = Job(
        *("ppo", find_shape("33b"), find_layout("4xa100-80g-pcie")),
        **{"strategy": "zero3", "critic": "head", "reference": "adapter", "ds3_gather_for_generation": False},
    )
    found = forecast(planned)
    assert found["bottleneck"] == "generate, by links"
    slower = forecast(planned, Efficiencies(link=Efficiencies().link / 2))
    assert slower["phases"][0]["seconds"] == pytest.approx(2 * found["phases"][0]["seconds"], rel=0.01)
    assert found["tokens_per_second"] == pytest.approx(8 * 2048 * 4 / found["step_seconds"], rel=0.01)
