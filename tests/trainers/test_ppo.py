"""PPO through real training: how the critic learns, what is generated from, and what the coefficients follow."""

import copy
import itertools
import math
import statistics
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import Qwen2ForSequenceClassification, TrainerCallback
from trl.kernels import chunked_logprob

from trl_ext import PPOTrainer, RewardFunctionError
from trl_ext.roles.critic import HeadCritic, ModelCritic
from trl_ext.trainers.seams.critic import CPU_TILE


class Weights(TrainerCallback):
    """All weights before each optimizer step, and after the last."""

    def __init__(self) -> None:
        self.at: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.at.append(tiny.weights(model))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.at.append(tiny.weights(model))

    def moved(self, critic: bool) -> list[bool]:
        """Whether any weight of the critic, or of the policy, moved in each step."""
        names = [name for name in self.at[0] if ("critic." in name) == critic]
        return [
            any(not torch.equal(before[name], after[name]) for name in names)
            for before, after in itertools.pairwise(self.at)
        ]


def classifier(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = copy.deepcopy(tiny.qwen2().config)
    config.num_labels = 1
    return Qwen2ForSequenceClassification(config)


def lora() -> LoraConfig:
    # B is not zero, so that A has a gradient too
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)


def build(tmp_path: Any, reward: Any = tiny.hashed, arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    """8 completions a generation batch, one optimizer step on each."""
    settings = {
        "num_generations": 1,
        "num_iterations": 1,
        "per_device_train_batch_size": 4,
        "kl_coef": 0.1,
        "critic_learning_rate": 0.1,
        **settings,
    }
    return tiny.trainer(tiny.recorded(PPOTrainer), tmp_path, reward, arguments, **settings)


def run(
    tmp_path: Any,
    reward: Any = tiny.hashed,
    arguments: dict[str, Any] | None = None,
    build: Any = build,
    **settings: Any,
) -> Any:
    weights = Weights()
    trainer = build(tmp_path, reward, {**(arguments or {}), "callbacks": [weights]}, **settings)
    trainer.train()
    trainer.weights = weights
    return trainer


# How the critic learns


@pytest.mark.train
def test_the_critic_has_its_own_learning_rate(tmp_path):
    rates = []
    for rate in (0.01, 0.03):
        trainer = run(tmp_path / str(rate), optim="sgd", critic_learning_rate=rate, max_steps=1, max_grad_norm=0.0)
        before, after = trainer.weights.at
        rates.append({name: after[name] - before[name] for name in before})
    for name, one in rates[0].items():
        factor = 3.0 if "critic." in name else 1.0
        torch.testing.assert_close(rates[1][name], factor * one, rtol=1e-4, atol=1e-7)
    assert any(one.any() for name, one in rates[0].items() if "critic." in name)


@pytest.mark.parametrize(
    ("settings", "arguments", "factor"),
    [
        ({}, {}, 100),
        ({"critic": "model"}, {}, 1),
        ({}, {"value_model": classifier}, 1),
        ({"critic": "model"}, {"value_model": classifier}, 1),
        ({"critic": "adapter"}, {"peft_config": lora}, 10),
    ],
    ids=["head", "model", "value model", "both", "adapter"],
)
def test_learning_rates_that_nobody_set(settings, arguments, factor, tmp_path):
    made = {name: make() for name, make in arguments.items()}
    trainer = build(tmp_path, arguments=made, critic_learning_rate=None, learning_rate=1e-3, **settings)
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    assert {group.get("is_critic", False) for group in groups} == {True, False}
    for group in groups:
        assert group["lr"] == pytest.approx(1e-3 * (factor if group.get("is_critic") else 1))


@pytest.mark.parametrize("critic", ["model", "adapter"])
@pytest.mark.parametrize("arguments", [{}, {"peft_config": lora()}], ids=["full", "lora"])
def test_every_weight_is_in_one_group(arguments, critic, tmp_path):
    if critic == "adapter" and not arguments:
        pytest.skip("an adapter needs one of the policy's")
    trainer = build(tmp_path, arguments=arguments, critic=critic, weight_decay=0.1)
    trainer.create_optimizer()
    trainer.create_optimizer()  # as some backends do
    grouped = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    trainable = [id(p) for p in trainer.model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    of_critic = {id(p) for group in trainer.optimizer.param_groups if group.get("is_critic") for p in group["params"]}
    assert of_critic == {id(p) for p in trainer.critic.trained_parameters()} >= {*map(id, trainer.critic.parameters())}
    # Norms and biases don't decay, the critic's neither
    decays = [(group.get("is_critic", False), group["weight_decay"]) for group in trainer.optimizer.param_groups]
    assert {(True, 0.1), (True, 0.0), (False, 0.1)} <= set(decays)


@pytest.mark.train
def test_an_optimizer_that_was_there_before_the_critic(tmp_path):
    model = tiny.stopping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = run(tmp_path, arguments={"model": model, "optimizers": (optimizer, None)})
    assert trainer.weights.moved(critic=True) == trainer.weights.moved(critic=False) == [True, True]


def test_a_schedule_that_was_there_before_the_critic_is_refused(tmp_path):
    model = tiny.stopping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="`optimizers` holds a learning-rate schedule"):
        build(tmp_path, arguments={"model": model, "optimizers": (optimizer, schedule)})


# Where a critic comes from


def test_kinds_of_critics(tmp_path):
    head = build(tmp_path, critic_head="mlp", critic_trunk_grad=0.25).critic
    assert isinstance(head, HeadCritic)
    assert (head.head.kind, head.trunk_grad) == ("mlp", 0.25)
    plain = build(tmp_path).critic
    assert (plain.head.kind, plain.trunk_grad) == ("linear", 0.0)
    policy = build(tmp_path, critic="model").critic
    assert isinstance(policy, ModelCritic) and not policy.score.weight.any()
    value_model = classifier(5)
    brought = build(tmp_path, arguments={"value_model": value_model}).critic
    assert brought.score is value_model.score


@pytest.mark.train
def test_a_critic_from_the_reward_model_is_a_copy(tmp_path):
    judge = classifier(4)
    before = tiny.weights(judge)
    arguments = {"reward_model": judge, "reward_processing_classes": tiny.tokenizer()}
    trainer = run(tmp_path, None, arguments, critic="model", critic_init="reward")
    assert trainer.weights.moved(critic=True) == [True, True]
    assert torch.equal(trainer.weights.at[0]["critic.score.weight"], before["score.weight"])
    assert all(torch.equal(value, before[name]) for name, value in judge.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_critic_from_the_name_of_the_policy_starts_at_zero_in_its_type(dtype, tmp_path):
    tiny.stopping().to(dtype).save_pretrained(tmp_path / "policy")
    trainer = build(tmp_path, arguments={"model": str(tmp_path / "policy")}, critic="model")
    # TRL loads what it trains in float32, whatever type its file has
    assert trainer.critic.score.weight.dtype == trainer.model.lm_head.weight.dtype == torch.float32
    assert not trainer.critic.score.weight.any()
    weight = trainer.critic.backbone.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, trainer.model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.train
def test_a_head_stays_in_float32_on_a_policy_in_bfloat16(tmp_path):
    trainer = run(tmp_path, arguments={"model": tiny.stopping().to(torch.bfloat16)}, critic_head="mlp")
    assert trainer.model.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainer.critic.parameters()} == {torch.float32}
    assert {trainer.batches[0].output[name].dtype for name in ("old_values", "returns")} == {torch.float32}
    assert trainer.weights.moved(critic=True) == [True, True]


@pytest.mark.train
def test_an_adapted_policy_with_a_critic_of_its_own(tmp_path):
    model = get_peft_model(tiny.stopping(), lora())
    trainer = run(tmp_path, arguments={"model": model}, critic="model")
    assert trainer.weights.moved(critic=True) == trainer.weights.moved(critic=False) == [True, True]
    assert not any("lora_" in name for name, _ in trainer.critic.named_parameters())
    assert all(parameter.requires_grad for parameter in trainer.critic.parameters())
    base = [n for n, _ in trainer.model.named_parameters() if "lora_" not in n and "critic." not in n]
    first, last = trainer.weights.at[0], trainer.weights.at[-1]
    assert all(torch.equal(first[name], last[name]) for name in base)


def test_dropout_is_off_in_the_critic_where_it_is_off_in_the_policy(tmp_path):
    value_model = classifier()
    value_model.model.extra = torch.nn.Dropout(0.5)
    critic = build(tmp_path, arguments={"value_model": value_model}, disable_dropout=True).critic
    assert all(module.p == 0 for module in critic.modules() if isinstance(module, torch.nn.Dropout))


# Values, column by column


@pytest.mark.parametrize("fit", [True, False])
def test_a_value_stands_beside_the_token_that_is_written_in_its_state(fit, tmp_path):
    trainer = build(tmp_path, fit_micro_batches=fit, max_steps=1, bootstrap_truncated=True, lam=1.0, kl_coef=0.0)
    head = trainer.critic.head.out
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, 16, generator=torch.Generator().manual_seed(1)))
        head.bias.fill_(0.3)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    trainer.train()
    model, (batch,) = tiny.stopping(), trainer.batches

    def value(ids: list[int]) -> float:
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return float(functional.linear(hidden, weight, bias))

    lengths = set()
    for row, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        for t in range(len(completion)):
            expected = value(prompt + completion[:t])
            assert batch.output["old_values"][row, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert not batch.output["old_values"][row, len(completion) :].any()
        # With λ = 1 the return of every token is the reward and, where it was cut off, the value of the last state
        after = 0.0 if completion[-1] == 2 else value(prompt + completion)
        expected = tiny.hashed([completion])[0] + after
        returns = batch.output["returns"][row, : len(completion)]
        torch.testing.assert_close(returns, torch.full_like(returns, expected), rtol=1e-4, atol=1e-4)
        lengths.add((len(completion), completion[-1] == 2))
    assert len(lengths) > 2 and {ended for _, ended in lengths} == {True, False}


# KL


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda d: d),
        ("k2", lambda d: d**2 / 2),
        ("k3", lambda d: math.exp(-d) - 1 + d),
    ],
)
def test_the_kl_to_a_reference_of_the_users_is_a_reward(estimator, formula, tmp_path):
    trainer = run(
        tmp_path,
        arguments={"ref_model": tiny.stopping(3)},
        kl_coef=0.2,
        kl_estimator=estimator,
        lam=1.0,
        max_steps=1,
        whiten_advantages=False,
    )
    (batch,), (log,) = trainer.batches, tiny.history(trainer)
    policy, reference, divergences = tiny.stopping(), tiny.stopping(3), []
    for row, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        ids = torch.tensor([prompt + completion])
        logps, others = (
            model(ids)
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(dim=-1)
            .gather(1, torch.tensor(completion).unsqueeze(1))
            for model in (policy, reference)
        )
        by_token = [formula(d) for d in (logps - others).flatten().tolist()]
        score = tiny.hashed([completion])[0]
        # The punishment of a token counts for it and for all before it
        to_go = [score - 0.2 * sum(by_token[t:]) for t in range(len(completion))]
        assert batch.output["returns"][row, : len(completion)].tolist() == pytest.approx(to_go, rel=1e-4, abs=1e-4)
        divergences.append(sum(by_token))
    kl = statistics.fmean(divergences)
    assert abs(kl) > 0.1
    assert log["objective/kl"] == pytest.approx(kl, rel=1e-4)
    assert log["objective/non_score_reward"] == pytest.approx(-0.2 * kl, rel=1e-4)
    scores = statistics.fmean(tiny.hashed(batch.completions))
    assert log["objective/scores"] == pytest.approx(scores)
    assert log["objective/rlhf_reward"] == pytest.approx(scores - 0.2 * kl, rel=1e-4)
    # and is in the loss no more
    assert "ref_per_token_logps" not in trainer.losses[0] and "kl" not in log


