"""The waste of TRL's trainer: recounted from what it was trained on, and a training that it leaves alone."""

from typing import Any

import pytest
import tiny
import torch
import trl
from transformers import TrainerCallback

import trl_ext
from trl_ext.monitors.waste import WasteCallback, waste_shares
from trl_ext.rollouts.micro_batches import SavedCompute


KEYS = {
    *("waste/share", "waste/padding", "waste/dead_rows"),
    *("waste/repeated_prompts", "waste/slots_of_trl_ext"),
}


class Watched(trl.GRPOTrainer):
    """Keeps what each loss was computed on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.losses.append({name: value.clone() for name, value in inputs.items()})
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss


SOME_LIVE = tiny.LiveFor({target for target in range(4, 24) if target % 3})


def trainer_of(tmp_path: Any, trainer_class: Any = Watched, reward: Any = SOME_LIVE, **settings: Any) -> Any:
    """Micro-batches of 4, four of them to a step."""
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_completion_length": 12}
    config_class = trl_ext.GRPOConfig if issubclass(trainer_class, trl_ext.GRPOTrainer) else trl.GRPOConfig
    arguments = {"model": tiny.stopping(), "train_dataset": tiny.ragged(), **settings.pop("arguments", {})}
    return trainer_class(
        reward_funcs=reward,
        args=config_class(**tiny.cpu_settings(tmp_path, **{**shape, **settings})),
        processing_class=tiny.tokenizer(),
        **arguments,
    )


def watched(tmp_path: Any, **settings: Any) -> tuple[Any, WasteCallback]:
    """A trainer of TRL's after training, and the callback that watched it."""
    trainer = trainer_of(tmp_path, **settings)
    callback = WasteCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def recount(batches: list[dict[str, Any]], skips: bool = True) -> tuple[int, int, int]:
    """Slots of micro-batches, tokens of rows that the loss needs, and slots of the others, row by row."""
    slots = useful = dead = 0
    for batch in batches:
        for i in range(len(batch["completion_ids"])):
            columns = batch["prompt_ids"].size(1) + batch["completion_ids"].size(1)
            tokens = int(batch["prompt_mask"][i].sum() + batch["completion_mask"][i].sum())
            needed = bool(batch["completion_mask"][i].any()) and (not skips or float(batch["advantages"][i]) != 0)
            slots += columns
            useful += tokens if needed else 0
            dead += 0 if needed else columns
    return slots, useful, dead


@pytest.mark.train
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "grpo", "pad_to_multiple_of": 4},
        {"steps_per_generation": 8, "max_steps": 3},
        {"steps_per_generation": 2},
        {"num_iterations": 2, "max_steps": 3},
        {"steps_per_generation": 6, "max_steps": 4},
        {"steps_per_generation": 6, "num_iterations": 2, "max_steps": 4},
        {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "max_steps": 3},
        {
            "steps_per_generation": 3,
            "max_steps": -1,
            "num_train_epochs": 2,
            "arguments": {"train_dataset": tiny.ragged(8)},
        },
    ],
)
def test_a_recount(settings, tmp_path):
    trainer, callback = watched(tmp_path, **settings)
    slots, useful, dead = recount(trainer.losses)
    assert 0 < useful < slots and dead
    total = callback.total
    assert (total.token_slots_trl, total.useful_tokens, total.dead_slots) == (slots, useful, dead)
    assert total.rows == 4 * len(trainer.losses)
    assert useful - total.repeated_prompts <= total.token_slots < slots


@pytest.mark.train
@pytest.mark.parametrize(
    ("settings", "skips"),
    [({"mask_truncated_completions": True}, True), ({"loss_type": "bnpo"}, False), ({"entropy_coef": 0.1}, False)],
)
def test_what_the_loss_needs(settings, skips, tmp_path):
    """A row without advantage only counts as dead where it can be left out."""
    trainer, callback = watched(tmp_path, **settings)
    total = callback.total
    assert (total.token_slots_trl, total.useful_tokens, total.dead_slots) == recount(trainer.losses, skips)


@pytest.mark.train
def test_each_log_has_the_shares_since_the_last(tmp_path):
    trainer, callback = watched(tmp_path, max_steps=4, logging_steps=2)
    logs = tiny.history(trainer)
    assert len(logs) == 2
    for i, log in enumerate(logs):
        slots, useful, dead = recount(trainer.losses[8 * i : 8 * i + 8])
        assert log["waste/share"] == pytest.approx(1 - useful / slots)
        assert log["waste/dead_rows"] == pytest.approx(dead / slots)
        assert log["waste/padding"] == pytest.approx((slots - useful - dead) / slots)
        assert useful / slots - log["waste/repeated_prompts"] <= log["waste/slots_of_trl_ext"] < 1
    rows = [entry for entry in trainer.state.log_history if KEYS & entry.keys()]
    assert rows == [entry for entry in trainer.state.log_history if "loss" in entry]
    assert callback.since_log == SavedCompute()


