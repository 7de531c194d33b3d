"""
The tables of the axes: a new entry is one function and one entry and reaches training; an unknown or
half-written one is an error at construction.
"""

from dataclasses import fields
from typing import Any

import pytest
import tiny
import torch

from trl_ext import DAPOConfig, GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, RLOOConfig, VAPOConfig
from trl_ext.objectives.advantages import ESTIMATORS, AdvantageEstimator, leave_one_out
from trl_ext.objectives.ppo import LOSS_TERMS
from trl_ext.objectives.ratios import IMPORTANCE_LEVELS, ImportanceLevel
from trl_ext.objectives.trust_region import TRUST_REGIONS
from trl_ext.rewards.guard import RewardFunctionError
from trl_ext.rollouts.selection import SELECTIONS, RolloutSelection


def test_a_new_estimator_is_a_function_and_an_entry(tmp_path, monkeypatch):
    def above_the_best_other(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
        grouped = rewards.view(-1, num_generations)
        best = torch.stack([grouped[:, [j for j in range(num_generations) if j != i]].amax(1) for i in range(4)], 1)
        return (grouped - best).view(-1)

    entry = AdvantageEstimator(above_the_best_other, needs=("num_generations",))
    monkeypatch.setitem(ESTIMATORS, "best_other", entry)
    reward = tiny.Remembering(tiny.hashed)
    trainer = tiny.trainer(tiny.recorded(GRPOTrainer), tmp_path, reward, advantage_estimator="best_other", max_steps=1)
    trainer.train()
    rewards = torch.tensor(reward.calls[0].rewards)
    assert torch.allclose(trainer.batches[0].output["advantages"], above_the_best_other(rewards, 4))
    assert trainer.scale_rewards == "none"


@pytest.mark.train
def test_a_new_selection_is_a_function_and_an_entry(tmp_path, monkeypatch):
    def first_live(selection, rounds, generator) -> None:
        """The first live group in every slot of a dead one."""
        for slot in selection.dead_slots:
            selection.sources[slot] = selection.live.index(True)

    monkeypatch.setitem(SELECTIONS, "first_live", RolloutSelection(first_live, mostly_copies=True))
    trainer = tiny.trainer(
        tiny.recorded(GRPOTrainer), tmp_path, tiny.LiveFor({4, 5, 6, 7, 8, 9}), rollout_selection="first_live"
    )
    trainer.train()
    selection = next(batch.selection for batch in trainer.batches if not all(batch.selection.live))
    first = selection.live.index(True)
    assert selection.sources == [slot if live else first for slot, live in enumerate(selection.live)]
    assert trainer.exact_savings.weigh_copies


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (lambda: AdvantageEstimator(), "half written"),
        (lambda: AdvantageEstimator(leave_one_out, computed_by="trl"), "half written"),
        (lambda: AdvantageEstimator(leave_one_out), "takes .'num_generations'. besides the rewards"),
        (lambda: AdvantageEstimator(leave_one_out, needs=("baseline",)), "takes .'num_generations'. beside"),
        (lambda: AdvantageEstimator(leave_one_out, needs=("group_size",)), "needs='group_size' is unknown"),
        (lambda: AdvantageEstimator(computed_by="hand"), "computed_by='hand' is unknown"),
        (lambda: RolloutSelection(draws_prompts=True), "without `fill`"),
        (lambda: RolloutSelection(mostly_copies=True), "without `fill`"),
        (lambda: ImportanceLevel(of="word", trl_level="token"), "of='word' is unknown"),
        (lambda: ImportanceLevel(of="token", trl_level="word"), "trl_level='word' is unknown"),
    ],
)
def test_an_entry_that_is_half_written(entry, told):
    with pytest.raises(ValueError, match=told):
        entry()


@pytest.mark.parametrize(
    "name", ["rollout_selection", "advantage_estimator", "importance_sampling_level", "trust_region", "refill_draws"]
)
@pytest.mark.parametrize("config_class", [GRPOConfig, PPOConfig, VAPOConfig])
def test_an_unknown_name(config_class, name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}='reinforced' is unknown. Choose one of "):
        config_class(**tiny.cpu_settings(tmp_path, **{name: "reinforced"}))


