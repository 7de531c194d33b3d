"""
TRL's gradient from fitted micro-batches, and from passes that share prompts.

Every case trains three optimizer steps with TRL's trainer, with ours, and with ours that shares every prompt it can,
by SGD in float32, from the same rollouts. The gradients of all steps agree to 1e-5, and counters say which saving was
used.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
import trl
from comparing import Gradients, largest_relative_error
from peft import LoraConfig, get_peft_model
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import trl_ext
from trl_ext.rollouts.micro_batches import SOURCE_ROW, SavedCompute


TOLERANCE = 1e-5


def often_dead(completion_ids: list[list[int]], target: list[int], **kwargs: Any) -> list[float]:
    """No variance for a third of the prompts."""
    return tiny.LiveFor({t for t in range(4, 24) if t % 3})(completion_ids, target)


def policy(tmp_path: Any) -> dict[str, Any]:
    tiny.stopping().save_pretrained(tmp_path / "policy")
    return {"model": str(tmp_path / "policy")}


def lora(tmp_path: Any) -> dict[str, Any]:
    # B is not zero, so that A has a gradient too
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False
    )
    return {"peft_config": config}


def adapted(tmp_path: Any) -> dict[str, Any]:
    """A policy that comes with an adapter, of which TRL, too, keeps a copy for the reference."""
    torch.manual_seed(4)
    return {"model": get_peft_model(tiny.stopping(), lora(tmp_path)["peft_config"])}


def experts(tmp_path: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = {k: v for k, v in tiny.qwen2().config.to_dict().items() if k not in ("model_type", "architectures")}
    config = Qwen2MoeConfig(
        **shape
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        }
    )
    return {"model": Qwen2MoeForCausalLM(config)}


def rollouts_with_tools(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """The second token is an environment's; some completions are an environment's altogether."""
    lengths = torch.randint(2, 12, (len(prompts),)).tolist()
    return {
        "prompt_ids": trainer.processing_class(text=prompts)["input_ids"],
        "completion_ids": [torch.randint(4, 24, (length,)).tolist() for length in lengths],
        "logprobs": None,
        "env_mask": [[0] * n if n == 5 else [1, 0] + [1] * (n - 2) for n in lengths],
    }


@dataclass
class Case:
    """
    Args:
        settings (`dict`):
            Of the configuration.
        arguments (`Callable`):
            Of the trainer, given a directory.
        saves (`set[str]`):
            What must have been saved: `"skip"`, `"regroup"`, `"trim"`; what isn't named must not.
        shows (`str`, *optional*):
            A metric that TRL's run must have logged with a value other than zero.
        shares (`bool`):
            Whether passes share prompts if they must.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[[Any], dict[str, Any]] = lambda tmp_path: {}
    saves: set[str] = field(default_factory=lambda: {"skip", "regroup", "trim"})
    shows: str | None = None
    shares: bool = True


CLIPPED = {"epsilon": 0.05, "learning_rate": 3e-2}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
TRIM, KEEP_ALL = {"trim"}, {"regroup", "trim"}