def next_coef(coef: float, kl: float, rule: str) -> float:
    """By the sources, with target 0.5, 8 completions a batch, a horizon of 40 and a rate of 0.3."""
    if rule == "ppo":
        return coef / 2 if kl < 0.5 / 1.5 else coef * 2 if kl > 0.5 * 1.5 else coef
    if rule == "proportional":
        return coef * (1 + min(max(kl / 0.5 - 1, -0.2), 0.2) * 8 / 40)
    return coef * math.exp(0.3 * (kl - 0.5))


@pytest.mark.train
@pytest.mark.parametrize("place", ["kl_coef", "beta"])
@pytest.mark.parametrize("rule", ["ppo", "proportional", "exponential"])
def test_the_coefficient_follows_its_target(rule, place, tmp_path):
    settings = {"kl_coef": 0.0, place: 0.1}
    trainer = run(
        tmp_path,
        kl_rule=rule,
        kl_target=0.5,
        kl_horizon=40,
        kl_rate=0.3,
        learning_rate=3e-2,
        max_steps=5,
        updates_per_generation=1,
        **settings,
    )
    logs, coef, seen = tiny.history(trainer), 0.1, set()
    for log in logs:
        assert log["objective/kl_coef"] == pytest.approx(coef, rel=1e-5)
        punished = log["objective/non_score_reward"]
        assert punished == pytest.approx(-coef * log["objective/kl"] if place == "kl_coef" else 0.0, rel=1e-4)
        coef = next_coef(coef, log["objective/kl"], rule)
        seen.add(coef > 0.1)
    assert (trainer.kl_coef or trainer.beta) == pytest.approx(coef, rel=1e-5)
    assert coef != 0.1
    # The step itself has the new one: TRL's loss reads it
    assert (trainer.beta > 0) == (place == "beta")


