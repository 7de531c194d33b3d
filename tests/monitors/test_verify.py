"""`verify`: a measurement that finds what is wrong and leaves nothing behind."""

import copy
import math
from typing import Any

import pytest
import tiny
import torch
import trl
from peft import LoraConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from trl_ext import DUPOTrainer, GRPOTrainer
from trl_ext.monitors.verify import KeptForBackward, verify, without_dropout
from trl_ext.rollouts.micro_batches import SavedCompute
from trl_ext.trainers.seams.checkpoints import random_states
from trl_ext.trainers.seams.probes import preview_micro_batches


SOME_LIVE = tiny.LiveFor({target for target in range(4, 24) if target % 3})


def trainer_of(tmp_path: Any, reward: Any = SOME_LIVE, trainer_class: Any = GRPOTrainer, **settings: Any) -> Any:
    """Micro-batches of 4, four of them to a step."""
    arguments = {"train_dataset": tiny.ragged(), **settings.pop("arguments", {})}
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_completion_length": 12}
    return tiny.trainer(trainer_class, tmp_path, reward, arguments, **{**shape, **settings})


def gpt2_with_dropout() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, **ends, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2))


# What is measured


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "grpo"},
        {"loss_type": "bnpo"},
        {"updates_per_generation": 2},
        {"steps_per_generation": 2},
        {"gradient_accumulation_steps": 1, "steps_per_generation": 4},
        {"trainer_class": DUPOTrainer},
    ],
)
def test_the_gradient_is_the_same(settings, tmp_path):
    found = verify(trainer_of(tmp_path, **settings), repetitions=1, quiet=True)
    assert found.grad_relative_error <= 1e-5
    # Four rows are a micro-batch either way
    assert found.trl_ext.token_slots < found.trl.token_slots or found.rows == 4
    assert found.micro_batches == min(
        settings.get("steps_per_generation", 4), settings.get("gradient_accumulation_steps", 4)
    )
    assert found.rows == 4 * found.micro_batches


def test_slots_rows_and_memory_are_those_of_the_step(tmp_path):
    trainer = trainer_of(tmp_path, updates_per_generation=2)
    dealt = preview_micro_batches(trainer)[:4]
    found = verify(trainer, repetitions=1, quiet=True)
    slots = sum(batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in dealt)
    assert found.trl.token_slots == slots
    advantages = torch.cat([batch["advantages"] for batch in dealt])
    assert found.rows == 16
    assert found.skipped_rows == (advantages == 0).sum() > 0
    assert found.merged_rows == 0
    fitted = trainer.fit(dealt, [(0, 4)], SavedCompute())
    padded = sum(b["prompt_ids"].numel() + b["completion_ids"].numel() for b in fitted)
    assert found.trl_ext.token_slots == padded - found.shared_slots
    # The largest micro-batch decides, and that of TRL's is as wide as the whole generation
    assert 0 < found.memory_ratio < 1
    assert found.trl.seconds > 0 and found.time_ratio == found.trl_ext.seconds / found.trl.seconds


def test_copies_are_counted(tmp_path):
    found = verify(trainer_of(tmp_path, trainer_class=DUPOTrainer), repetitions=1, quiet=True)
    assert found.merged_rows > 0 and found.skipped_rows == 0


def test_what_a_person_reads(tmp_path, capsys):
    trainer = trainer_of(tmp_path, loss_type="bnpo")
    found = verify(trainer, repetitions=1)
    out = capsys.readouterr().out
    assert out == f"{found}\n"
    lines = out.splitlines()
    assert lines[0] == "Qwen2ForCausalLM, loss_type=bnpo, cpu float32"
    assert lines[1] == "16 completions in 4 micro-batches a process; 0 can't move the policy, 0 are copies"
    ratio = found.trl_ext.token_slots / found.trl.token_slots
    cells = [str(found.trl.token_slots), str(found.trl_ext.token_slots), f"{ratio:.2f}"]
    assert lines[4].split() == ["tokens", "computed", *cells]
    assert f"relative gradient error: {found.grad_relative_error:.1e}" in lines
    assert lines[-1].startswith("not saved: rows keep their micro-batch")
    assert len({len(line) for line in lines[2:6]}) == 1  # a table
    verify(trainer, repetitions=1, quiet=True)
    assert capsys.readouterr().out == ""


def test_adapters(tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, init_lora_weights=False
    )
    found = verify(trainer_of(tmp_path, arguments={"peft_config": config}), repetitions=1, quiet=True)
    assert found.grad_relative_error <= 1e-5
    assert "Peft" in found.title


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_of_gpt2(attention, tmp_path):
    """Its attention reads a rate from a layer that is never called."""
    model = gpt2_with_dropout()
    model.set_attn_implementation(attention)
    found = verify(trainer_of(tmp_path, arguments={"model": model}), repetitions=1, quiet=True)
    assert found.grad_relative_error <= 1e-5
    assert any("left padding" in reason for reason in found.reasons)


