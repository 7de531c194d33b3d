"""Critics on an actor: values and gradients against the same computed by hand, without any hook."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    Qwen2ForSequenceClassification,
)
from trl.trainer.utils import add_fused_lm_head

from trl_ext.roles.critic import (
    HeadCritic,
    ModelCritic,
    ValueHead,
    critic_of,
    load_critic,
    logps_and_values,
    without_critic,
)
from trl_ext.rollouts.kept_states import ActorCriticOutput


IDS = torch.tensor([[5, 9, 4, 17, 8, 2], [7, 7, 11, 20, 2, 0], [6, 4, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
REAL = MASK.bool()
HIDDEN = 16


def taught(critic: Any, seed: int = 3) -> Any:
    """The critic with random weights: at V = 0 everywhere there is little to compare."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in critic.head.parameters() if isinstance(critic, HeadCritic) else critic.score.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return critic


def actor_with(critic: Any, actor: Any = None) -> Any:
    actor = tiny.qwen2() if actor is None else actor
    base = actor.get_base_model() if hasattr(actor, "get_base_model") else actor
    add_fused_lm_head(base)
    critic.attach(base)
    return actor


def head_by_hand(critic: HeadCritic, hidden: torch.Tensor) -> torch.Tensor:
    """V = w·x + b, with x = gelu(W h + c) for the `"mlp"`."""
    weights = dict(critic.head.named_parameters())
    hidden = hidden.float()
    if critic.head.kind == "mlp":
        hidden = functional.gelu(hidden @ weights["dense.weight"].T + weights["dense.bias"])
    return (hidden @ weights["out.weight"].T + weights["out.bias"]).squeeze(-1)


def logps_by_hand(actor: Any, hidden: torch.Tensor) -> torch.Tensor:
    logps = actor.lm_head(hidden).log_softmax(dim=-1)[:, :-1]
    return logps.gather(2, IDS[:, 1:].unsqueeze(2)).squeeze(2) * MASK[:, 1:]


def classifier(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = copy.deepcopy(tiny.qwen2().config)
    config.num_labels = 1
    return Qwen2ForSequenceClassification(config)


# Values


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_reads_the_last_hidden_state_of_every_token(kind):
    critic = taught(HeadCritic(HIDDEN, kind))
    logps, values = logps_and_values(actor_with(critic), IDS, MASK)
    plain = tiny.qwen2()
    hidden = plain.model(IDS, attention_mask=MASK).last_hidden_state
    assert values.shape == IDS.shape
    torch.testing.assert_close(values[REAL], head_by_hand(critic, hidden)[REAL])
    torch.testing.assert_close(logps, logps_by_hand(plain, hidden))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_new_head_says_zero(kind):
    assert not ValueHead(HIDDEN, kind)(torch.randn(2, 3, HIDDEN)).any()


def test_an_unknown_head():
    with pytest.raises(ValueError, match=r"kind='deep' is unknown\. Choose one of 'linear', 'mlp'"):
        ValueHead(HIDDEN, "deep")


def test_a_value_model_scores_every_token():
    # A sequence classifier scores a sequence by its last token: that of each prefix is the value of its last token
    source = classifier()
    _, values = logps_and_values(actor_with(ModelCritic(copy.deepcopy(source))), IDS, MASK)
    for row, length in enumerate(MASK.sum(dim=1).tolist()):
        for end in range(1, length + 1):
            score = source(IDS[row : row + 1, :end]).logits.squeeze()
            torch.testing.assert_close(values[row, end - 1], score)


def test_a_copy_of_the_policy_starts_at_zero_with_weights_of_its_own():
    actor = tiny.qwen2()
    critic = ModelCritic.on_backbone_of(actor)
    assert not logps_and_values(actor_with(critic, actor), IDS, MASK)[1].any()
    _, values = logps_and_values(actor_with(taught(ModelCritic.on_backbone_of(tiny.qwen2()))), IDS, MASK)
    hidden = tiny.qwen2().model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(values, (hidden @ taught(critic).score.weight.T).squeeze(-1))
    before = tiny.weights(critic)
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())


