"""The implicit reward against a slow twin, and what it leaves alone."""

import threading
from typing import Any

import pytest
import tiny
import torch
import trl
from distributed.dpo_worker import pairs, settings
from peft import LoraConfig, get_peft_model
from transformers import ProcessorMixin

import trl_ext
from trl_ext import ImplicitReward
from trl_ext.rewards.implicit import token_ids
from trl_ext.rollouts.prompts import TokenizedPrompt


BETA = 0.3

PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w1 w2 w3 w4 w5 w6", "w7"]
# Of different lengths; one was cut before its end (no eos, id 2), one has no token at all
IDS = [[7, 9, 2], [5, 6, 7, 8, 9, 10], [4, 2], [], [23]]
COMPLETIONS = ["any"] * 5


def twin(policy: Any, reference: Any, beta: float, prompt_ids: list[int], ids: list[int]) -> list[float]:
    """One row, one token at a time, without padding: β·(log π(y_t|x, y_<t) − log π_ref(y_t|x, y_<t))."""
    rewards, context = [], list(prompt_ids)
    for token in ids:
        with torch.no_grad():
            mine, other = (model(torch.tensor([context])).logits[0, -1] for model in (policy, reference))
        mine = torch.log(torch.exp(mine - mine.max()) / torch.exp(mine - mine.max()).sum())
        other = torch.log(torch.exp(other - other.max()) / torch.exp(other - other.max()).sum())
        rewards.append(beta * float(mine[token] - other[token]))
        context.append(token)
    return rewards


def expected(policy: Any, reference: Any, prompts: list[str] = PROMPTS) -> list[list[float]]:
    encoded = [tiny.tokenizer()(prompt)["input_ids"] for prompt in prompts]
    return [twin(policy, reference, BETA, prompt, ids) for prompt, ids in zip(encoded, IDS, strict=True)]


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def each_close(found: list[list[float]], wanted: list[list[float]]) -> None:
    assert [len(rewards) for rewards in found] == [len(rewards) for rewards in wanted]
    for mine, other in zip(found, wanted, strict=True):
        close(mine, other)