def test_attention_dropout(tmp_path):
    model = tiny.qwen2(attention_dropout=0.3)
    found = verify(trainer_of(tmp_path, arguments={"model": model}), repetitions=1, quiet=True)
    assert found.grad_relative_error <= 1e-5


def test_an_adaptive_entropy_bonus_does_not_adapt(tmp_path):
    """Its coefficient changes at the end of a step, which this is not."""
    trainer = trainer_of(tmp_path, use_adaptive_entropy=True, entropy_target=9.0, entropy_coef_delta=0.5)
    names = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
    before = {name: getattr(trainer, name) for name in names}
    found = verify(trainer, repetitions=1, quiet=True)
    assert found.grad_relative_error <= 1e-5
    assert {name: getattr(trainer, name) for name in names} == before


# What is wrong is found


class OneRowTurned(GRPOTrainer):
    """Flips the sign of the advantage of one row."""

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        fitted = super().fit(*args, **kwargs)
        live = next(batch for batch in fitted if batch["advantages"].any())
        row = int(live["advantages"].nonzero()[0])
        live["advantages"] = live["advantages"].clone()
        live["advantages"][row] *= -1
        return fitted


class OneRowLost(GRPOTrainer):
    """Leaves a row out."""

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        fitted = super().fit(*args, **kwargs)
        largest = max(fitted, key=lambda batch: int(batch["completion_mask"].sum()))
        largest["completion_mask"] = largest["completion_mask"].clone()
        largest["completion_mask"][0] = 0
        return fitted


class WrongScale(GRPOTrainer):
    """Takes a mean over rows for TRL's."""

    def restate_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        super().restate_loss(loss, inputs)
        return loss


@pytest.mark.parametrize(("broken", "loss_type"), [(OneRowTurned, "dapo"), (OneRowLost, "dapo"), (WrongScale, "grpo")])
def test_what_is_wrong_is_found(broken, loss_type, tmp_path):
    found = verify(trainer_of(tmp_path, trainer_class=broken, loss_type=loss_type), repetitions=1, quiet=True)
    assert found.grad_relative_error > 1e-2


# Nothing is left behind


def states_equal(one: Any, other: Any) -> bool:
    return all(str(one[name]) == str(other[name]) for name in one) and torch.equal(one["torch"], other["torch"])


@pytest.mark.parametrize("arguments", [{}, {"model": gpt2_with_dropout}], ids=["qwen2", "dropout"])
def test_nothing_is_left_behind(arguments, tmp_path):
    arguments = {name: make() for name, make in arguments.items()}
    trainer = trainer_of(tmp_path, arguments=arguments)
    trainer.model.eval()
    trainer.train_metrics["kl"].append(0.5)  # not logged yet
    before, states = tiny.weights(trainer.model), random_states()
    metrics, logs = copy.deepcopy(trainer._metrics), copy.deepcopy(trainer._logs)
    run, told = copy.deepcopy(trainer.run_state()), list(trainer.state.log_history)
    dropouts = [(module.p, module.training) for module in trainer.model.modules() if isinstance(module, nn.Dropout)]
    first = verify(trainer, repetitions=1, quiet=True)
    assert states_equal(random_states(), states)
    assert all(torch.equal(value, before[name]) for name, value in tiny.weights(trainer.model).items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer._metrics == metrics and trainer._logs == logs and trainer.state.log_history == told
    assert str(trainer.run_state()) == str(run)
    assert trainer._buffered_inputs is None and trainer._step == 0
    assert not trainer.model.training
    assert dropouts == [(m.p, m.training) for m in trainer.model.modules() if isinstance(m, nn.Dropout)]
    second = verify(trainer, repetitions=1, quiet=True)
    for name in ("grad_relative_error", "rows", "skipped_rows", "merged_rows", "title"):
        assert getattr(first, name) == getattr(second, name)
    assert (first.trl.token_slots, first.trl_ext.token_slots) == (second.trl.token_slots, second.trl_ext.token_slots)


@pytest.mark.train
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"updates_per_generation": 2},
        {"use_adaptive_entropy": True, "entropy_coef_delta": 0.5, "entropy_target": 9.0},
    ],
)
def test_training_goes_on_as_if_it_had_not_been(settings, tmp_path):
    runs = []
    for verified in (False, True):
        trainer = trainer_of(tmp_path / str(verified), **settings)
        if verified:
            verify(trainer, repetitions=1, quiet=True)
        trainer.train()
        if verified:
            after = tiny.weights(trainer.model)
            verify(trainer, repetitions=1, quiet=True)  # and between trainings
            assert all(torch.equal(value, after[name]) for name, value in tiny.weights(trainer.model).items())
        runs.append(trainer)
    plain, verified = runs
    assert tiny.history(verified) == tiny.history(plain)
    expected = tiny.weights(plain.model)
    assert all(torch.equal(value, expected[name]) for name, value in tiny.weights(verified.model).items())