@pytest.mark.train
def test_a_coefficient_without_a_target_stays(tmp_path):
    trainer = run(tmp_path, max_steps=3)
    assert [log["objective/kl_coef"] for log in tiny.history(trainer)] == [0.1] * 3


@pytest.mark.train
def test_an_evaluation_leaves_the_coefficient_and_the_scale_alone(tmp_path):
    settings = {"kl_target": 1e-3, "kl_rule": "ppo", "reward_scaling": "running", "learning_rate": 3e-2}
    trainer = run(tmp_path, arguments={"eval_dataset": tiny.prompts(4)}, max_steps=2, **settings)
    before = copy.deepcopy(trainer.run_state())
    metrics = trainer.evaluate()
    after = trainer.run_state()
    assert all(before[name] == after[name] for name in ("kl_coef", "beta", "old_kl_coef", "reward_scale"))
    assert math.isfinite(metrics["eval_loss"]) and metrics["eval_objective/kl"] != 0


@pytest.mark.train
def test_the_coefficient_of_the_old_policy_follows_what_its_batch_did(tmp_path):
    # Three updates a batch; the KL of the last one decides on the coefficient of the next batch
    trainer = run(
        tmp_path,
        old_kl_coef=1.0,
        old_kl_target=0.02,
        learning_rate=1e-2,
        num_iterations=3,
        max_steps=9,
    )
    logs, coef = tiny.history(trainer), 1.0
    assert all(log["policy/old_kl"] >= 0 for log in logs)
    assert logs[0]["policy/old_kl"] == pytest.approx(0, abs=1e-7)  # nothing has moved yet
    for last, following in ((logs[2], logs[3]), (logs[5], logs[6])):
        kl = last["policy/old_kl"]
        coef = coef / 2 if kl < 0.02 / 1.5 else coef * 2 if kl > 0.02 * 1.5 else coef
        assert following["policy/old_kl_coef"] == coef
    assert trainer.old_kl_coef == coef != 1.0