def adapted(seed: int = 3, dropout: float = 0.0) -> Any:
    """A PEFT model whose adapter does something."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=dropout)
    return get_peft_model(tiny.qwen2(), config)


def ask(reward: ImplicitReward, prompts: Any = PROMPTS) -> Any:
    return reward(prompts=prompts, completions=COMPLETIONS, completion_ids=IDS, target=[1] * 5, trainer_state=None)


# Values


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("build", [tiny.qwen2, tiny.gpt2], ids=["relative", "absolute"])
def test_it_is_beta_times_the_log_ratio(build, batch_size):
    policy, reference = build(0), build(1)
    wanted = expected(policy, reference)
    reward = ImplicitReward(policy, reference, BETA, tiny.tokenizer(), batch_size=batch_size)
    close(ask(reward), [sum(tokens) for tokens in wanted])
    by_token = ImplicitReward(policy, reference, BETA, tiny.tokenizer(), batch_size=batch_size, by_token=True)
    each_close(ask(by_token), wanted)
    assert max(abs(value) for tokens in wanted for value in tokens) > 0.1


def test_by_hand():
    """
    A policy that puts a logit ln 3 on token 5 and 0 on the 23 others, against a uniform one: log π/π_ref of token 5 is
    ln(3/26) − ln(1/24) = ln(72/26), and of any other ln(24/26). With β = ½ and the completion 5, 5, 9 the reward is
    ½·(2·ln(72/26) + ln(24/26)).
    """

    class Constant(torch.nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(logits)

        def forward(self, input_ids: Any, logits_to_keep: int, **kwargs: Any) -> Any:
            logits = self.logits.expand(len(input_ids), logits_to_keep, -1)
            return type("Output", (), {"logits": logits})

    uniform, biased = torch.zeros(24), torch.zeros(24)
    biased[5] = torch.log(torch.tensor(3.0))
    reward = ImplicitReward(Constant(biased), Constant(uniform), 0.5, tiny.tokenizer())
    found = reward(prompts=["w1"], completions=[""], completion_ids=[[5, 5, 9]])
    close(found, [0.5 * (2 * 1.018570 - 0.080043)])


def test_an_adapter_against_the_model_without_it():
    policy = adapted()
    wanted = expected(adapted().merge_and_unload(), tiny.qwen2())
    each_close(ask(ImplicitReward(policy, None, BETA, tiny.tokenizer(), by_token=True)), wanted)
    each_close(ask(ImplicitReward(policy, None, BETA, tiny.tokenizer(), by_token=True, snapshot=True)), wanted)


def test_an_adapter_against_another_adapter():
    policy, reference = adapted(3), adapted(4)
    state = {key.replace(".default.", ".began."): value for key, value in reference.named_parameters()}
    policy.add_adapter("began", reference.peft_config["default"])
    for key, weight in policy.named_parameters():
        if ".began." in key:
            weight.data.copy_(state[key])
    wanted = expected(adapted(3).merge_and_unload(), adapted(4).merge_and_unload())
    for snapshot in (False, True):
        reward = ImplicitReward(
            policy, None, BETA, tiny.tokenizer(), by_token=True, reference_adapter="began", snapshot=snapshot
        )
        each_close(ask(reward), wanted)


def test_the_adapter_is_the_one_that_was_active_when_it_was_made():
    policy = adapted()
    reward = ImplicitReward(policy, None, BETA, tiny.tokenizer())
    before = ask(reward)
    torch.manual_seed(9)
    policy.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    policy.set_adapter("other")
    assert ask(reward) == before
    assert policy.active_adapter == "other"


def test_prompts_as_text_as_messages_and_as_ids():
    policy, reference = tiny.qwen2(0), tiny.qwen2(1)
    reward = ImplicitReward(policy, reference, BETA, tiny.tokenizer())
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    # The template puts w0 where the answer begins
    close(ask(reward, messages), ask(reward, [f"{prompt} w0" for prompt in PROMPTS]))
    assert ask(reward, messages) != ask(reward)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template += "{% if aloud %} w8{% endif %}"
    aloud = ImplicitReward(policy, reference, BETA, tokenizer, chat_template_kwargs={"aloud": True})
    close(ask(aloud, messages), ask(reward, [f"{prompt} w0 w8" for prompt in PROMPTS]))
    assert ask(aloud) == ask(reward) and ask(aloud, messages) != ask(reward, messages)
    as_ids = [TokenizedPrompt("w9", tiny.tokenizer()(prompt)["input_ids"]) for prompt in PROMPTS]
    assert ask(reward, as_ids) == ask(reward)


@pytest.mark.train
def test_what_dpo_measures_is_what_it_returns(tmp_path):
    """TRL's `rewards/chosen`, on the batch with which it was logged."""
    trainer = dpo(tmp_path, model=adapted_name(tmp_path), eval_dataset=pairs(6), per_device_eval_batch_size=6)
    trainer.train()
    evaluated = trainer.evaluate()
    rows = trainer.eval_dataset
    reward = trainer.implicit_reward()
    for side in ("chosen", "rejected"):
        found = reward(prompts=rows["prompt"], completions=rows[side], completion_ids=rows[f"{side}_ids"])
        close(sum(found) / 6, evaluated[f"eval_rewards/{side}"])
    assert abs(evaluated["eval_rewards/chosen"]) > 1e-3


def adapted_name(folder: Any) -> str:
    tiny.qwen2().save_pretrained(folder / "start")
    return str(folder / "start")


def dpo(folder: Any, model: Any, lora: bool = False, **more: Any) -> trl_ext.DPOTrainer:
    arguments = {name: more.pop(name) for name in ("eval_dataset", "ref_model") if name in more}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    return trl_ext.DPOTrainer(
        model,
        args=trl_ext.DPOConfig(**settings(folder / "dpo", beta=BETA, **more)),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
        peft_config=config,
        **arguments,
    )


# What it leaves alone