def test_estimators_with_and_without_a_critic(tmp_path):
    critics = {name for name, entry in ESTIMATORS.items() if entry.computed_by == "critic"}
    assert critics == {"gae"}
    with pytest.raises(ValueError, match="'gae' needs a critic"):
        GRPOConfig(**tiny.cpu_settings(tmp_path, advantage_estimator="gae"))
    with pytest.raises(ValueError, match="advantage_estimator='group' is unknown"):
        PPOConfig(**tiny.cpu_settings(tmp_path, advantage_estimator="group"))


def test_defaults_are_in_the_tables():
    defaults = {field.name: field.default for field in fields(GRPOConfig)}
    assert defaults["advantage_estimator"] in ESTIMATORS
    assert defaults["rollout_selection"] in SELECTIONS
    assert defaults["importance_sampling_level"] in IMPORTANCE_LEVELS
    assert defaults["trust_region"] in TRUST_REGIONS


@pytest.mark.train
def test_a_new_term_of_ppos_loss_is_a_function_and_an_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSS_TERMS, "squares", lambda logps, batch: logps.square())
    entropies = {}
    for weight in (0.0, 100.0):
        terms = {"squares": weight}
        settings = {"loss_terms": terms, "learning_rate": 1e-3, "num_iterations": 1, "max_steps": 3}
        trainer = tiny.trainer(PPOTrainer, tmp_path / str(weight), tiny.hashed, **settings)
        trainer.train()
        assert trainer.args.loss_terms == terms is not trainer.args.loss_terms
        entropies[weight] = [entry["entropy"] for entry in tiny.history(trainer)]
    assert entropies[0.0][0] == entropies[100.0][0] and entropies[0.0][1] != entropies[100.0][1]


def test_terms_of_the_loss_are_known(tmp_path):
    with pytest.raises(ValueError, match="a name in loss_terms='squares' is unknown"):
        PPOConfig(**tiny.cpu_settings(tmp_path, loss_terms={"squares": 1.0}))
    with pytest.raises(ValueError, match="loss_terms names 'positive_nll', whose weight is positive_nll_coef"):
        PPOConfig(**tiny.cpu_settings(tmp_path, loss_terms='{"positive_nll": 1.0}'))


