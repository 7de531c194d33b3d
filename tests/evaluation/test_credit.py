"""Credit by token: what a critic is said to think of a completion, computed a second time one completion at a time."""

import copy
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig

from trl_ext import PPOTrainer
from trl_ext.evaluation.credit import TokenCredit, credit_by_token


ROWS = list(tiny.prompts(6))
GAMMA, LAM, KL_COEF = 0.9, 0.8, 0.3


def by_position(completion_ids: list[list[int]], **kwargs: Any) -> list[list[tuple[int, float]]]:
    """A reward for the first token, and one for the last."""
    return [[(0, 0.5), (len(ids) - 1, ids[-1] / 10)] for ids in completion_ids]


def trained(tmp_path: Any, rewards: Any, **arguments: Any) -> Any:
    """A trainer whose policy has moved away from its reference, and whose critic has learned something."""
    settings = {"gamma": GAMMA, "lam": LAM, "kl_coef": KL_COEF, "critic_learning_rate": 0.1, "critic_head": "mlp"}
    trainer = tiny.trainer(
        PPOTrainer, tmp_path, rewards, arguments, max_steps=3, reward_weights=[2.0, 1.0], **settings
    )
    trainer.train()
    return trainer


def logps_of(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)


@torch.no_grad()
def slowly(trainer: Any, rollout: Any, rewards: list[float]) -> TokenCredit:
    """The same for one completion: plain logits, the head on hidden states, the recursion of the advantage."""
    prompt, completion = rollout.prompt_ids, rollout.completion_ids
    policy = trainer.model
    logps = logps_of(policy, prompt, completion)
    if trainer.ref_model is None:
        with policy.disable_adapter():
            reference = logps_of(policy, prompt, completion)
    else:
        reference = logps_of(trainer.ref_model, prompt, completion)
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    hidden = base.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state
    values = trainer.critic.head(hidden)[0, len(prompt) - 1 : -1]
    token_rewards = -KL_COEF * (logps - reference)
    token_rewards[-1] += 2.0 * rewards[0]
    if rollout.step_rewards:
        for position, reward in by_position([completion])[0]:
            token_rewards[position] += reward
    else:
        token_rewards[-1] += rewards[1]
    advantages, following, later = torch.zeros(len(completion)), 0.0, 0.0
    for t in reversed(range(len(completion))):
        later = token_rewards[t] + GAMMA * following - values[t] + GAMMA * LAM * later
        advantages[t], following = later, values[t]
    return TokenCredit(
        rollout.prompt,
        [trainer.processing_class.decode([token]) for token in completion],
        values.tolist(),
        advantages.tolist(),
        (logps - reference).exp().tolist(),
        2.0 * rewards[0] + rewards[1],
    )


@pytest.mark.train
@pytest.mark.parametrize(
    ("arguments", "second"),
    [({}, tiny.hashed), ({"peft_config": LoraConfig(target_modules=["q_proj"], lora_dropout=0.0)}, by_position)],
    ids=["full weights", "an adapter and rewards by step"],
)
def test_every_number_is_the_trainers(arguments, second, tmp_path):
    trainer = trained(tmp_path, [tiny.first_token_even, second], **arguments)
    before = torch.get_rng_state(), tiny.weights(trainer.model), trainer.model.training
    credits = credit_by_token(trainer, ROWS, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0]) and trainer.model.training == before[2]
    assert all(torch.equal(weight, before[1][name]) for name, weight in trainer.model.state_dict().items())
    scored = trainer.roll_out(ROWS, 1, seed=3)
    assert len({len(rollout.completion_ids) for rollout in scored.rollouts}) > 1  # padding has something to spoil
    trainer.model.eval()
    for credit, rollout, rewards in zip(credits, scored.rollouts, scored.rewards[:, 0].tolist(), strict=True):
        expected = slowly(trainer, rollout, rewards)
        assert (credit.prompt, credit.tokens) == (expected.prompt, expected.tokens)
        assert credit.values == pytest.approx(expected.values, abs=1e-5)
        assert credit.advantages == pytest.approx(expected.advantages, abs=1e-5)
        assert credit.ratios == pytest.approx(expected.ratios, rel=1e-4)
        assert credit.score == pytest.approx(expected.score)
        assert credit.rewards == pytest.approx(dict(zip(scored.reward_func_names, rewards, strict=True)))
    assert max(abs(value) for credit in credits for value in credit.values) > 0.01
    assert max(abs(ratio - 1) for credit in credits for ratio in credit.ratios or []) > 0.01


