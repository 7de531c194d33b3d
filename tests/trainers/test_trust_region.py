"""
Trust regions in training: the gradient is DPPO's, from micro-batches and selections of every kind, and what would be
ignored is refused.
"""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import trl
from comparing import Gradients, largest_relative_error

from trl_ext import DAPOConfig, DUPOConfig, DUPOTrainer, GRPOConfig, GRPOTrainer, GSPOConfig, PPOConfig, PPOTrainer
from trl_ext.objectives.trust_region import TRUST_REGIONS, TrustRegion
from trl_ext.trainers.trust_region import confined_advantages


TOLERANCE = 1e-5
# Two updates for each generation batch, by a step that takes some tokens out of the region
STEPS = {
    **{"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_steps": 2},
    **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_completion_length": 12},
    "steps_per_generation": 8,
}


class ByHand(trl.GRPOTrainer):
    """TRL's trainer with eq. 12 of DPPO as its loss, written for one process: −Σ_t M_t r_t A_t, averaged."""

    threshold = 0.02

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.dropped: dict[int, list[int]] = {}  # tokens of each step that are dropped, and all

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        columns, mask = inputs["completion_ids"].size(1), inputs["completion_mask"]
        logits = model(ids, attention_mask=attention).logits[:, -columns - 1 : -1]
        logps = logits.log_softmax(dim=-1).gather(2, inputs["completion_ids"].unsqueeze(2)).squeeze(2)
        mu, advantages = inputs["old_per_token_logps"].exp(), inputs["advantages"].unsqueeze(1)
        pi = logps.exp()
        up, down = (advantages > 0) & (pi > mu), (advantages < 0) & (pi < mu)
        kept = ~((up | down) & ((mu - pi).abs() > self.threshold))
        counts = self.dropped.setdefault(self.state.global_step, [0, 0])
        counts[0] += int(((~kept) * mask).sum())
        counts[1] += int(mask.sum())
        surrogate = (kept * pi / mu * advantages * mask).sum(dim=1)
        if self.loss_type == "grpo":
            return -(surrogate / mask.sum(dim=1)).mean() / self.current_gradient_accumulation_steps
        return -surrogate.sum() / (inputs["num_items_in_batch"] / 2)  # two optimizer steps for a generation batch