def test_a_copy_of_an_adapted_policy_has_the_adapter_merged_and_learns_with_all_of_it():
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    policy = get_peft_model(tiny.qwen2(), config)
    before, hidden = tiny.weights(policy), policy.base_model.model.model(IDS, attention_mask=MASK).last_hidden_state
    critic = ModelCritic.on_backbone_of(policy)
    own = critic.backbone(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(own[REAL], hidden[REAL])
    assert critic.state_dict().keys() == ModelCritic.on_backbone_of(tiny.qwen2()).state_dict().keys()
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("critic", [HeadCritic(HIDDEN), ModelCritic(classifier())], ids=["head", "model"])
def test_left_padding_does_not_matter(critic):
    actor = actor_with(taught(critic))
    _, values = logps_and_values(actor, IDS, MASK)
    shifted_ids, shifted_mask = functional.pad(IDS, (4, 0)), functional.pad(MASK, (4, 0))
    _, shifted = logps_and_values(actor, shifted_ids, shifted_mask)
    torch.testing.assert_close(shifted[:, 4:][REAL], values[REAL])


@pytest.mark.parametrize("critic", [HeadCritic(HIDDEN), ModelCritic(classifier())], ids=["head", "model"])
def test_a_value_knows_nothing_of_later_tokens(critic):
    actor = actor_with(taught(critic))
    changed = IDS.clone()
    changed[:, 3:] = 12
    _, values = logps_and_values(actor, IDS, MASK)
    _, others = logps_and_values(actor, changed, MASK)
    torch.testing.assert_close(others[:, :3], values[:, :3])
    assert (others[0, 3:] != values[0, 3:]).all()


def test_an_actor_with_absolute_positions():
    critic = taught(HeadCritic(HIDDEN))
    _, values = logps_and_values(actor_with(critic, tiny.gpt2()), IDS, MASK)
    hidden = tiny.gpt2().transformer(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(values[REAL], head_by_hand(critic, hidden)[REAL])


def test_generation_and_plain_forwards_are_left_alone():
    critic = taught(HeadCritic(HIDDEN))
    plain, actor = tiny.qwen2(), actor_with(critic)
    assert torch.equal(actor(IDS, attention_mask=MASK).logits, plain(IDS, attention_mask=MASK).logits)
    assert not isinstance(actor(IDS, attention_mask=MASK, labels=IDS), ActorCriticOutput)
    generated = [model.generate(IDS[:1], max_new_tokens=5, do_sample=False) for model in (actor, plain)]
    assert torch.equal(*generated)


def test_an_inactive_critic_computes_nothing():
    critic = ModelCritic(classifier())
    actor, calls = actor_with(critic), []
    critic.backbone.register_forward_hook(lambda *args: calls.append(1))
    critic.active = False
    output = actor(input_ids=IDS, attention_mask=MASK, labels=IDS, fused_lm_head=True)
    assert not hasattr(output, "state_values")
    assert not calls
    critic.active = True
    logps_and_values(actor, IDS, MASK)
    assert len(calls) == 1


# Gradients


WEIGHTS = torch.randn(3, 5, generator=torch.Generator().manual_seed(8))
TARGETS = torch.randn(3, 6, generator=torch.Generator().manual_seed(9))


def policy_loss(logps: torch.Tensor) -> torch.Tensor:
    return (logps * WEIGHTS * MASK[:, 1:]).sum()


def loss_of_values(values: torch.Tensor) -> torch.Tensor:
    return ((values - TARGETS).square() * MASK).sum()


def gradients_of(loss: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if gradient is None else gradient).flatten()
            for p, gradient in zip(parameters, found, strict=True)
        ]
    )


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_value_gradient_reaches_the_trunk(share, kind):
    critic = taught(HeadCritic(HIDDEN, kind, trunk_grad=share))
    actor = actor_with(critic)
    trunk = [p for name, p in actor.named_parameters() if not name.startswith("critic.")]
    logps, values = logps_and_values(actor, IDS, MASK)
    ours = gradients_of(policy_loss(logps) + loss_of_values(values), trunk)
    of_head = gradients_of(policy_loss(logps) + loss_of_values(values), list(critic.parameters()))

    # The same without hooks, each loss alone
    plain, own = tiny.qwen2(), copy.deepcopy(critic)
    hidden = plain.model(IDS, attention_mask=MASK).last_hidden_state
    by_policy = gradients_of(policy_loss(logps_by_hand(plain, hidden)), list(plain.parameters()))
    own_loss = loss_of_values(head_by_hand(own, hidden))
    by_value = gradients_of(own_loss, list(plain.parameters()))
    assert by_value.norm() > 0.1 * by_policy.norm() > 0
    assert relative_error(ours, by_policy + share * by_value) <= 1e-5
    # The head learns all of it, whatever the trunk gets
    assert relative_error(of_head, gradients_of(own_loss, list(own.parameters()))) <= 1e-5