def test_a_failure_leaves_nothing_behind_either(tmp_path):
    class Failing(GRPOTrainer):
        def fit(self, *args: Any, **kwargs: Any) -> Any:
            raise ArithmeticError

    trainer = trainer_of(tmp_path, trainer_class=Failing)
    trainer.model.eval()
    with pytest.raises(ArithmeticError):
        verify(trainer, repetitions=1)
    assert not trainer.model.training and not trainer.train_metrics
    assert trainer._buffered_inputs is None


# What is refused


def test_a_trainer_of_trl_is_refused(tmp_path):
    config = trl.GRPOConfig(**tiny.cpu_settings(tmp_path))
    trainer: Any = trl.GRPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=tiny.constant,
        args=config,
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    with pytest.raises(TypeError, match=r"WasteCallback"):
        verify(trainer)


def test_there_must_be_a_gradient(tmp_path):
    trainer = trainer_of(tmp_path, tiny.constant)
    with pytest.raises(ValueError, match="advantage"):
        verify(trainer, repetitions=1)
    assert not trainer.train_metrics


@pytest.mark.parametrize("sharded", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_weights_are_refused(sharded, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(trainer, sharded, True)
    with pytest.raises(ValueError, match="sharded"):
        verify(trainer)


# Its parts


class TestKeptForBackward:
    def test_by_hand(self):
        """
        For the backward pass of `exp(linear(x))`, where `x` is 3 × 4 and the weight 5 × 4: the linear layer keeps `x`
        (12 numbers) and its weight, which doesn't count, and the exponential its result (15).
        """
        model, x = nn.Linear(4, 5, bias=False), torch.randn(3, 4, requires_grad=True)
        kept = KeptForBackward(model)
        with kept.measuring():
            y = model(x).exp()
        assert kept.peak == (12 + 15) * 4
        y.sum().backward()
        with kept.measuring():  # smaller
            model(x[:1].clone()).exp()
        assert kept.peak == (12 + 15) * 4
        with kept.measuring():
            model(torch.randn(7, 4)).exp()
        assert kept.peak == (28 + 35) * 4

    def test_what_is_kept_twice_counts_once(self):
        model = nn.Linear(2, 2)
        kept, x = KeptForBackward(model), torch.randn(4, 4, requires_grad=True)
        with kept.measuring():
            x.exp().square()  # the exponential's result, kept by both
        assert kept.peak == 16 * 4

    def test_the_gradient_is_the_same(self):
        model, x = tiny.qwen2(), torch.randint(4, 24, (2, 5))
        gradients = []
        for measured in (False, True):
            model.zero_grad()
            kept = KeptForBackward(model)
            if measured:
                with kept.measuring():
                    loss = model(x).logits.sum()
                assert kept.peak > 0
            else:
                loss = model(x).logits.sum()
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert torch.equal(*gradients)


class TestWithoutDropout:
    @pytest.mark.parametrize("make", [gpt2_with_dropout, lambda: tiny.qwen2(attention_dropout=0.4)])
    def test_off_inside_and_as_before_after(self, make):
        model = make().train()
        model.get_submodule("transformer.drop" if hasattr(model, "transformer") else "model.norm").eval()
        x = torch.randint(4, 24, (2, 9))
        before = [(m.training, getattr(m, "p", None), getattr(m, "attention_dropout", None)) for m in model.modules()]
        state = torch.get_rng_state()
        with without_dropout(model):
            one, other = model(x).logits, model(x).logits
            assert model.training
        assert torch.equal(one, other)
        assert torch.equal(torch.get_rng_state(), state)
        assert before == [
            (m.training, getattr(m, "p", None), getattr(m, "attention_dropout", None)) for m in model.modules()
        ]
        assert not torch.equal(model(x).logits, model(x).logits)

    def test_restored_after_an_error(self):
        model = nn.Sequential(nn.Dropout(0.5))
        with pytest.raises(ArithmeticError), without_dropout(model):
            raise ArithmeticError
        assert model[0].training and math.isclose(model[0].p, 0.5)


def test_checkpointing_is_on_as_in_training_and_off_again(tmp_path):
    measured = {}
    for checkpointing in (False, True):
        trainer = tiny.trainer(GRPOTrainer, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        measured[checkpointing] = verify(trainer, repetitions=1, quiet=True)
        assert not trainer.model.is_activation_checkpointing
    assert measured[True].trl.memory < measured[False].trl.memory
    assert measured[True].grad_relative_error <= 1e-5