@pytest.mark.parametrize("snapshot", [False, True])
def test_models_are_left_as_they_were_found(snapshot):
    policy = adapted(dropout=0.5)
    policy.train()
    frozen = policy.base_model.model.model.layers[0].mlp
    frozen.eval()  # somebody's choice
    policy.add_adapter("ref", policy.peft_config["default"])
    next(w for name, w in policy.named_parameters() if "lora_A.default" in name).requires_grad_(False)
    modes = {name: module.training for name, module in policy.named_modules()}
    trainable = {name: weight.requires_grad for name, weight in policy.named_parameters()}
    assert any(trainable.values()) and not all(trainable.values())
    weights, random_state = tiny.weights(policy), torch.get_rng_state()
    for adapter in (None, "ref"):
        reward = ImplicitReward(policy, None, BETA, tiny.tokenizer(), reference_adapter=adapter, snapshot=snapshot)
        assert ask(reward) == ask(reward)  # no dropout
    assert {name: module.training for name, module in policy.named_modules()} == modes
    assert {name: weight.requires_grad for name, weight in policy.named_parameters()} == trainable
    assert all(torch.equal(weight, weights[name]) for name, weight in policy.state_dict().items())
    assert weights.keys() == policy.state_dict().keys()  # and nothing more to save
    assert torch.equal(torch.get_rng_state(), random_state)
    assert policy.active_adapter == "default"
    assert all(weight.grad is None for weight in policy.parameters())


def test_models_are_left_as_they_were_found_after_an_error():
    policy = adapted().train()
    trainable = [weight.requires_grad for weight in policy.parameters()]
    reward = ImplicitReward(policy, None, BETA, tiny.tokenizer())
    with pytest.raises(IndexError):
        reward(prompts=["w1"], completions=[""], completion_ids=[[999]])
    assert policy.training and [weight.requires_grad for weight in policy.parameters()] == trainable


# While another trainer goes on with the same weights


def ppo(folder: Any, model: Any, rewards: Any, **more: Any) -> Any:
    config = trl_ext.PPOConfig(**tiny.cpu_settings(folder / "ppo", kl_coef=0.05, num_iterations=1, **more))
    return trl_ext.PPOTrainer(
        model, reward_funcs=rewards, args=config, train_dataset=tiny.prompts(), processing_class=tiny.tokenizer()
    )


@pytest.mark.train
@pytest.mark.parametrize("kind", ["lora", "full", "trained_adapter"])
def test_a_snapshot_stays_while_ppo_trains_the_same_weights(kind, tmp_path):
    model = {"lora": adapted_name(tmp_path), "full": adapted_name(tmp_path), "trained_adapter": adapted()}[kind]
    trainer = dpo(tmp_path, model, lora=kind == "lora")
    trainer.train()
    kept, live = trainer.implicit_reward(by_token=True), trainer.implicit_reward(snapshot=False)
    before, moving = ask(kept), ask(live)
    assert max(abs(reward) for reward in moving) > 1e-3
    remembered = tiny.Remembering(kept)
    if kind == "trained_adapter":
        trainer.model.delete_adapter("ref")  # PPO makes its own reference of that name
    second = ppo(tmp_path, trainer.model, remembered)
    second.train()
    assert all(
        len(rewards) == len(ids)
        for call in remembered.calls
        for rewards, ids in zip(call.rewards, call.completion_ids, strict=True)
    )
    assert ask(kept) == before
    assert ask(live) != moving


def test_a_snapshot_of_an_adapter_shares_the_base(tmp_path):
    policy = adapted()
    reward = ImplicitReward(policy, None, BETA, tiny.tokenizer(), snapshot=True)
    base = {weight.data_ptr() for name, weight in policy.named_parameters() if "lora_" not in name}
    kept = reward._copies
    assert kept is not None and kept.keys() == {name for name, _ in policy.named_parameters() if "lora_" in name}
    assert not base & {weight.data_ptr() for weight in kept.values()}


def test_a_base_that_is_trained_after_all_is_refused():
    policy = adapted()
    reward = ImplicitReward(policy, None, BETA, tiny.tokenizer(), snapshot=True)
    policy.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"whose '.*norm\.weight' is trained now"):
        ask(reward)
    policy.base_model.model.model.norm.weight.requires_grad_(False)
    ask(reward)


def test_an_adapter_that_is_merged_away_is_refused():
    policy = adapted()
    reward = ImplicitReward(policy, None, BETA, tiny.tokenizer(), snapshot=True)
    policy.merge_and_unload()
    with pytest.raises(RuntimeError, match="that has lost"):
        ask(reward)