# Micro-batches


@pytest.mark.train
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"critic": "model", "critic_learning_rate": 1e-2},
        {"critic_head": "mlp", "critic_trunk_grad": 0.5, "loss_type": "grpo"},
        {"replay_ratio": 0.5, "positive_nll_coef": 0.1, "old_kl_coef": 0.1},
    ],
    ids=["head", "model", "shared", "replay"],
)
def test_micro_batches_that_fit_train_the_same_weights(settings, tmp_path):
    # Rows that nothing scores have no advantage, and in the second epoch they move the critic all the same
    def sometimes(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [
            None if ids[0] % 2 else score
            for ids, score in zip(completion_ids, tiny.hashed(completion_ids), strict=True)
        ]

    settings = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.05,
        "num_iterations": 2,
        "max_steps": 4,
        **settings,
    }
    runs = [run(tmp_path / str(fit), sometimes, fit_micro_batches=fit, **settings) for fit in (True, False)]
    assert any(not row.any() for batch in runs[0].batches for row in batch.output["advantages"])
    (fitted, plain), start = ([w.weights.at[-1] for w in runs]), runs[0].weights.at[0]

    def moved(end: dict[str, torch.Tensor], critic: bool) -> torch.Tensor:
        return torch.cat([(end[n] - start[n]).flatten() for n in start if ("critic." in n) == critic])

    for critic in (True, False):
        assert (moved(fitted, critic) - moved(plain, critic)).norm() <= 1e-5 * moved(plain, critic).norm()
    assert (
        runs[0].saved_compute.regrouped_rows > 0
        and runs[0].saved_compute.token_slots <= runs[0].saved_compute.token_slots_trl
    )


# The first pass of the loss, in place of the old policy's