def sometimes(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [None if ids[-1] % 3 == 0 else ids[-1] / 10 for ids in completion_ids]


SHAPED = {"reward_clip": 0.4, "lam_alpha": 0.3, "bootstrap_truncated": True}


@pytest.mark.train
@pytest.mark.parametrize(
    "settings",
    [
        SHAPED,
        {**SHAPED, "missing_eos_penalty": 0.7, "reward_scaling": "batch", "kl_estimator": "k3", "critic_lam": 1.0},
        {**SHAPED, "whiten_rewards": True, "reward_scaling": "running", "kl_coef": 0.0},
    ],
    ids=["clip, length, bootstrap", "and a penalty", "and whitened rewards"],
)
@pytest.mark.parametrize("second", [by_position, sometimes])
def test_the_advantages_are_those_of_training(settings, second, tmp_path):
    settings = {"whiten_advantages": False, "critic_learning_rate": 0.1, "max_steps": 3, "gamma": 0.9, **settings}
    funcs = [second] if second is sometimes else [tiny.first_token_even, second]
    trainer = tiny.trainer(PPOTrainer, tmp_path, funcs, **settings)
    trainer.train()
    rows = list(tiny.prompts(24))
    credits = credit_by_token(trainer, rows, seed=3)
    # The same completions, as the trainer itself generates and credits them
    trainer.model.eval()
    torch.manual_seed(3)
    trainer.num_generations_eval = 1
    output = trainer._generate_and_score_completions(copy.deepcopy(rows))
    ended = set()
    for row, credit in enumerate(credits):
        length = int(output["completion_mask"][row].sum())
        ids = output["completion_ids"][row, :length].tolist()
        assert credit.tokens == [trainer.processing_class.decode([token]) for token in ids]
        assert credit.advantages == pytest.approx(output["advantages"][row, :length].tolist(), abs=1e-5)
        assert credit.values == pytest.approx(output["old_values"][row, :length].tolist(), abs=1e-5)
        ended.add(ids[-1] == 2)
    assert ended == {True, False}  # some were cut off, and are worth something beyond
    assert any(max(map(abs, credit.advantages)) > 0.1 for credit in credits)
    unscored = [not credit.rewards for credit in credits]
    assert any(unscored) == (second is sometimes)
    for credit, missing in zip(credits, unscored, strict=True):
        assert missing == (not any(credit.advantages))


def environment(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Writes at the start, in the middle or at the end of a completion of four tokens."""
    ids = [[4 + (7 * i + 3 * t) % 20 for t in range(4)] for i in range(len(prompts))]
    masks = [[int(t != (0, 2, 3)[i % 3]) for t in range(4)] for i in range(len(prompts))]
    encoded = trainer.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": encoded, "completion_ids": ids, "logprobs": None, "env_mask": masks}


def test_what_an_environment_wrote_earns_nothing(tmp_path):
    arguments = {"rollout_func": environment}
    settings = {"gamma": GAMMA, "lam": LAM, "kl_coef": KL_COEF, "whiten_advantages": False}
    trainer = tiny.trainer(PPOTrainer, tmp_path, by_position, arguments, **settings)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # away from the reference, and from a critic that says 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    credits = credit_by_token(trainer, ROWS)
    trainer.model.eval()
    trainer.num_generations_eval = 1
    output = trainer._generate_and_score_completions(copy.deepcopy(ROWS))
    for row, credit in enumerate(credits):
        assert credit.advantages == pytest.approx(output["advantages"][row].tolist(), abs=1e-5)
        assert [advantage != 0 for advantage in credit.advantages] == output["tool_mask"][row].bool().tolist()
    assert output["tool_mask"].sum() == 3 * len(ROWS)


def test_without_a_reference_there_are_no_ratios(tmp_path):
    trainer = tiny.trainer(PPOTrainer, tmp_path, tiny.hashed, kl_coef=0.0)
    credits = credit_by_token(trainer, ROWS)
    assert [credit.ratios for credit in credits] == [None] * len(ROWS)
    # The critic starts at 0: a token earns its share of the score, λ = 0.95 for each token from the end
    for credit in credits:
        expected = [credit.score * 0.95 ** (len(credit.tokens) - 1 - t) for t in range(len(credit.tokens))]
        assert credit.advantages == pytest.approx(expected, abs=1e-6)
        assert not any(credit.values)


def test_scores_are_in_the_units_of_values(tmp_path):
    trainer = tiny.trainer(PPOTrainer, tmp_path, tiny.hashed, kl_coef=0.0, reward_scaling="running")
    trainer._reward_scale.update([0.0, 3.0, 9.0])
    deviation = 21**0.5  # ((0-4)² + (3-4)² + (9-4)²) / 2
    for credit in credit_by_token(trainer, ROWS):
        (raw,) = credit.rewards.values()
        assert credit.score == pytest.approx(raw / deviation)
        assert credit.advantages[-1] == pytest.approx(raw / deviation, abs=1e-6)
    assert trainer._reward_scale.count == 3


def test_of_a_conversation_the_last_message_is_shown(tmp_path):
    data = tiny.prompts(4, conversational=True)
    trainer = tiny.trainer(PPOTrainer, tmp_path, tiny.hashed, {"train_dataset": data})
    assert [credit.prompt for credit in credit_by_token(trainer, list(data))] == [
        m[-1]["content"] for m in data["prompt"]
    ]