@pytest.mark.parametrize("trainer_class", [trl_ext.GRPOTrainer, trl_ext.DAPOTrainer, trl.GRPOTrainer])
def test_every_trainer_takes_it(trainer_class, tmp_path):
    reward = ImplicitReward(tiny.qwen2(0), tiny.qwen2(1), BETA, tiny.tokenizer())
    config = trainer_class.config_class if trainer_class is not trl.GRPOTrainer else trl.GRPOConfig
    trainer = trainer_class(
        tiny.stopping(),
        reward_funcs=[reward, tiny.low_ids],
        args=config(**tiny.cpu_settings(tmp_path, warmup_steps=0, max_steps=1, steps_per_generation=2)),
        train_dataset=tiny.prompts(conversational=True),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "loss" in log)
    assert logged["rewards/implicit_reward/std"] > 0


def test_two_of_them_have_two_names(tmp_path):
    reward = dpo(tmp_path, tiny.qwen2(0), ref_model=tiny.qwen2(1)).implicit_reward(name="helpful")
    assert reward.__name__ == "helpful" and reward.beta == BETA


# Errors


def test_from_another_thread_a_shared_model_is_refused():
    errors: list[str] = []

    def call(reward: ImplicitReward) -> None:
        try:
            ask(reward)
        except RuntimeError as error:
            errors.append(str(error))

    apart = ImplicitReward(tiny.qwen2(0), tiny.qwen2(1), BETA, tiny.tokenizer())
    for reward in (ImplicitReward(adapted(), None, BETA, tiny.tokenizer()), apart):
        thread = threading.Thread(target=call, args=(reward,))
        thread.start()
        thread.join()
    assert len(errors) == 1 and "Leave rewards_in_flight off" in errors[0]


def test_what_makes_no_sense_is_refused(tmp_path):
    model, tokenizer = tiny.qwen2(), tiny.tokenizer()
    with pytest.raises(ValueError, match="has no adapter to switch off"):
        ImplicitReward(model, None, BETA, tokenizer)
    with pytest.raises(ValueError, match="the same object"):
        ImplicitReward(model, model, BETA, tokenizer)
    with pytest.raises(ValueError, match="batch_size=0"):
        ImplicitReward(model, tiny.qwen2(1), BETA, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="has no adapter 'began'"):
        ImplicitReward(adapted(), None, BETA, tokenizer, reference_adapter="began")
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        ImplicitReward(model, tiny.qwen2(1), BETA, tokenizer)(prompts=[""], completions=[""], completion_ids=[[5]])
    policy = adapted()
    policy.add_adapter("began", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="snapshot=True needs adapters of one configuration"):
        ImplicitReward(policy, None, BETA, tokenizer, reference_adapter="began", snapshot=True)
    precomputed = dpo(tmp_path, adapted_name(tmp_path), precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="`reference` is None"):
        precomputed.implicit_reward()


MESSAGES = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]


@pytest.mark.parametrize(
    ("text", "template"), [("w1 w2", {}), (MESSAGES, {}), (MESSAGES[:1], {"add_generation_prompt": True})]
)
def test_token_ids_are_trls(text, template):
    ids = token_ids(tiny.tokenizer(), text, **template)
    assert ids == trl.data_utils._tokenize(tiny.tokenizer(), text, **template)["input_ids"] != []


class Processor(ProcessorMixin):
    """A processor around a tokenizer. It returns batches of one, and knows messages only in blocks."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.tokenizer(text)["input_ids"]]}

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> dict[str, list[list[int]]]:
        said = [{**message, "content": message["content"][0]["text"]} for message in messages]
        return {"input_ids": [self.tokenizer.apply_chat_template(said, **kwargs)["input_ids"]]}


@pytest.mark.parametrize("text", ["w1 w2", MESSAGES])
def test_token_ids_of_a_processor_are_trls(text):
    processor = Processor(tiny.tokenizer())
    assert token_ids(processor, text) == trl.data_utils._tokenize(processor, text)["input_ids"]
    assert token_ids(processor, text) == token_ids(tiny.tokenizer(), text)