def milestones(completion_ids: list[list[int]], **columns: Any) -> list[Any]:
    """Steps for some, one number for the others, nothing for a few."""
    scores = tiny.hashed(completion_ids)
    found: list[Any] = []
    for ids, score in zip(completion_ids, scores, strict=True):
        found.append([(0, score), (len(ids) - 1, 0.5)] if ids[0] % 3 == 1 else None if ids[0] % 3 else score)
    return found


@pytest.mark.train
@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, {}),
        ({"critic": "model", "kl_coef": 0.0, "beta": 0.1, "whiten_rewards": True}, {}),
        ({"critic_trunk_grad": 0.5, "lam_alpha": 0.3, "positive_nll_coef": 0.1}, {"peft_config": lora()}),
        ({"bootstrap_truncated": True, "missing_eos_penalty": 0.5, "fit_micro_batches": False}, {}),
    ],
    ids=["head", "model", "lora", "bootstrap"],
)
def test_the_first_pass_of_the_loss_stands_for_the_old_policys(settings, arguments, tmp_path, monkeypatch):
    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_iterations": 2,
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.05,
        "logging_steps": 1,
        **settings,
    }
    passes: list[int] = []
    runs = []
    for late in (True, False):
        monkeypatch.setattr(PPOTrainer, "may_credit_late", late)
        trainer = build(tmp_path / str(late), milestones, copy.deepcopy(arguments), **settings)
        weights, made = Weights(), passes.append
        passes.clear()
        trainer.add_callback(weights)
        base = trainer.model.get_base_model() if arguments else trainer.model
        base.register_forward_pre_hook(
            lambda module, args, kwargs, made=made: made(1) if kwargs.get("fused_lm_head") else None, with_kwargs=True
        )
        trainer.train()
        trainer.weights, trainer.passes = weights, len(passes)
        runs.append(trainer)
    late, early = runs
    assert early.passes - late.passes == 2  # one for each generation batch
    start = late.weights.at[0]
    for critic in (True, False):
        names = [name for name in start if ("critic." in name) == critic]
        moved = [torch.cat([(run.weights.at[-1][n] - start[n]).flatten() for n in names]) for run in runs]
        assert moved[1].norm() > 0 and (moved[0] - moved[1]).norm() <= 1e-5 * moved[1].norm()
    assert "val/explained_variance" in early.state.log_history[0]
    for ours, theirs in zip(late.state.log_history[:-1], early.state.log_history[:-1], strict=True):
        logged = {key for key in theirs if key.startswith(("objective/", "val/", "loss/", "policy/", "reward"))}
        assert logged <= ours.keys()
        for key in logged:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5, nan_ok=True), key


def test_advantages_are_there_before_the_loss_where_completions_are_shown(tmp_path):
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert build(tmp_path, **settings).may_credit_late
    assert not build(tmp_path, log_completions=True, **settings).may_credit_late
    assert not build(tmp_path, replay_ratio=0.5, **settings).may_credit_late
    assert not build(tmp_path).may_credit_late


# Prompts that come as ids


def as_ids(count: int = 16, padded: bool = False) -> Dataset:
    rows = [tiny.tokenizer()(text)["input_ids"] for text in tiny.prompts(count)["prompt"]]
    rows = [ids * (1 + i % 3) for i, ids in enumerate(rows)]
    if not padded:
        return Dataset.from_dict({"input_ids": rows, "target": list(range(count))})
    masks = [[0] * (6 - len(ids)) + [1] * len(ids) for ids in rows]
    return Dataset.from_dict({"input_ids": [[0] * (6 - len(ids)) + ids for ids in rows], "attention_mask": masks})


@pytest.mark.train
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_completions_are_generated_from_exactly_the_ids(padded, drop, tmp_path):
    reward = tiny.Remembering(tiny.hashed)
    trainer = run(tmp_path, reward, {"train_dataset": as_ids(padded=padded)}, remove_unused_columns=drop)
    known = {tuple(ids) for ids in as_ids()["input_ids"]}
    prompts = [tuple(ids) for batch in trainer.batches for ids in batch.prompts]
    assert len(prompts) == 16 and set(prompts) <= known and {len(ids) for ids in prompts} == {2, 4, 6}
    # Reward functions see their text
    shown = [prompt for call in reward.calls for prompt in call.prompts]
    assert shown == [tiny.tokenizer().decode(ids) for ids in prompts]