def run(trainer_class: Any, config_class: Any, tmp_path: Any, **settings: Any) -> tuple[Any, list[torch.Tensor]]:
    gradients = Gradients()
    trainer = trainer_class(
        model=tiny.stopping(),
        reward_funcs=tiny.first_token_even,
        args=config_class(**tiny.cpu_settings(tmp_path, **{**STEPS, **settings})),
        train_dataset=tiny.ragged(),
        processing_class=tiny.tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients.vectors


TV = {"trust_region": "binary_tv", "trust_region_threshold": ByHand.threshold}
WAYS = {
    "TRL's micro-batches": {"fit_micro_batches": False, "share_prefixes": False},
    "fitted": {"share_prefixes": False},
    "shared": {"share_prefixes": "always"},
}


@pytest.mark.train
@pytest.mark.parametrize(("loss_type", "ways"), [("dapo", WAYS), ("grpo", ["shared"])])
def test_the_gradient_is_dppos(loss_type, ways, tmp_path, subtests):
    hand, expected = run(ByHand, trl.GRPOConfig, tmp_path / "hand", loss_type=loss_type)
    shares = [dropped / tokens for dropped, tokens in hand.dropped.values()]
    assert shares[0] == 0 and 0.02 < shares[1] < 0.5  # once the policy has moved, some tokens are dropped
    for way in ways:
        with subtests.test(way):
            given = {"loss_type": loss_type, **TV, **WAYS[way]}
            trainer, found = run(GRPOTrainer, GRPOConfig, tmp_path / way, **given)
            assert largest_relative_error(found, expected) <= TOLERANCE
            logs = tiny.history(trainer)
            assert not any(log["clip_ratio/region_mean"] for log in logs)
            if trainer.args.fit_micro_batches:  # else it is the mean over micro-batches, as TRL's metrics are
                assert [log["trust_region/dropped"] for log in logs] == pytest.approx(shares, rel=1e-5)
    _, wide = run(GRPOTrainer, GRPOConfig, tmp_path / "wide", **given | {"trust_region_threshold": 0.9})
    assert largest_relative_error(wide[1:], expected[1:]) > 0.01


@pytest.mark.train
def test_copies_are_weights_and_a_kl_is_not_dropped(tmp_path, subtests):
    """DUPO's copies count once with a weight; a KL to the reference also moves the tokens that are dropped."""
    tiny.stopping().save_pretrained(tmp_path / "policy")
    cases = {"copies": {}, "kl": {"beta": 0.1}}
    for case, settings in cases.items():
        runs = []
        for fit in (False, True):
            given = {"num_generations": 4, "soft_punish_cache": 0, "fit_micro_batches": fit, **TV, **settings}
            runs.append(run(DUPOTrainer, DUPOConfig, tmp_path / f"{case} {fit}", **given))
        with subtests.test(case):
            (plain, theirs), (fitted, ours) = runs
            assert largest_relative_error(ours, theirs) <= TOLERANCE
            assert tiny.history(plain)[1]["trust_region/dropped"] > 0
            name = "computed/trust_region/dropped" if case == "copies" else "trust_region/dropped"
            assert name in tiny.history(fitted)[1]
            assert (fitted.saved_compute.merged_rows > 0) == (case == "copies")


@pytest.mark.train
def test_ppo(tmp_path):
    """Wide enough, the region is PPO without a clip; else tokens are dropped, by their own advantages."""
    unclipped = run(PPOTrainer, PPOConfig, tmp_path / "unclipped", epsilon=1e6, num_iterations=1)[1]
    given = {"trust_region": "binary_kl", "num_iterations": 1}
    wide = run(PPOTrainer, PPOConfig, tmp_path / "wide", **given, trust_region_threshold=1e6)[1]
    assert largest_relative_error(wide, unclipped) <= TOLERANCE
    ways = [WAYS["TRL's micro-batches"], WAYS["shared"]]
    runs = [run(PPOTrainer, PPOConfig, tmp_path / str(i), **given, **settings) for i, settings in enumerate(ways)]
    for trainer, found in runs:
        assert largest_relative_error(found, runs[0][1]) <= TOLERANCE
        assert tiny.history(trainer)[1]["trust_region/dropped"] > 0
        assert largest_relative_error(found[1:], wide[1:]) > 0.01


def test_tokens_of_an_environment_are_not_counted():
    """And a token that the engine could not score (NaN) is where the old policy is, whatever that is."""
    metrics: dict[str, list[float]] = defaultdict(list)
    trainer: Any = SimpleNamespace(
        trust_region=TRUST_REGIONS["binary_tv"],
        args=SimpleNamespace(trust_region_threshold=0.15),
        accelerator=SimpleNamespace(reduce=lambda sums, reduction: sums),
        model=SimpleNamespace(training=True),
        _metrics={"train": metrics},
    )
    logps = torch.tensor([[0.9, 0.9, 0.9, 0.4]]).log()
    inputs = {
        "advantages": torch.tensor([2.0]),
        "old_per_token_logps": torch.tensor([[0.9, 0.9, 0.5, 0.5]]).log(),
        "sampling_per_token_logps": torch.tensor([[0.5, 0.5, math.nan, 0.3]]).log(),
    }
    found = confined_advantages(trainer, logps, inputs, torch.tensor([[1, 0, 1, 1]]))
    assert found.tolist() == [[0.0, 0.0, 0.0, 2.0]]
    assert metrics == {
        "trust_region/dropped": [pytest.approx(2 / 3)],
        "trust_region/divergence": [pytest.approx((0.4 + 0.4 + 0.1) / 3)],
    }


def test_a_new_region_is_a_function_and_an_entry(tmp_path, monkeypatch, caplog):
    seen = []

    def never(logps: torch.Tensor, sampling_logps: torch.Tensor) -> torch.Tensor:
        seen.append((logps, sampling_logps))
        return torch.zeros_like(logps)

    monkeypatch.setitem(TRUST_REGIONS, "never", TrustRegion(never, threshold=1.0))
    trainer, _ = run(GRPOTrainer, GRPOConfig, tmp_path, trust_region="never", max_steps=1, steps_per_generation=4)
    assert seen and all(torch.equal(*logps) for logps in seen)
    assert trainer.args.trust_region_threshold == 1.0 and trainer.args.epsilon is None
    assert "has no effect with one optimizer step" in caplog.text


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (GRPOConfig, {"trust_region": "tv"}, "trust_region='tv' is unknown. Choose one of 'ratio_clip', 'binary_tv'"),
    (GRPOConfig, {"trust_region_threshold": 0.1}, "no effect with trust_region='ratio_clip'"),
    (GRPOConfig, {"epsilon": 0.2}, "epsilon=0.2 would clip the ratio"),
    (DAPOConfig, {"epsilon_high": 0.3, "delta": 4.0}, "epsilon_high=0.3 and delta=4.0 would clip"),
    (PPOConfig, {"cliprange": 0.1}, "epsilon=0.1 would clip"),
    (GSPOConfig, {}, "importance_sampling_level='sequence' has one ratio for a completion"),
    (GRPOConfig, {"loss_type": "cispo"}, "loss_type='cispo' doesn't have. Set loss_type to one of 'grpo', "),
    (GRPOConfig, {"trust_region_threshold": 0.0}, "must be above 0 and below 1, the largest divergence"),
    (GRPOConfig, {"trust_region_threshold": 1.0}, "A usual value is 0.15"),
    (GRPOConfig, {"trust_region": "binary_kl", "trust_region_threshold": -1.0}, "above 0. A usual value is 0.05"),
]


@pytest.mark.parametrize(("config_class", "settings", "told"), REFUSED)
def test_what_is_refused(config_class, settings, told, tmp_path):
    given = settings if "no effect" in told else {"trust_region": "binary_tv", **settings}
    with pytest.raises(ValueError) as error:
        config_class(**tiny.cpu_settings(tmp_path, **given))
    assert told in str(error.value)


def test_values_of_the_paper(tmp_path):
    assert GRPOConfig(**tiny.cpu_settings(tmp_path, trust_region="binary_tv")).trust_region_threshold == 0.15
    dapo = DAPOConfig(**tiny.cpu_settings(tmp_path, trust_region="binary_kl", updates_per_generation=2))
    assert (dapo.trust_region_threshold, dapo.epsilon, dapo.epsilon_high) == (0.05, None, None)
    assert not GRPOConfig(**tiny.cpu_settings(tmp_path, trust_region="binary_kl")).is_neutral