CASES = {
    "grpo": Case({"loss_type": "grpo", **CLIPPED}, shows="clip_ratio/region_mean"),
    "bnpo": Case({"loss_type": "bnpo", **CLIPPED}, saves=TRIM, shows="clip_ratio/region_mean"),
    "dr_grpo": Case({"loss_type": "dr_grpo", **CLIPPED}, shows="clip_ratio/region_mean"),
    "dapo": Case({"loss_type": "dapo", "epsilon_high": 0.08, **CLIPPED}, shows="clip_ratio/region_mean"),
    "cispo": Case({"loss_type": "cispo", "epsilon_high": 1.05, "learning_rate": 1e-2}, shows="cispo_clip_ratio"),
    "sapo": Case({"loss_type": "sapo"}),
    "luspo": Case({"loss_type": "luspo", **SEQUENCE}, shows="clip_ratio/region_mean"),
    "luspo_token": Case({"loss_type": "luspo", **CLIPPED}, shows="clip_ratio/region_mean"),
    "vespo": Case({"loss_type": "vespo"}, shows="vespo/phi_seq_mean"),
    "sequence_level": Case({"loss_type": "grpo", **SEQUENCE}, shows="clip_ratio/region_mean"),
    "two_sided_clip": Case({"delta": 1.1}),
    "off_policy_mask": Case({"off_policy_mask_threshold": 1e-3}),
    "kl": Case({"beta": 0.1}, policy, saves=KEEP_ALL, shows="kl"),
    "kl_grpo": Case({"beta": 0.1, "loss_type": "grpo"}, policy, saves=KEEP_ALL, shows="kl"),
    "kl_bnpo": Case({"beta": 0.1, "loss_type": "bnpo"}, policy, saves=TRIM, shows="kl"),
    "entropy_bonus": Case({"entropy_coef": 0.05}, saves=TRIM, shows="policy_loss"),
    "adaptive_entropy": Case({"use_adaptive_entropy": True, "entropy_target": 3.0}, saves=TRIM, shows="policy_loss"),
    "entropy_quantile": Case({"top_entropy_quantile": 0.5}, saves=TRIM),
    "experts": Case({"router_aux_loss_coef": 0.1}, experts, saves=TRIM, shows="aux_loss", shares=False),
    "masked_truncated": Case({"mask_truncated_completions": True}, shows="completions/clipped_ratio"),
    "masked_truncated_kl": Case(
        {"mask_truncated_completions": True, "beta": 0.1}, policy, saves={"skip", "regroup", "trim"}, shows="kl"
    ),
    "tool_mask": Case(arguments=lambda tmp_path: {"rollout_func": rollouts_with_tools}),
    "one_step_a_generation": Case({"steps_per_generation": 4}),
    "several_iterations": Case({"num_iterations": 2}),
    "misaligned": Case({"steps_per_generation": 6}),
    "misaligned_iterations": Case({"steps_per_generation": 6, "num_iterations": 2}),
    "short_windows": Case(
        {"steps_per_generation": 3, "max_steps": -1, "num_train_epochs": 2},
        lambda tmp_path: {"train_dataset": tiny.ragged(8)},
    ),
    "one_micro_batch": Case({"gradient_accumulation_steps": 1, "steps_per_generation": 2}, saves={"skip", "trim"}),
    # Rows of a prompt meet that are together no longer than the longest row: those of short prompts
    "one_row": Case(
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "steps_per_generation": 16},
        lambda tmp_path: {"train_dataset": tiny.ragged().map(lambda row: {"prompt": " ".join([row["prompt"]] * 3)})},
    ),
    "multiple": Case({"pad_to_multiple_of": 4}),
    "lora": Case(arguments=lora),
    "lora_kl": Case({"beta": 0.1}, adapted, saves=KEEP_ALL, shows="kl"),
    "all_prompts_equal": Case(
        arguments=lambda tmp_path: {"train_dataset": tiny.ragged().map(lambda row: {"prompt": "w1 w2 w3"})}
    ),
    "lora_checkpointing": Case({"gradient_checkpointing": True}, adapted),
    "absolute_positions": Case(arguments=lambda tmp_path: {"model": stopping_gpt2()}, shares=False),
    "absolute_positions_kl": Case(
        {"beta": 0.1}, lambda tmp_path: saved_gpt2(tmp_path), saves=KEEP_ALL, shows="kl", shares=False
    ),
}


def stopping_gpt2() -> Any:
    model = tiny.gpt2()
    with torch.no_grad():
        model.get_input_embeddings().weight[2] *= 2.0
    return model


def saved_gpt2(tmp_path: Any) -> dict[str, Any]:
    stopping_gpt2().save_pretrained(tmp_path / "policy")
    return {"model": str(tmp_path / "policy")}


def run(
    trainer_class: Any, config_class: Any, case: Case, tmp_path: Any, **more: Any
) -> tuple[Any, list[torch.Tensor]]:
    """Micro-batches of 4 in groups of 4, 4 of them to an optimizer step and 8 to a generation; 3 steps."""
    settings = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,  # rounding grows from step to step
        "max_steps": 3,
        "max_completion_length": 12,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
        **case.settings,
        **more,
    }
    gradients = Gradients()
    given = {
        "model": tiny.stopping(),
        "train_dataset": tiny.ragged(),
        "processing_class": tiny.tokenizer(),
        **case.arguments(tmp_path),
    }
    config = config_class(**tiny.cpu_settings(tmp_path, **settings))
    trainer = trainer_class(reward_funcs=often_dead, args=config, callbacks=[gradients], **given)
    trainer.train()
    return trainer, gradients.vectors


def used(saved: SavedCompute) -> set[str]:
    names = {"skip": saved.skipped_rows, "regroup": saved.regrouped_rows}
    cut = saved.token_slots < saved.token_slots_trl - saved.dead_slots
    return {name for name, count in names.items() if count} | ({"trim"} if cut else set())


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A case, TRL's run of it, and ours, which shares no prompts."""
    case = CASES[request.param]
    theirs = run(trl.GRPOTrainer, trl.GRPOConfig, case, tmp_path_factory.mktemp("theirs"))
    ours = run(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, case, tmp_path_factory.mktemp("ours"), share_prefixes=False)
    return case, theirs, ours


@pytest.mark.train
def test_the_gradient_is_trls(pair):
    case, (trainer, theirs), (_, ours) = pair
    assert len(theirs) >= 3 and all(step.any() for step in theirs)
    assert case.shows is None or any(log.get(case.shows) for log in trainer.state.log_history)
    assert largest_relative_error(ours, theirs) <= TOLERANCE