@pytest.mark.train
def test_groups_of_tokenised_prompts_can_be_refilled(tmp_path):
    trainer = run(
        tmp_path,
        tiny.first_token_even,
        {"train_dataset": as_ids()},
        num_generations=2,
        rollout_selection="refill",
        refill_draws="informed",
        similar_prompts_columns=["target"],
        remove_unused_columns=False,
    )
    known = {tuple(ids) for ids in as_ids()["input_ids"]}
    assert any(len(batch.rounds) > 1 for batch in trainer.batches)
    assert all(tuple(ids) in known for batch in trainer.batches for ids in batch.prompts)


@pytest.mark.train
def test_a_reward_model_scores_ids(tmp_path):
    judge = classifier(4)
    trainer = run(tmp_path, None, {"train_dataset": as_ids(), "reward_model": judge}, kl_coef=0.0, lam=1.0)
    batch = trainer.batches[0]
    for row, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        score = judge(torch.tensor([prompt + completion])).logits.item()
        assert batch.output["returns"][row, 0].item() == pytest.approx(score, rel=1e-4, abs=1e-5)
    assert not any(parameter.requires_grad for parameter in judge.parameters())


@pytest.mark.train
def test_a_reward_model_joins_reward_functions(tmp_path):
    judge = classifier(4)
    arguments = {"train_dataset": as_ids(), "reward_model": judge}
    trainer = run(
        tmp_path, [tiny.hashed, tiny.low_ids], arguments, reward_weights=[1.0, 0.5, 2.0], kl_coef=0.0, lam=1.0
    )
    batch = trainer.batches[0]
    for row, (prompt, ids) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        score = (
            tiny.hashed([ids])[0]
            + 0.5 * tiny.low_ids([ids])[0]
            + 2.0 * judge(torch.tensor([prompt + ids])).logits.item()
        )
        assert batch.output["returns"][row, 0].item() == pytest.approx(score, rel=1e-4, abs=1e-5)