def of_two_tokens(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that are told apart by their first token, 4 to 7 within a group, and are never overlong."""
    completions = [[4 + i % 4, 2] for i in range(len(prompts))]
    prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


def one_is_not_judged(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [(1.0, 1.0, None, 0.0)[ids[0] - 4] for ids in completion_ids]


def of_form(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [0.25 * (ids[0] - 4) for ids in completion_ids]


ESTIMATED: dict[str, tuple[type, dict[str, Any]]] = {
    "group": (GRPOTrainer, {}),
    "batch": (GRPOTrainer, {"scale_rewards": "batch"}),
    "normalised": (GRPOTrainer, {"multi_objective_aggregation": "normalize_then_sum"}),
    "leave_one_out": (GRPOTrainer, {"advantage_estimator": "leave_one_out"}),
    "refill": (GRPOTrainer, {"rollout_selection": "refill"}),
    "gae": (PPOTrainer, {"num_iterations": 1, "whiten_rewards": True}),
}


@pytest.mark.train
@pytest.mark.parametrize("case", ESTIMATED)
def test_a_punishment_for_length_is_no_score(tmp_path, case):
    """With DAPO's punishment, advantages are what they are without it where nothing is overlong."""
    trainer_class, settings = ESTIMATED[case]
    advantages = []
    for cache in (0, 1):
        trainer = tiny.trained(
            trainer_class,
            tmp_path,
            one_is_not_judged,
            {"rollout_func": of_two_tokens},
            **{"soft_punish_cache": cache, "max_steps": 1, **settings},
        )
        assert len(trainer.reward_funcs) == 1 + cache
        advantages.append(trainer.batches[0].output["advantages"].view(4, 4, -1))
    assert torch.equal(*advantages)
    assert not advantages[1][:, 2].any() and advantages[1][:, 0].any()
    if case == "group":  # among 1, 1 and 0
        assert advantages[1][0].flatten().tolist() == pytest.approx([0.5773, 0.5773, 0.0, -1.1545], abs=1e-3)


@pytest.mark.parametrize("estimator", ["group", "reinforce"])
def test_what_is_an_outcome_says_what_is_scored(tmp_path, estimator):
    settings = {"outcome_reward_funcs": ["one_is_not_judged"], "advantage_estimator": estimator, "max_steps": 1}
    arguments = {"rollout_func": of_two_tokens}
    trainer = tiny.trained(GRPOTrainer, tmp_path, [one_is_not_judged, of_form], arguments, **settings)
    advantages = trainer.batches[0].output["advantages"].view(4, 4)
    assert not advantages[:, 2].any()
    totals = torch.tensor([1.0, 1.25, 0.75])
    by_group = (totals - totals.mean()) / (totals.std() + 1e-4)
    expected = by_group if estimator == "group" else totals
    assert torch.allclose(advantages[:, [0, 1, 3]], expected.expand(4, 3), atol=1e-5)
    (log,) = tiny.history(trainer)
    assert log["reward"] == pytest.approx(1.0) and log["rewards/of_form/mean"] == pytest.approx(1 / 3)


# MaxRL


def test_maxrl_divides_by_the_share_that_is_solved(tmp_path):
    """Over all completions of a prompt, (1 − p)/p for those that solve it and −1 for the others; 0 where none does."""

    def seldom(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(ids[0] % 3 == 0) for ids in completion_ids]

    settings = {"advantage_estimator": "maxrl", "trust_region": "binary_tv", "max_steps": 1}
    trainer = tiny.trained(GRPOTrainer, tmp_path, seldom, **settings)
    (batch,) = trainer.batches
    solved = torch.tensor(seldom(batch.completions)).view(4, 4)
    shares = solved.mean(dim=1)
    assert {0.0} < set(shares.tolist())
    advantages = batch.output["advantages"].view(4, 4)
    for of_group, found, p in zip(solved, advantages, shares.tolist(), strict=True):
        expected = [((1 - p) / p if right else -1.0) if p else 0.0 for right in of_group.tolist()]
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for paper in ("2402.03300", "2602.02710", "2602.04879"):  # GRPO's by TRL, MaxRL's and DPPO's
        assert card.count(f"https://huggingface.co/papers/{paper}") == 1
    assert "@article{tajwar2026maxrl" in card and "@article{qi2026rethinking" in card


def test_maxrl_takes_no_negative_rewards(tmp_path):
    def punished(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [-0.5 * (i == 3) for i in range(len(completion_ids))]

    settings = {"advantage_estimator": "maxrl", "reward_weights": [1.0, 2.0]}
    constant = tiny.trainer(GRPOTrainer, tmp_path, [tiny.constant, punished], **settings)
    told = "a completion has the reward -1 .`constant` 0, `punished` -0.5.. Return rewards of 0 and more"
    with pytest.raises(RewardFunctionError, match=told):
        constant.train()


@pytest.mark.parametrize(
    ("config_class", "changed", "told"),
    [
        (GRPOConfig, {"scale_rewards": "group"}, "a group already. Set scale_rewards to 'none'"),
        (GRPOConfig, {"scale_rewards": "batch"}, "a group already. Set scale_rewards to 'none'"),
        (GRPOConfig, {"multi_objective_aggregation": "normalize_then_sum"}, "makes rewards negative"),
        (GRPOConfig, {"reinforce_baseline_momentum": 0.9}, "Set advantage_estimator='reinforce'"),
        (DAPOConfig, {"max_completion_length": 50}, "soft_punish_cache=10 adds a negative reward"),
        (RLOOConfig, {"beta": 0.1}, "beta=0.1 subtracts a KL from the rewards"),
    ],
)
def test_what_maxrl_refuses(config_class, changed, told, tmp_path):
    with pytest.raises(ValueError) as error:
        config_class(**tiny.cpu_settings(tmp_path, advantage_estimator="maxrl", **changed))
    assert told in str(error.value)