@pytest.mark.train
def test_the_gradient_is_trls_where_prompts_are_shared(pair, tmp_path):
    case, (_, theirs), _ = pair
    trainer, ours = run(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, case, tmp_path, share_prefixes="always")
    assert largest_relative_error(ours, theirs) <= TOLERANCE
    shared = trainer.sharing.packed_passes + trainer.sharing.cached_passes
    assert (shared > 0) == case.shares
    assert (trainer.sharing.token_slots < trainer.sharing.token_slots_unshared) == case.shares


@pytest.mark.train
def test_what_is_exact_is_saved_and_nothing_else(pair):
    case, _, (trainer, _) = pair
    assert used(trainer.saved_compute) == case.saves
    assert trainer.saved_compute.token_slots < trainer.saved_compute.token_slots_trl


@pytest.mark.train
def test_the_loss_is_trls(pair):
    _, (theirs, _), (ours, _) = pair
    for mine, other in zip(tiny.history(ours), tiny.history(theirs), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-6)


def counting(trainer_class: Any) -> Any:
    """`trainer_class` that counts forward passes of policy and reference, generation left aside."""

    class Counting(trainer_class):  # type: ignore[misc, valid-type]
        forwards = 0

        def _count(self, *args: Any) -> None:
            self.forwards += 1

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            before = self.forwards
            result = super()._generate_single_turn(*args, **kwargs)
            self.forwards = before
            return result

        def train(self, *args: Any, **kwargs: Any) -> Any:
            for model in (self.model, self.ref_model):
                model.register_forward_pre_hook(self._count)
            return super().train(*args, **kwargs)

    Counting.__name__ = trainer_class.__name__
    return Counting


@pytest.mark.train
def test_no_forward_more_than_trls(tmp_path):
    """As many forward passes on every rank as before: collectives of sharded weights depend on it."""
    case = CASES["absolute_positions_kl"]
    theirs, _ = run(counting(trl.GRPOTrainer), trl.GRPOConfig, case, tmp_path / "theirs")
    ours, _ = run(counting(trl_ext.GRPOTrainer), trl_ext.GRPOConfig, case, tmp_path / "ours")
    assert ours.forwards == theirs.forwards > 0


def test_prompts_keep_their_padding_where_positions_are_absolute(tmp_path, caplog):
    trainer, _ = run(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, CASES["absolute_positions"], tmp_path, max_steps=1)
    assert not trainer.exact_savings.trim_prompts
    assert "positions may be absolute" in caplog.text


def test_a_trainer_says_what_it_cannot_save(tmp_path, caplog):
    run(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, CASES["kl"], tmp_path, max_steps=1)
    assert "beta" in caplog.text and "gradient" in caplog.text


def test_switched_off_nothing_is_saved(tmp_path):
    trainer, _ = run(
        trl_ext.GRPOTrainer, trl_ext.GRPOConfig, CASES["dapo"], tmp_path, fit_micro_batches=False, max_steps=1
    )
    assert trainer.saved_compute == SavedCompute()
    assert all("compute/saved" not in log for log in trainer.state.log_history)


@pytest.mark.train
def test_what_is_saved_is_logged(tmp_path):
    trainer, _ = run(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, CASES["one_step_a_generation"], tmp_path)
    logged = [log["compute/saved"] for log in tiny.history(trainer)]
    assert len(logged) == 3
    assert all(0 < share < 1 for share in logged)


# Metrics