def test_a_reward_model_reads_text_where_prompts_are_text(tmp_path):
    judge, tokenizer = classifier(4), tiny.tokenizer()
    trainer = run(tmp_path, None, {"reward_model": judge}, kl_coef=0.0, lam=1.0, max_steps=1)
    (batch,) = trainer.batches
    # TRL joins prompt and completion without a space between them, and this tokenizer knows whole words only
    for row, (prompt, ids) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        text = tokenizer.decode(prompt) + tokenizer.decode(ids, skip_special_tokens=True)
        score = judge(**tokenizer(text, return_tensors="pt")).logits.item()
        assert batch.output["returns"][row, 0].item() == pytest.approx(score, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_only_one_of_two_data_sets_as_ids_is_refused(which, tmp_path):
    arguments = {"train_dataset": tiny.prompts(16), "eval_dataset": tiny.prompts(4), "reward_model": classifier()}
    with pytest.raises(ValueError, match="Bring both as ids, or both as `prompt`"):
        build(tmp_path, None, {**arguments, which: as_ids()})


# Ends of completions


def test_a_token_of_the_users_ends_completions(tmp_path):
    # w5 (id 9) is what this model writes most often
    trainer = run(tmp_path, tiny.constant, stop_token_id=9, missing_eos_penalty=1.0, kl_coef=0.0, lam=1.0, max_steps=1)
    (batch,), ended = trainer.batches, []
    for row, ids in enumerate(batch.completions):
        assert 9 not in ids[:-1] and 0 not in ids  # nothing comes after it, padding neither
        ended.append(ids[-1] == 9)
        assert batch.output["returns"][row, 0].item() == (0.0 if ended[-1] else -1.0)
    assert 0 < sum(ended) < len(ended)
    assert tiny.history(trainer)[0]["completions/clipped_ratio"] == pytest.approx(1 - sum(ended) / len(ended))


# Replay


@pytest.mark.train
def test_replayed_rows_keep_what_they_were_sampled_with(tmp_path):
    # Half of each step comes from earlier batches; the first has none
    trainer = run(
        tmp_path, replay_ratio=0.5, replay_capacity=2, max_steps=4, learning_rate=3e-2, positive_nll_coef=0.1
    )
    logged = [log["replay/ratio"] for log in tiny.history(trainer)]
    assert logged == [0.0, 0.5, 0.5, 0.5]
    columns = ("old_per_token_logps", "old_values", "returns", "advantages")
    born: dict[Any, tuple[int, dict[str, list[float]]]] = {}
    for number, batch in enumerate(trainer.batches):
        for row, key in enumerate(zip(map(tuple, batch.prompts), map(tuple, batch.completions), strict=True)):
            length = len(key[1])
            values = {name: batch.output[name][row, :length].tolist() for name in columns}
            assert key not in born
            born[key] = number, values | {"is_right": batch.output["is_right"][row].item()}
    ages = []
    for step in range(4):
        window = trainer.losses[2 * step : 2 * step + 2]
        seen = []
        for inputs in window:
            for row in range(len(inputs["completion_ids"])):
                shown, written = inputs["prompt_mask"][row].bool(), inputs["completion_mask"][row].bool()
                key = (
                    tuple(inputs["prompt_ids"][row][shown].tolist()),
                    tuple(inputs["completion_ids"][row][written].tolist()),
                )
                number, values = born[key]
                assert all(inputs[name][row][written].tolist() == values[name] for name in columns)
                assert inputs["is_right"][row].item() == values["is_right"]
                seen.append(key)
                ages.append(step - number)
            # The normaliser counts every token of the step
        assert len(seen) == len(set(seen)) == (8 if step == 0 else 16)
        tokens = sum(int(inputs["completion_mask"].sum()) for inputs in window)
        assert all(int(inputs["num_items_in_batch"]) == tokens for inputs in window)
        right = sum(float((inputs["completion_mask"].sum(1) * inputs["is_right"]).sum()) for inputs in window)
        assert all(float(inputs["right_share"]) == pytest.approx(right / tokens) for inputs in window)
        assert sum(born[key][0] == step for key in seen) == 8  # all new rows are among them
    assert set(ages) == {0, 1, 2}  # and none is older than two batches


@pytest.mark.train
def test_the_share_of_replayed_rows(tmp_path):
    # A quarter of a step: 4 new rows of a micro-batch and 1 old one are the nearest
    trainer = run(tmp_path, replay_ratio=0.25, max_steps=2)
    assert trainer.args.replayed_rows == 1
    assert tiny.history(trainer)[1]["replay/ratio"] == pytest.approx(2 / 10)


@pytest.mark.train
def test_replay_with_copies_and_with_mini_batches(tmp_path):
    # Some batches have copies, others don't
    def reward(completion_ids: Any, trainer_state: Any, **columns: Any) -> list[float]:
        judge = tiny.first_token_even if trainer_state.global_step % 3 == 2 else tiny.hashed
        return judge(completion_ids)

    settings = {"num_generations": 2, "rollout_selection": "duplicate", "replay_ratio": 0.5, "max_steps": 6}
    trainer = run(tmp_path, reward, token_normalization="mini_batch", **settings)
    copied = [batch.selection.sources != list(range(4)) for batch in trainer.batches]
    assert True in copied and False in copied
    for inputs in trainer.losses[2:]:
        assert len(inputs["completion_ids"]) >= 4


# A reference that follows


@pytest.mark.train
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_a_reference_is_refreshed(alpha, tmp_path):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": alpha}
    trainer = run(tmp_path, learning_rate=3e-2, max_steps=5, **settings)
    reference, at = tiny.weights(tiny.stopping()), trainer.weights.at
    for step in (2, 4):  # TRL mixes after those steps
        reference = {name: (1 - alpha) * value + alpha * at[step][name] for name, value in reference.items()}
    for name, value in trainer.accelerator.unwrap_model(trainer.ref_model).state_dict().items():
        torch.testing.assert_close(value, reference[name])
    kls = [log["objective/kl"] for log in tiny.history(trainer)]
    assert kls[0] == kls[2] * (alpha == 1.0) == kls[4] * (alpha == 1.0) == pytest.approx(0, abs=1e-6)
    assert kls[1] != 0


@pytest.mark.train
@pytest.mark.parametrize("critic", ["head", "model"])
def test_the_reference_of_an_adapter_is_refreshed(critic, tmp_path):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "critic": critic}
    trainer = run(tmp_path, arguments={"peft_config": lora()}, learning_rate=3e-2, max_steps=5, **settings)
    at, names = trainer.weights.at, [name for name in trainer.weights.at[0] if ".default." in name]
    assert names and not any("critic" in name for name in names)
    for name in names:
        own = [weights[name.replace(".default.", ".ref.")] for weights in at]
        # It starts as the policy does, follows after steps 2 and 4, and is not trained
        for step, since in ((0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 4)):
            assert torch.equal(own[step], at[since][name])
    assert trainer.weights.moved(critic=True) == [True] * 5
    kls = [log["objective/kl"] for log in tiny.history(trainer)]
    assert kls[0] == pytest.approx(0, abs=1e-6) and kls[2] == pytest.approx(0, abs=1e-6)
    assert kls[1] != 0 and kls[3] != 0