@pytest.mark.train
def test_trackers_that_come_after_it_see_them(tmp_path):
    class Tracker(TrainerCallback):
        seen: list[dict[str, Any]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    trainer = trainer_of(tmp_path)
    for callback in (WasteCallback(trainer), Tracker()):
        trainer.add_callback(callback)
    trainer.train()
    assert [logs.keys() >= KEYS for logs in Tracker.seen] == ["loss" in logs for logs in Tracker.seen]


@pytest.mark.train
@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 6, "num_iterations": 2}, {"loss_type": "bnpo"}])
def test_the_training_is_the_same(settings, tmp_path):
    runs = []
    for watches in (False, True):
        trainer = trainer_of(tmp_path / str(watches), max_steps=3, **settings)
        if watches:
            trainer.add_callback(WasteCallback(trainer))
        trainer.train()
        runs.append(trainer)
    plain, watched = runs
    assert tiny.history(watched, *KEYS) == tiny.history(plain)
    expected = tiny.weights(plain.model)
    assert all(torch.equal(value, expected[name]) for name, value in tiny.weights(watched.model).items())
    for one, other in zip(watched.losses, plain.losses, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.train
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "bnpo"},
        {"steps_per_generation": 8},
        {"steps_per_generation": 6, "max_steps": 3},
        {"num_iterations": 2, "max_steps": 4},
        {"pad_to_multiple_of": 4},
        {"arguments": {"model": tiny.gpt2}},
    ],
)
def test_the_comparison_is_with_what_trl_ext_computes(settings, tmp_path):
    """On the same rollouts: nothing is learned, so that both sample the same."""
    made = []
    for trainer_class in (Watched, trl_ext.GRPOTrainer):
        given = {**settings, "arguments": {name: make() for name, make in settings.get("arguments", {}).items()}}
        trainer = trainer_of(tmp_path / trainer_class.__name__, trainer_class, learning_rate=0.0, **given)
        callback = WasteCallback(trainer) if trainer_class is Watched else None
        if callback:
            trainer.add_callback(callback)
        trainer.train()
        made.append(callback.total if callback else trainer.saved_compute)
    theirs, ours = made
    # TRL's trainer counts each use of a generation, ours each generation, in whole
    names = ("token_slots", "token_slots_trl", "useful_tokens", "dead_slots", "rows", "skipped_rows")
    counted = [[getattr(saved, name) for name in names] for saved in (theirs, ours)]
    if settings.get("steps_per_generation") == 6:  # two generations for three steps of four
        assert theirs.rows == ours.rows == 48
    if settings.get("steps_per_generation") == 8:
        assert theirs.rows == ours.rows == 32
    uses = settings.get("num_iterations", 1)
    assert counted[0] == [uses * count for count in counted[1]]
    assert waste_shares(theirs)["waste/slots_of_trl_ext"] == pytest.approx(1 - ours.share)


@pytest.mark.train
def test_the_summary(tmp_path, capsys):
    trainer, callback = watched(tmp_path)
    out = capsys.readouterr().out
    assert callback.summary() in out.splitlines()
    slots, useful, dead = recount(trainer.losses)
    computed = callback.total.token_slots
    assert callback.summary() == (
        f"{1 - useful / slots:.0%} of the training compute was padding ({(slots - useful - dead) / slots:.0%}) or "
        f"rows that can't move the policy ({dead / slots:.0%}), and {callback.total.repeated_prompts / slots:.0%} "
        f"computed a prompt again: {slots:,} token slots for {useful:,} useful tokens. For the same gradient, "
        f"trl_ext.GRPOTrainer computes {computed:,} ({computed / slots:.0%})."
    )


def test_by_hand():
    # 100 slots, 20 of them of dead rows; 30 tokens that matter; 40 are computed
    # Of the 30, 10 are prompts that another row has too
    saved = SavedCompute(token_slots=40, token_slots_trl=100, useful_tokens=30, dead_slots=20, repeated_prompts=10)
    shares = {"waste/share": 0.7, "waste/padding": 0.5, "waste/dead_rows": 0.2, "waste/repeated_prompts": 0.1}
    assert waste_shares(saved) == pytest.approx(shares | {"waste/slots_of_trl_ext": 0.4})


def test_only_the_main_process_speaks(tmp_path, capsys):
    trainer = trainer_of(tmp_path)
    callback = WasteCallback(trainer)
    callback.total = SavedCompute(token_slots=40, token_slots_trl=100, useful_tokens=30, dead_slots=20, rows=1)
    trainer.state.is_world_process_zero = False
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert capsys.readouterr().out == ""


@pytest.mark.train
def test_a_training_that_was_broken_off_is_not_mixed_into_the_next(tmp_path):
    class Breaking(Watched):
        breaks = True

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            if self.breaks and len(self.losses) == 6:  # in the second step
                raise ArithmeticError
            return super()._compute_loss(model, inputs)

    trainer = trainer_of(tmp_path, Breaking)
    callback = WasteCallback(trainer)
    trainer.add_callback(callback)
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert len(callback.micro_batches) == 2
    trainer.breaks, trainer._step, trainer._buffered_inputs = False, 0, None
    callback.total = SavedCompute()
    trainer.losses.clear()
    trainer.train()
    assert callback.total.token_slots_trl == recount(trainer.losses)[0]


def test_a_trainer_of_trl_ext_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, trl_ext.GRPOTrainer)
    with pytest.raises(TypeError, match=r"compute/saved"):
        WasteCallback(trainer)
