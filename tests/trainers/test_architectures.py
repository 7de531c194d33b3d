"""
TRL's gradient and first ratios, on the architectures of transformers.

TRL's trainer and ours take one optimizer step on the same rollouts: four micro-batches of two rows, half of a
generation batch, so that the old policy's pass is made before. Gradients agree to 1e-4 (sums in another order), and so
do the log ratios of the first step, which are 0 with TRL.
"""

from typing import Any

import architectures
import pytest
import tiny
import torch
import trl
from comparing import Gradients, largest_relative_error
from transformers.models.mamba2 import modeling_mamba2

import trl_ext
from trl_ext.rollouts.micro_batches import SavedCompute


TOLERANCE = 1e-4
# Of passes that share prompts, which have no padding to mask
TOLERANCE_SHARED = 1e-5

NAMES = [
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"),
    *("phi", "phi3", "olmo", "olmo2", "starcoder2", "stablelm", "glm4", "granite", "gpt_neox", "gpt2", "gptj"),
    *("opt", "bloom", "mpt", "falcon", "smollm3", "cohere2", "hunyuan_v1_dense"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"),
    *("mamba", "mamba2", "falcon_h1", "jamba", "bamba", "zamba2", "nemotron_h", "lfm2", "qwen3_next"),
    *("recurrent_gemma", "granitemoehybrid"),
    *architectures.VARIANTS,
    pytest.param("llama4_text", marks=pytest.mark.skip("TRL's fused head doesn't find the hidden states")),
]


def rollouts(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Completions of 2 tokens to one less than the longest, the same in every run."""
    generator = torch.Generator().manual_seed(len(prompts))
    lengths = torch.randint(2, trainer.max_completion_length, (len(prompts),), generator=generator).tolist()
    return {
        "prompt_ids": trainer.processing_class(text=prompts)["input_ids"],
        "completion_ids": [torch.randint(4, 24, (length,), generator=generator).tolist() for length in lengths],
        "logprobs": None,
    }


def measuring(trainer_class: Any) -> Any:
    """`trainer_class` that keeps the largest |log ratio| of a token in the loss."""

    class Measuring(trainer_class):  # type: ignore[misc, valid-type]
        largest_log_ratio = 0.0

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self.logps = result[0].detach()
            return result

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
            log_ratio = (self.logps - inputs["old_per_token_logps"]).abs() * inputs["completion_mask"]
            self.largest_log_ratio = max(self.largest_log_ratio, log_ratio.max().item())
            return loss

    Measuring.__name__ = trainer_class.__name__
    return Measuring


def run(
    trainer_class: Any, config_class: Any, name: str, tmp_path: Any, rollout_func: Any = rollouts, **more: Any
) -> tuple[Any, list[torch.Tensor]]:
    """A trainer after its optimizer steps, usually one, and their gradients."""
    gradients = Gradients()
    settings = {
        "optim": "sgd",
        "max_steps": 1,
        "disable_dropout": True,
        "router_aux_loss_coef": 0.0,  # over a micro-batch, so that rows would have to stay in theirs
        "max_completion_length": 12,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
        **more,
    }
    trainer = measuring(trainer_class)(
        model=architectures.model(name),
        reward_funcs=tiny.hashed,
        args=config_class(**tiny.cpu_settings(tmp_path, **settings)),
        train_dataset=tiny.ragged(16),
        processing_class=tiny.tokenizer(),
        rollout_func=rollout_func,
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients.vectors


def compare(name: str, tmp_path: Any, **more: Any) -> SavedCompute:
    theirs, their_gradient = run(trl.GRPOTrainer, trl.GRPOConfig, name, tmp_path / "theirs", **more)
    ours, our_gradient = run(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, name, tmp_path / "ours", **more)
    assert all(step.any() for step in their_gradient)
    assert largest_relative_error(our_gradient, their_gradient) <= TOLERANCE
    assert ours.largest_log_ratio == pytest.approx(theirs.largest_log_ratio, abs=TOLERANCE)
    return ours.saved_compute


def without_cache(trainer_class: Any) -> Any:
    """`trainer_class` that shares prompts by packing alone, as on several processes."""

    class Packing(trainer_class):  # type: ignore[misc, valid-type]
        def _set_up_sharing(self, config: Any) -> None:
            super()._set_up_sharing(config)
            self.sharing.cache = False

    return Packing


# Those whose passes could share prompts as far as has_relative_positions goes, and don't
NOT_SHARED = {"falcon_alibi"}


@pytest.mark.train
@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(name, str)])
def test_shared_prompts_have_trls_gradient_too(name, tmp_path):
    """Prompts of one process are packed here; `tests/rollouts/test_shared_pass.py` has the repeated cache."""
    theirs, their_gradient = run(trl.GRPOTrainer, trl.GRPOConfig, name, tmp_path / "theirs")
    shared, gradient = run(
        without_cache(trl_ext.GRPOTrainer), trl_ext.GRPOConfig, name, tmp_path / "ours", share_prefixes="always"
    )
    assert largest_relative_error(gradient, their_gradient) <= TOLERANCE_SHARED
    assert shared.largest_log_ratio == pytest.approx(theirs.largest_log_ratio, abs=TOLERANCE)
    relative = shared.exact_savings.trim_prompts and shared.exact_savings.full_width_from is None
    assert (shared.sharing.packed_passes > 0) == (relative and name not in NOT_SHARED)


@pytest.mark.train
@pytest.mark.parametrize("name", NAMES)
def test_gradient_and_first_ratios_are_trls(name, tmp_path):
    saved = compare(name, tmp_path)
    assert (saved.token_slots < saved.token_slots_trl) == (name not in architectures.WIDTH_DEPENDENT)


def unless_alone(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Of transformers 5.10: left padding enters the state of recurrent layers if it is in a batch of one row."""
    if attention_mask is not None and attention_mask.shape[1] > 1 and attention_mask.shape[0] > 1:
        return (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
    return hidden_states


@pytest.mark.train
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_are_alone_where_trls_are(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_mamba2, "apply_mask_to_padding_states", unless_alone)
    batches = {"gradient_accumulation_steps": 8 // rows, "steps_per_generation": 16 // rows}
    compare("mamba2", tmp_path, per_device_train_batch_size=rows, **batches)


@pytest.mark.train
@pytest.mark.parametrize("name", ["llama_dynamic", "llama_longrope"])
def test_narrow_batches_are_cut(name, tmp_path):
    """Prompts of up to 7 tokens, completions of up to 4: 11 columns."""
    saved = compare(name, tmp_path, max_completion_length=5)
    assert saved.token_slots < saved.token_slots_trl


@pytest.mark.train
@pytest.mark.parametrize("name", ["llama_dynamic", "llama_longrope"])
def test_several_steps_on_what_the_model_generates(name, tmp_path):
    """`dynamic` remembers the widest batch that it saw, those of generation and other passes among them."""
    more = {"max_steps": 4, "num_iterations": 2, "learning_rate": 1e-3, "rollout_func": None}
    compare(name, tmp_path, **more)


@pytest.mark.train
@pytest.mark.parametrize("critic", ["head", "model"])
def test_ppo_keeps_the_width_too(critic, tmp_path):
    settings = {"critic": critic, "kl_coef": 0.0, "num_iterations": 1}
    runs = [
        run(
            trl_ext.PPOTrainer,
            trl_ext.PPOConfig,
            "llama_longrope",
            tmp_path / str(fit),
            fit_micro_batches=fit,
            **settings,
        )
        for fit in (False, True)
    ]
    assert largest_relative_error(runs[1][1], runs[0][1]) <= TOLERANCE