@pytest.mark.train
def test_the_reference_of_an_adapter_without_effect_is_the_model_without_it(tmp_path):
    arguments = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    trainer = run(tmp_path, arguments=arguments, max_steps=2, learning_rate=3e-2, kl_coef=0.5, lam=1.0)
    batch, base = trainer.batches[1], tiny.stopping()
    total = 0.0
    for row, (prompt, ids) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        logits = base(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        reference = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids).unsqueeze(1)).sum()
        total += (batch.output["old_per_token_logps"][row, : len(ids)].sum() - reference).item()
    kls = [log["objective/kl"] for log in tiny.history(trainer)]
    assert kls == [pytest.approx(0, abs=1e-6), pytest.approx(total / 8, rel=1e-4)]
    assert abs(total) > 1e-2 and list(trainer.model.peft_config) == ["default"]


@pytest.mark.train
def test_values_are_not_computed_for_the_reference(tmp_path):
    # Under PEFT the reference is the same model: without gradients, it makes every other pass of the actor
    trainer = build(tmp_path, arguments={"peft_config": lora()}, critic="model", max_steps=2)
    passes: dict[str, int] = {"actor": 0, "critic": 0}

    def count(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            fused = name == "critic" or kwargs.get("fused_lm_head", False)
            passes[name] += fused and not torch.is_grad_enabled()

        return hook

    trainer.model.get_base_model().register_forward_pre_hook(count("actor"), with_kwargs=True)
    trainer.critic.register_forward_pre_hook(count("critic"), with_kwargs=True)
    trainer.train()
    assert passes["actor"] == 2 * passes["critic"] > 0


# Adapters


def test_tiles_of_the_head_are_small_in_training_alone(tmp_path):
    before, sizes = chunked_logprob.TOKEN_CHUNK_SIZE, []

    def fails_at_last(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        sizes.append(chunked_logprob.TOKEN_CHUNK_SIZE)
        if len(sizes) > 2:
            raise ValueError("no more")
        return [1.0] * len(completion_ids)

    trainer = build(tmp_path, fails_at_last, max_steps=4)
    trainer.evaluate(trainer.train_dataset.take(4))
    with pytest.raises(RewardFunctionError):
        trainer.train()
    assert sizes[0] == before and set(sizes[1:]) == {CPU_TILE} and before == chunked_logprob.TOKEN_CHUNK_SIZE


@pytest.mark.train
def test_checkpoints_of_activations_change_nothing(tmp_path):
    ends = []
    for checkpointing in (False, True):
        trainer = run(
            tmp_path / str(checkpointing),
            arguments={"peft_config": lora()},
            gradient_checkpointing=checkpointing,
            critic_trunk_grad=0.5,
            optim="sgd",
            max_steps=2,
        )
        ends.append(trainer.weights.at[-1])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)


# Text beside the rollouts


@pytest.mark.train
def test_every_row_of_the_text_has_its_turn(tmp_path):
    texts = Dataset.from_dict({"text": [f"w{i}" for i in range(10)]})
    settings = {"ptx_coef": 0.1, "ptx_batch_size": 3, "max_steps": 3, "critic_warmup_steps": 1}
    trainer = run(tmp_path, arguments={"ptx_dataset": texts}, **settings)
    # 2 micro-batches of 3 rows a step, and none while only the critic moves
    assert trainer._ptx.state_dict() == {"epoch": 1, "position": 2}


# Evaluation and the best checkpoint


@pytest.mark.train
def test_the_best_checkpoint_brings_its_critic(tmp_path):
    trainer = run(
        tmp_path,
        arguments={"eval_dataset": tiny.prompts(4)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_num_tokens",  # grows: the first is the best
        greater_is_better=False,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    end = tiny.weights(trainer.model)
    assert all(torch.equal(value, end[name]) for name, value in trainer.weights.at[1].items())
    assert any(not torch.equal(value, end[name]) for name, value in trainer.weights.at[3].items())