def test_a_value_model_leaves_the_policy_alone():
    critic = taught(ModelCritic.on_backbone_of(tiny.qwen2()))
    actor = actor_with(critic)
    logps, values = logps_and_values(actor, IDS, MASK)
    (policy_loss(logps) + loss_of_values(values)).backward()
    plain = tiny.qwen2()
    policy_loss(logps_by_hand(plain, plain.model(IDS, attention_mask=MASK).last_hidden_state)).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in actor.named_parameters():
        if not name.startswith("critic."):
            torch.testing.assert_close(parameter.grad, theirs[name].grad)
    assert all(parameter.grad is not None for parameter in critic.parameters())


def adapted_actor(critic: Any, checkpointing: bool) -> Any:
    # B is not zero, so that A has a gradient too
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    base = tiny.qwen2()
    add_fused_lm_head(base)
    torch.manual_seed(5)
    actor = get_peft_model(base, config)
    critic.attach(base)
    if checkpointing:
        actor.gradient_checkpointing_enable({"use_reentrant": False})
        actor.enable_input_require_grads()
    return actor.train()


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_has_the_same_gradients_with_checkpoints(checkpointing, share):
    critic = taught(HeadCritic(HIDDEN, "mlp", trunk_grad=share))
    actor = adapted_actor(critic, checkpointing)
    adapters = [p for name, p in actor.named_parameters() if "lora_" in name]
    logps, values = logps_and_values(actor, IDS, MASK)
    (policy_loss(logps) + loss_of_values(values)).backward()

    plain = adapted_actor(HeadCritic(HIDDEN), checkpointing=False)
    own, base = copy.deepcopy(critic), plain.get_base_model()
    hidden = base.model(IDS, attention_mask=MASK).last_hidden_state
    theirs = [p for name, p in plain.named_parameters() if "lora_" in name]
    by_policy = gradients_of(policy_loss(logps_by_hand(base, hidden)), theirs)
    by_value = gradients_of(loss_of_values(head_by_hand(own, hidden)), theirs)
    assert relative_error(torch.cat([p.grad.flatten() for p in adapters]), by_policy + share * by_value) <= 1e-5
    assert all(parameter.grad.any() for parameter in critic.parameters())
    assert all(p.grad is None for name, p in actor.named_parameters() if "lora_" not in name and "critic" not in name)


def test_a_value_model_with_checkpoints():
    gradients = []
    for checkpointing in (False, True):
        critic = taught(ModelCritic.on_backbone_of(tiny.qwen2()))
        actor = actor_with(critic).train()
        if checkpointing:
            actor.gradient_checkpointing_enable({"use_reentrant": False})
        logps, values = logps_and_values(actor, IDS, MASK)
        (policy_loss(logps) + loss_of_values(values)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in actor.parameters()]))
    assert relative_error(*gradients) <= 1e-5


def test_a_head_stays_in_float32_on_a_trunk_in_bfloat16():
    critic = taught(HeadCritic(HIDDEN, "mlp"))
    actor = actor_with(critic, tiny.qwen2().to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        _, values = logps_and_values(actor, IDS, MASK)
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.float32}
    assert values.dtype == torch.float32
    hidden = tiny.qwen2().to(torch.bfloat16).model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(values[REAL], head_by_hand(critic, hidden)[REAL])
    loss_of_values(values).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in critic.parameters())


# Names and files


@pytest.mark.parametrize("adapted", [False, True])
def test_without_its_critic_an_actor_is_what_it_was(adapted):
    critic = HeadCritic(HIDDEN)
    actor = adapted_actor(critic, False) if adapted else actor_with(critic)
    assert critic_of(actor) is critic
    plain = adapted_actor(HeadCritic(HIDDEN), False) if adapted else tiny.qwen2()
    with without_critic(plain), without_critic(actor):
        assert critic_of(actor) is None
        assert actor.state_dict().keys() == plain.state_dict().keys()
    assert critic_of(actor) is critic
    assert critic_of(tiny.qwen2()) is None