@pytest.mark.train
@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo", "sequence_level", "kl"])
def test_metrics_over_all_rows_keep_their_meaning(name, tmp_path):
    """
    TRL with one micro-batch a step takes its metrics over all tokens of the step, and so does ours however they are
    dealt. Two updates a generation, so that the second clips.
    """
    case = CASES[name]
    whole = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    theirs, _ = run(trl.GRPOTrainer, trl.GRPOConfig, case, tmp_path / "theirs", **whole)
    ours, _ = run(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, case, tmp_path / "ours", **whole | {"max_steps": 2})
    # The same 16 rows in four micro-batches
    dealt, _ = run(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, case, tmp_path / "dealt", max_steps=2)
    keys = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio", "kl"}
    shown = set()
    for mine, same, other in zip(tiny.history(dealt), tiny.history(ours), tiny.history(theirs), strict=False):
        for key in keys & other.keys():
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
            assert same[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
            shown |= {key} if other[key] else set()
    assert shown


@pytest.mark.train
def test_metrics_over_computed_rows_say_so(tmp_path):
    """The entropy of rows that are not computed is not known: `computed/entropy` is that of the others."""
    skipping, _ = run(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, CASES["vespo"], tmp_path / "skipping", max_steps=1)
    whole, _ = run(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, CASES["kl"], tmp_path / "whole", max_steps=1)
    for log in tiny.history(skipping):
        assert {"computed/entropy", "computed/vespo/phi_seq_mean"} <= log.keys()
        assert not {"entropy", "vespo/phi_seq_mean"} & log.keys()
    for log in tiny.history(whole):
        assert "entropy" in log and not any(key.startswith("computed/") for key in log)


def test_computed_entropy_is_the_token_mean_of_computed_rows(tmp_path):
    """Against a pass by hand over the rows with an advantage, before the first update."""
    trainer, _ = run(
        tiny.recorded(trl_ext.GRPOTrainer), trl_ext.GRPOConfig, CASES["dapo"], tmp_path, max_steps=1, learning_rate=0.0
    )
    model, total, count = trainer.model, 0.0, 0.0
    for batch in trainer.losses:
        for i in range(len(batch["completion_ids"])):
            real = batch["prompt_mask"][i].bool(), batch["completion_mask"][i].bool()
            prompt, completion = batch["prompt_ids"][i][real[0]], batch["completion_ids"][i][real[1]]
            if not len(completion):
                continue
            with torch.no_grad():
                logits = model(torch.cat([prompt, completion]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
            total += torch.distributions.Categorical(logits=logits).entropy().sum().item()
            count += len(completion)
    assert trainer.saved_compute.skipped_rows
    assert tiny.history(trainer)[0]["computed/entropy"] == pytest.approx(total / count, rel=1e-4)


# Copies


@pytest.mark.train
def test_copies_in_one_step_are_weights(tmp_path):
    """DUPO from the same draws, copies computed and copies weighed: the same gradient, for fewer rows."""
    gradients, trainers = [], []
    for fit in (False, True):
        trainer, steps = run(
            trl_ext.DUPOTrainer,
            trl_ext.DUPOConfig,
            Case({"soft_punish_cache": 0, "steps_per_generation": 8}),
            tmp_path / str(fit),
            fit_micro_batches=fit,
        )
        gradients.append(steps)
        trainers.append(trainer)
    assert largest_relative_error(gradients[1], gradients[0]) <= TOLERANCE
    assert trainers[1].saved_compute.merged_rows > 0
    assert any("computed/clip_ratio/region_mean" in log for log in tiny.history(trainers[1]))


@pytest.mark.train
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "sapo", "vespo", "cispo"])
def test_copies_are_weights_in_every_loss(loss_type, tmp_path):
    more = {"epsilon_high": 1.05} if loss_type == "cispo" else {}
    case = Case({"soft_punish_cache": 0, "loss_type": loss_type, "token_normalization": None, **more})
    runs = [
        run(trl_ext.DUPOTrainer, trl_ext.DUPOConfig, case, tmp_path / str(fit), fit_micro_batches=fit)
        for fit in (False, True)
    ]
    assert largest_relative_error(runs[1][1], runs[0][1]) <= TOLERANCE
    assert runs[1][0].saved_compute.merged_rows > 0


@pytest.mark.train
def test_copies_are_computed_where_a_term_forbids_weights(tmp_path):
    case = Case({"soft_punish_cache": 0, "beta": 0.1}, policy)
    runs = [
        run(trl_ext.DUPOTrainer, trl_ext.DUPOConfig, case, tmp_path / str(fit), fit_micro_batches=fit)
        for fit in (False, True)
    ]
    assert largest_relative_error(runs[1][1], runs[0][1]) <= TOLERANCE
    assert runs[1][0].saved_compute.merged_rows == 0
    assert any(SOURCE_ROW in batch for batch in runs[1][0]._buffered_inputs)


# Steps without any advantage


@pytest.mark.train
def test_a_step_without_advantages_leaves_the_weights(tmp_path):
    """Nothing is left to compute: one row without weight keeps the graph, and Adam's step is TRL's."""
    runs = []
    for trainer_class, config_class in ((trl.GRPOTrainer, trl.GRPOConfig), (trl_ext.GRPOTrainer, trl_ext.GRPOConfig)):
        config = config_class(**tiny.cpu_settings(tmp_path / trainer_class.__module__, max_steps=2))
        trainer = trainer_class(
            model=tiny.stopping(),
            reward_funcs=tiny.constant,
            args=config,
            train_dataset=tiny.ragged(),
            processing_class=tiny.tokenizer(),
        )
        before = tiny.weights(trainer.model)
        trainer.train()
        runs.append((trainer, before))
    trainer, before = runs[1]
    assert all(torch.equal(value, before[name]) for name, value in tiny.weights(trainer.model).items())
    assert trainer.saved_compute.skipped_rows == trainer.saved_compute.rows == 32
    # Two columns of completion and one of prompt, for each of four micro-batches
    assert trainer.saved_compute.token_slots == 4 * 3
    assert tiny.history(trainer)[0]["loss"] == 0
