"""
DPO: TRL's, number for number, as long as no curriculum is given; its order; the errors; what is logged.

Every case of parity trains twice from the same seed, on TRL's trainer and on ours, three optimizer steps of a real
`train()`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from comparing import Gradients, equal, module_calls, without_clocks
from distributed import dpo_worker
from distributed.dpo_worker import pairs, recorded, settings
from peft import LoraConfig, get_peft_model
from processes import run

import trl_ext
from trl_ext.curriculum.schedule import DifficultyCurriculum
from trl_ext.trainers.dpo import SMOOTHED_LOSSES
from trl_ext.trainers.seams.whole_checkpoints import MANIFEST


def conversations() -> Any:
    """The same pairs, as messages."""

    def said(row):
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return {name: [{"role": role, "content": row[name].strip()}] for name, role in roles.items()}

    return pairs().map(said)


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], **more)


def with_adapter() -> Any:
    """A PEFT model whose adapter does something already."""
    torch.manual_seed(3)
    return get_peft_model(tiny.qwen2(), lora(init_lora_weights=False))


@dataclass
class Case:
    """
    Args:
        settings (`dict`):
            Arguments of the configuration.
        arguments (`Callable`):
            Arguments of the trainer, made anew for every run, from a folder with the model.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[[str], dict[str, Any]] = lambda saved: {"ref_model": tiny.qwen2(1)}


def loss(*names: str, **more: Any) -> Case:
    return Case({"loss_type": list(names), **more})