def test_an_error_inside_brings_the_critic_back():
    actor = actor_with(HeadCritic(HIDDEN))
    with pytest.raises(KeyError), without_critic(actor):
        raise KeyError
    assert critic_of(actor) is not None


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_weights_are_split_by_name(prefix):
    actor, critic = torch.ones(1), torch.zeros(1)
    state = {f"{prefix}model.norm": actor, f"{prefix}critic.head.out": critic, f"{prefix}my_critic.x": actor}
    own, its = HeadCritic(HIDDEN).split_state_dict(state)
    assert own.keys() == {f"{prefix}model.norm", f"{prefix}my_critic.x"}
    assert its.keys() == {"head.out"}


@pytest.mark.parametrize(
    "critic",
    [HeadCritic(HIDDEN), HeadCritic(HIDDEN, "mlp", 0.5), ModelCritic(classifier())],
    ids=["linear", "mlp", "model"],
)
def test_what_is_saved_is_loaded(critic, tmp_path):
    _, values = logps_and_values(actor_with(taught(critic)), IDS, MASK)
    critic.save(tmp_path)
    actor = tiny.qwen2()
    loaded = load_critic(tmp_path, actor)
    assert type(loaded) is type(critic)
    assert torch.equal(logps_and_values(actor, IDS, MASK)[1], values)


def test_log_probabilities_of_a_loaded_pair_have_the_temperature(tmp_path):
    HeadCritic(HIDDEN).save(tmp_path)
    actor = tiny.qwen2()
    load_critic(tmp_path, actor, temperature=0.5)
    logps, _ = logps_and_values(actor, IDS, MASK)
    logits = tiny.qwen2()(IDS, attention_mask=MASK).logits / 0.5
    expected = logits.log_softmax(dim=-1)[:, :-1].gather(2, IDS[:, 1:].unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(logps[:, :1], expected[:, :1])


def test_no_critic_and_a_head_for_another_policy_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"critic_config\.json is missing"):
        load_critic(tmp_path, tiny.qwen2())
    HeadCritic(32).save(tmp_path)
    with pytest.raises(ValueError, match="hidden states of size 32, but the policy's have 16"):
        load_critic(tmp_path, tiny.qwen2())


def test_a_classifier_with_two_outputs_is_no_value_model():
    config = copy.deepcopy(tiny.qwen2().config)
    config.num_labels = 2
    with pytest.raises(ValueError, match=r"has 2 outputs\. Load it with num_labels=1"):
        ModelCritic(Qwen2ForSequenceClassification(config))


def test_a_value_model_of_another_architecture(tmp_path):
    config = GPT2Config(vocab_size=24, n_embd=8, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    critic = ModelCritic(AutoModelForSequenceClassification.from_config(config))
    _, values = logps_and_values(actor_with(critic).eval(), IDS, MASK)
    critic.save(Path(tmp_path))
    # In the mode of its policy: this one has dropout
    actor = tiny.qwen2().eval()
    load_critic(tmp_path, actor)
    assert torch.equal(logps_and_values(actor, IDS, MASK)[1], values)


def test_a_classifier_that_reads_ahead_is_no_value_model():
    config = BertConfig(
        vocab_size=24, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=1
    )
    with pytest.raises(ValueError, match="BertForSequenceClassification has no layer `score`"):
        ModelCritic(BertForSequenceClassification(config))


@pytest.mark.parametrize("columns", [2, 4])
def test_only_the_columns_with_labels_are_scored(columns):
    """As many columns from the end as there are labels: the same numbers, and nothing computed for the others."""
    critic = taught(HeadCritic(HIDDEN, trunk_grad=1.0))
    actor, widths = actor_with(critic), []
    critic.head.register_forward_pre_hook(lambda module, args: widths.append(args[0].size(1)))
    labels = IDS.masked_fill(~REAL, -100)
    whole = actor(input_ids=IDS, attention_mask=MASK, labels=labels, fused_lm_head=True)
    last = actor(input_ids=IDS, attention_mask=MASK, labels=labels[:, -columns:], fused_lm_head=True)
    assert widths == [IDS.size(1), columns]
    torch.testing.assert_close(last.log_probs, whole.log_probs[:, 1 - columns :])
    torch.testing.assert_close(last.state_values, whole.state_values[:, -columns:])
    assert last.log_probs.abs().sum() > 0 and last.state_values.abs().sum() > 0
    assert actor(input_ids=IDS, attention_mask=MASK).logits.size(1) == IDS.size(1)  # generation is left alone