CASES = {
    "full": Case(),
    "by_name": Case(arguments=lambda saved: {"model": saved}),
    "another_beta_and_sgd": Case({"beta": 0.5, "optim": "sgd"}),
    "lora": Case(arguments=lambda saved: {"peft_config": lora()}),
    "lora_with_dropout": Case({"disable_dropout": False}, lambda saved: {"peft_config": lora(lora_dropout=0.2)}),
    "trained_adapter": Case(arguments=lambda saved: {"model": with_adapter()}),
    "precomputed": Case({"precompute_ref_log_probs": True}),
    "precomputed_lora": Case({"precompute_ref_log_probs": True}, lambda saved: {"peft_config": lora()}),
    "hinge": loss("hinge"),
    "ipo": loss("ipo"),
    "exo_pair": loss("exo_pair", label_smoothing=1e-3),
    "nca_pair": loss("nca_pair"),
    "robust": loss("robust", label_smoothing=0.1),
    "bco_pair": loss("bco_pair"),
    "sppo_hard": loss("sppo_hard"),
    "aot": loss("aot"),
    "aot_unpaired": loss("aot_unpaired"),
    "apo_zero": loss("apo_zero"),
    "apo_down": loss("apo_down"),
    "discopop": loss("discopop"),
    "sft": loss("sft"),
    "sigmoid_norm": loss("sigmoid_norm"),
    "several_losses": loss("sigmoid", "bco_pair", "sft", loss_weights=[0.8, 0.2, 1.0]),
    "divergence": Case({"f_divergence_type": "js_divergence"}),
    "weighted": Case({"use_weighting": True}),
    "length_desensitized": Case({"ld_alpha": 0.5}),
    "moving_reference": Case({"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "gradient_checkpointing": Case({"gradient_checkpointing": True}),
    "truncated": Case({"max_length": 4}),
    "conversations": Case(arguments=lambda saved: {"ref_model": tiny.qwen2(1), "train_dataset": conversations()}),
    "stream": Case(
        arguments=lambda saved: {"ref_model": tiny.qwen2(1), "train_dataset": pairs().to_iterable_dataset()}
    ),
    "evaluated": Case(
        {"eval_strategy": "steps", "eval_steps": 2},
        lambda saved: {"ref_model": tiny.qwen2(1), "eval_dataset": pairs(6)},
    ),
    "checkpoints": Case({"save_strategy": "steps", "save_steps": 2}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("saved"))
    tiny.qwen2().save_pretrained(folder)
    return folder


def train(trainer_class: type, config_class: Any, case: Case, saved: str, directory: Path) -> dict[str, Any]:
    """Everything that a run leaves behind."""
    given = {
        "model": tiny.qwen2(),
        "train_dataset": pairs(),
        "processing_class": tiny.tokenizer(),
        **case.arguments(saved),
    }
    gradients = Gradients()
    with module_calls() as calls:
        trainer = trainer_class(
            args=config_class(**settings(directory, max_steps=3, **case.settings)), callbacks=[gradients], **given
        )
        trainer.train()
    return {
        "gradients": gradients.steps,
        "logs": without_clocks(trainer.state.log_history),
        "weights": tiny.weights(trainer.model),
        "calls": calls,
        "files": {str(file.relative_to(directory)) for file in directory.rglob("*") if file.name != MANIFEST},
        "random_state": torch.get_rng_state(),
    }


def unshared(**arguments: Any) -> trl_ext.DPOConfig:
    """Shared prompts have TRL's numbers up to rounding (`test_shared_prefixes.py`); here they are compared exactly."""
    return trl_ext.DPOConfig(**arguments, share_prefixes=False)


def adopted(**arguments: Any) -> trl_ext.DPOConfig:
    config = trl_ext.DPOConfig.adopt(trl.DPOConfig(**arguments))
    config.share_prefixes = False
    return config


@pytest.mark.train
@pytest.mark.parametrize("name", CASES)
def test_every_step_is_trls(name, saved, tmp_path):
    theirs = train(trl.DPOTrainer, trl.DPOConfig, CASES[name], saved, tmp_path / "theirs")
    ours = train(trl_ext.DPOTrainer, unshared, CASES[name], saved, tmp_path / "ours")
    assert [name for name in theirs if not equal(ours[name], theirs[name])] == []
    assert len(theirs["gradients"]) == 3
    assert all(any(gradient.any() for gradient in step.values()) for step in theirs["gradients"])
    assert all(name in log for log in ours["logs"] if "loss" in log for name in ("rewards/accuracies", "loss"))


@pytest.mark.train
def test_a_configuration_of_trls_gives_the_same_steps(saved, tmp_path):
    theirs = train(trl.DPOTrainer, trl.DPOConfig, CASES["full"], saved, tmp_path / "theirs")
    ours = train(trl_ext.DPOTrainer, adopted, CASES["full"], saved, tmp_path / "ours")
    assert [name for name in theirs if not equal(ours[name], theirs[name])] == []


def test_a_configuration_of_trls_is_ours_from_the_same_arguments(tmp_path, subtests):
    """Field for field, so that the steps that ours takes are those of a configuration that is taken over."""
    for name, case in CASES.items():
        with subtests.test(name):
            arguments = settings(tmp_path, max_steps=3, **case.settings)
            assert adopted(**arguments).to_dict() == unshared(**arguments).to_dict()


@pytest.mark.train
def test_the_comparison_sees_an_order(saved, tmp_path_factory):
    rows = pairs(16, hard=list(range(16)))
    case = Case(arguments=lambda saved: {"ref_model": tiny.qwen2(1), "train_dataset": rows})
    ordered = Case(arguments=lambda saved: {**case.arguments(saved), "curriculum": easy_to_hard()})
    theirs = train(trl.DPOTrainer, trl.DPOConfig, case, saved, tmp_path_factory.mktemp("theirs"))
    ours = train(trl_ext.DPOTrainer, unshared, ordered, saved, tmp_path_factory.mktemp("ours"))
    assert not equal(ours["gradients"][0], theirs["gradients"][0])


def test_it_is_trls():
    assert issubclass(trl_ext.DPOTrainer, trl.DPOTrainer) and issubclass(trl_ext.DPOConfig, trl.DPOConfig)
    assert trl_ext.DPOTrainer.config_class is trl_ext.DPOConfig


def test_defaults_are_trls(tmp_path):
    ours, theirs = (config(**settings(tmp_path)) for config in (trl_ext.DPOConfig, trl.DPOConfig))
    own = {"logging_dir", "share_prefixes", "weight_column", "group_by_prompt"}
    assert {k: v for k, v in ours.to_dict().items() if k not in own} == theirs.to_dict()


def test_a_configuration_of_trls_is_taken_over(tmp_path):
    class Mine(trl.DPOConfig):
        pass

    mine = Mine(**settings(tmp_path, beta=0.3, loss_type=["ipo"], warmup_steps=3, max_length=None))
    adopted = trl_ext.DPOConfig.adopt(mine)
    assert isinstance(adopted, trl_ext.DPOConfig) and isinstance(adopted, Mine)
    assert {k: v for k, v in adopted.to_dict().items() if k in mine.to_dict()} == mine.to_dict()
    assert trl_ext.DPOConfig.adopt(adopted) is adopted
    with pytest.raises(TypeError, match=r"must be a DPOConfig or a trl\.DPOConfig, not SFTConfig"):
        trl_ext.DPOConfig.adopt(trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"label_smoothing": 0.1},
            r"label_smoothing=0\.1 has no effect with loss_type=\['sigmoid'\]\. Set loss_type='robust'",
        ),
        ({"label_smoothing": 0.1, "loss_type": ["ipo", "sft"]}, r"has no effect with loss_type=\['ipo', 'sft'\]"),
        ({"label_smoothing": 0.7, "loss_type": "robust"}, r"label_smoothing=0\.7 .* must lie in \[0, 0\.5\)"),
        ({"label_smoothing": -0.1, "loss_type": "aot"}, r"label_smoothing=-0\.1 .* must lie in \[0, 0\.5\)"),
    ],
)
def test_a_label_smoothing_without_effect(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trl_ext.DPOConfig(**settings(tmp_path, **arguments))
    with pytest.raises(ValueError, match=message):
        trl_ext.DPOConfig.adopt(trl.DPOConfig(**settings(tmp_path, **arguments)))


def test_the_losses_that_read_the_label_smoothing_are_trls(tmp_path):
    trainer = trl.DPOTrainer(
        tiny.qwen2(),
        tiny.qwen2(1),
        args=trl.DPOConfig(**settings(tmp_path)),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    reads = set()
    for loss in (name for case in CASES.values() for name in case.settings.get("loss_type", ["sigmoid"])):
        trainer.loss_types, losses = [loss], []
        for trainer.label_smoothing in (0.1, 0.2):
            with torch.no_grad():
                losses.append(trainer.compute_loss(trainer.model, batch).item())
        reads |= {loss} if losses[0] != losses[1] else set()
    assert reads == set(SMOOTHED_LOSSES)


def test_without_a_configuration_it_makes_its_own(monkeypatch, tmp_path, saved):
    monkeypatch.chdir(tmp_path)
    trainer = OnCPU(saved, train_dataset=pairs(), processing_class=tiny.tokenizer())
    assert type(trainer.args) is OnCPUConfig
    assert Path(trainer.args.output_dir).name == f"{Path(saved).name}-DPO"


@dataclass
class OnCPUConfig(trl_ext.DPOConfig):
    use_cpu: bool = True
    bf16: bool | None = False


class OnCPU(trl_ext.DPOTrainer):
    config_class = OnCPUConfig


# The order


def easy_to_hard(column: str = "hard") -> DifficultyCurriculum:
    return DifficultyCurriculum("easy_to_hard", column)


@pytest.mark.train
def test_rows_are_trained_on_in_that_order(tmp_path):
    """Two epochs of 12 rows in micro-batches of 2; ties in fours."""
    hard = [i % 3 for i in range(12)]
    trainer = recorded(tmp_path, pairs(12, hard=hard), easy_to_hard(), num_train_epochs=2, max_steps=-1)
    trainer.train()
    walked = [row for batch in trainer.rows for row in batch]
    first, second = walked[:12], walked[12:]
    for epoch in (first, second):
        assert sorted(epoch) == list(range(12))
        assert [hard[row] for row in epoch] == [0] * 4 + [1] * 4 + [2] * 4
    assert first != second


@pytest.mark.train
@pytest.mark.parametrize("schedule", ["easy_to_hard", "frontier", "mixed"])
@pytest.mark.parametrize("column", ["margin", "-margin", "pass_rate"])
def test_the_order_is_the_curriculums(schedule, column, tmp_path):
    name = column.removeprefix("-")
    values = [(5 * i) % 16 / 16 for i in range(16)]
    trainer = recorded(tmp_path, pairs(16, **{name: values}), DifficultyCurriculum(schedule, column), max_steps=4)
    trainer.train()
    hard = values if column == "margin" else [-value for value in values]
    # A pass rate is its own measure, another column counts by its rank
    difficulties = [1 + x if column == "pass_rate" else (sorted(hard).index(x) + 0.5) / 16 for x in hard]
    expected = DifficultyCurriculum(schedule).epoch_order(difficulties, seed=7, epoch=0)
    assert [row for batch in trainer.rows for row in batch] == expected


def test_the_seed_of_the_data_decides_among_equals(tmp_path):
    """TRL shuffles by it, too, where it is set."""
    hard = [0, 1] * 4
    for settings_, seed in (({"data_seed": 3}, 3), ({}, 7), ({"data_seed": 0}, 0)):
        trainer = recorded(tmp_path, pairs(8, hard=hard), easy_to_hard(), **settings_)
        orders = [easy_to_hard().epoch_order(hard, seed, epoch=2) for seed in (0, 3, 7)]
        assert len(set(map(tuple, orders))) == 3
        assert trainer.row_order()(2) == orders[(0, 3, 7).index(seed)]


@pytest.mark.train
def test_a_curriculum_of_another_trainer_stays_as_it_was(tmp_path):
    """The same object may choose another trainer's prompts, and know rollouts."""
    curriculum = easy_to_hard()
    curriculum.read_column([1, 2, 3])
    curriculum.observe([{"prompt": "w0 w1 w0"}], torch.zeros(1, 4))
    before = dict(vars(curriculum))
    hard = [100 * i for i in range(8, 0, -1)]
    trainer = recorded(tmp_path, pairs(8, hard=hard), curriculum, max_steps=2)
    trainer.train()
    assert [row for batch in trainer.rows for row in batch] == list(range(7, -1, -1))
    assert vars(curriculum) == before


def test_rows_that_trl_drops_move_no_other_row(tmp_path):
    rows = pairs(6, hard=[5, 4, 3, 2, 1, 0])
    rows = rows.map(
        lambda row, i: {"prompt": row["prompt"] + " w2" * 20 if i in (1, 4) else row["prompt"]}, with_indices=True
    )
    trainer = recorded(tmp_path, rows, easy_to_hard(), max_length=12, num_train_epochs=1, max_steps=-1)
    trainer.train()
    assert [row for batch in trainer.rows for row in batch] == [5, 3, 2, 0]


@pytest.mark.train
@pytest.mark.parametrize("schedule", ["easy_to_hard", "mixed"])
@pytest.mark.parametrize("step", [1, 3, 4])  # inside the first epoch, at its end, inside the second
def test_a_resumed_run_goes_on_in_the_order(step, schedule, tmp_path):
    """Three optimizer steps an epoch."""
    rows = pairs(12, hard=[i % 3 for i in range(12)])
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = recorded(tmp_path, rows, DifficultyCurriculum(schedule, "hard"), **arguments)
    whole.train()
    resumed = recorded(tmp_path, rows, DifficultyCurriculum(schedule, "hard"), **arguments)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
    assert resumed.rows == whole.rows[2 * step :]
    assert equal(tiny.weights(resumed.model), tiny.weights(whole.model))


@pytest.mark.distributed
def test_two_processes_share_one_order_and_take_the_steps_of_one(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command in ([dpo_worker.__file__, tmp_path], [*launch, dpo_worker.__file__, tmp_path]):
        run(command)
    alone, first, second = (
        torch.load(tmp_path / f"dpo_{name}.pt", weights_only=False) for name in ("1_0", "2_0", "2_1")
    )
    together = [mine + other for mine, other in zip(first["rows"], second["rows"], strict=True)]
    assert together == alone["rows"]
    walked = [row for batch in alone["rows"] for row in batch]
    for epoch in (walked[:16], walked[16:]):
        assert (
            sorted(epoch) == list(range(16)) and [row // 4 for row in epoch] == [3] * 4 + [2] * 4 + [1] * 4 + [0] * 4
        )
    assert walked[:16] != walked[16:]
    assert equal(first["weights"], second["weights"])
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight)


@pytest.mark.parametrize(
    ("curriculum", "dataset", "message"),
    [
        (DifficultyCurriculum(), pairs(3), "column is None, and .* DPO has no rollouts. Name a column"),
        (easy_to_hard(), pairs(3), r"column is 'hard', and train_dataset has \['prompt', 'chosen', 'rejected'\]"),
        (easy_to_hard(), pairs(3, hard=["a", "b", "c"]), "column 'hard' holds something that is not a finite number"),
        (
            easy_to_hard(),
            pairs(3, hard=[1.0, 0.0, float("nan")]),
            "column 'hard' holds something that is not a finite",
        ),
        (easy_to_hard(), pairs(3, hard=[1, 1, 1]), "column 'hard' holds the same number in all rows"),
        (
            easy_to_hard(),
            pairs(3, hard=[1, 2, 3]).to_iterable_dataset(),
            "must be a datasets.Dataset, not IterableDataset",
        ),
        (
            DifficultyCurriculum("easy_to_hard", "hard", start_completion_length=4),
            pairs(3, hard=[1, 2, 3]),
            "start_completion_length=4 has no effect in DPO",
        ),
    ],
    ids=["no_column", "missing", "text", "nan", "alike", "stream", "length"],
)
def test_what_cannot_be_ordered_is_refused_before_a_model_is_loaded(curriculum, dataset, message, tmp_path):
    config = trl_ext.DPOConfig(**settings(tmp_path))
    with pytest.raises(ValueError, match=message):
        trl_ext.DPOTrainer("no/such/model", args=config, train_dataset=dataset, curriculum=curriculum)


@pytest.mark.parametrize("curriculum", ["easy_to_hard", DifficultyCurriculum])
def test_a_curriculum_is_an_object(curriculum, tmp_path):
    config = trl_ext.DPOConfig(**settings(tmp_path))
    with pytest.raises(TypeError, match=r"is not a curriculum. Pass a DifficultyCurriculum\(\.\.\.\)"):
        trl_ext.DPOTrainer("no/such/model", args=config, train_dataset=pairs(2), curriculum=curriculum)


def test_two_orders_are_refused(tmp_path):
    config = trl_ext.DPOConfig(**settings(tmp_path, train_sampling_strategy="sequential"))
    with pytest.raises(ValueError, match="both set the order of the rows"):
        trl_ext.DPOTrainer(
            "no/such/model", args=config, train_dataset=pairs(2, hard=[1, 2]), curriculum=easy_to_hard()
        )


# What health checks read


@pytest.mark.train
def test_preference_accuracy_is_logged_in_training_and_in_evaluation(tmp_path):
    trainer = trl_ext.DPOTrainer(
        tiny.qwen2(),
        ref_model=tiny.qwen2(),
        args=trl_ext.DPOConfig(**settings(tmp_path, eval_strategy="steps", eval_steps=5, eval_on_start=True)),
        train_dataset=pairs(),
        eval_dataset=pairs(8),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    training = [log for log in trainer.state.log_history if "loss" in log]
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(training) == 5 and [log["step"] for log in evaluated] == [0, 5]
    for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert all(name in log for log in training) and all(f"eval_{name}" in log for log in evaluated)
    # A policy that equals its reference has ties only, which TRL counts as wrong
    before, after = (log["eval_rewards/accuracies"] for log in evaluated)
    assert before == 0 and after > 0.5
