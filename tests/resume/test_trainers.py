"""
Runs that stop and go on. A resumed run must equal the uninterrupted one bit for bit: weights, counters, what is drawn.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import IterableDataset
from safetensors.torch import load_file

from trl_ext import DAPOTrainer, DUPOTrainer, GRPOTrainer, GSPOTrainer, RewardFunctionError
from trl_ext.evaluation.held_out import HeldOut


LIVE = set(range(4, 24, 2))


def build(trainer_class: type, directory: Path, reward: Any = None, arguments: Any = None, **settings: Any) -> Any:
    settings = {"max_steps": 5, "num_generations": 4, "save_strategy": "steps", "save_steps": 1, **settings}
    return tiny.trainer(tiny.recorded(trainer_class), directory, reward or tiny.LiveFor(LIVE), arguments, **settings)


def assert_same_state(one: Any, other: Any) -> None:
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    ours, theirs = one.run_state(), other.run_state()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, name
    assert one.state.num_input_tokens_seen == other.state.num_input_tokens_seen
    assert one._step == other._step


def assert_resumes(trainer_class: type, tmp_path: Path, at: list[int], arguments: Any = None, **settings: Any) -> Any:
    """Resumes a run from its checkpoints `at` and compares each end with that of the uninterrupted run."""
    arguments = arguments or dict
    full = build(trainer_class, tmp_path / "full", arguments=arguments(), **settings)
    full.train()
    for step in at:
        resumed = build(trainer_class, tmp_path / f"from-{step}", arguments=arguments(), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "full" / f"checkpoint-{step}"))
        assert_same_state(full, resumed)
        # The tail of the log is the same, selection and counters included
        tail = [entry for entry in tiny.history(full) if entry["step"] > step]
        assert tail
        assert tiny.history(resumed)[-len(tail) :] == tail
    return full


@pytest.mark.train
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DAPOTrainer, DUPOTrainer])
def test_each_selection(tmp_path, trainer_class):
    full = assert_resumes(trainer_class, tmp_path, at=[1, 4])
    if trainer_class is DAPOTrainer:
        assert any(len(batch.rounds) > 1 for batch in full.batches)
        assert full.counters.generation_rounds > full.state.global_step
    if trainer_class is DUPOTrainer:
        assert any(batch.selection.sources != [0, 1, 2, 3] for batch in full.batches)


@pytest.mark.train
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DAPOTrainer, DUPOTrainer, GSPOTrainer])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2},
        {"updates_per_generation": 3},
        {"updates_per_generation": 2, "num_iterations": 2},
    ],
    ids=["iterations", "updates", "both"],
)
def test_in_mid_generation(tmp_path, trainer_class, settings):
    # The rest of the buffer has to be trained on after the resume, not a new generation
    full = assert_resumes(trainer_class, tmp_path, at=[1, 4], **settings)
    assert len(full.batches) < 5


@pytest.mark.train
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DUPOTrainer])
def test_a_step_that_straddles_two_generations(tmp_path, trainer_class):
    # 3 micro-batches a generation, 2 a step
    settings = {
        "steps_per_generation": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "token_normalization": "generation_batch",
    }
    assert_resumes(trainer_class, tmp_path, at=[1, 2], **settings)


@pytest.mark.train
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DAPOTrainer])
@pytest.mark.parametrize("updates", [1, 2])
def test_across_epochs(tmp_path, trainer_class, updates):
    # 9 prompts: two batches of 4 an epoch and one left over (one batch of 8 with two updates); 3 epochs
    def arguments() -> dict[str, Any]:
        return {"train_dataset": tiny.prompts(9)}

    full = assert_resumes(
        trainer_class,
        tmp_path,
        at=[2, 3],  # where an epoch ends, and in mid-epoch (the reverse with two updates)
        arguments=arguments,
        max_steps=-1,
        num_train_epochs=3,
        updates_per_generation=updates,
    )
    assert full.state.global_step == 6


@pytest.mark.train
def test_epochs_have_different_orders(tmp_path):
    reward = tiny.Remembering(tiny.hashed)
    settings = {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "no"}
    build(GRPOTrainer, tmp_path, reward, {"train_dataset": tiny.prompts(8)}, **settings).train()
    batches = [reward.at_step(step)[0].prompts[::4] for step in range(6)]
    orders = [batches[2 * epoch] + batches[2 * epoch + 1] for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def words():
    yield from tiny.prompts(32)


@pytest.mark.train
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DAPOTrainer])
def test_iterable_data_set(tmp_path, trainer_class):
    def arguments() -> dict[str, Any]:
        return {"train_dataset": IterableDataset.from_generator(words)}

    assert_resumes(trainer_class, tmp_path, at=[1, 3], arguments=arguments)


@pytest.mark.train
def test_running_baseline(tmp_path):
    settings = {"advantage_estimator": "reinforce", "reinforce_baseline_momentum": 0.5}
    full = assert_resumes(GRPOTrainer, tmp_path, at=[1, 4], **settings)
    assert full._baseline


@pytest.mark.train
def test_sequence_token(tmp_path):
    settings = {"importance_sampling_level": "sequence_token", "updates_per_generation": 2}
    assert_resumes(GSPOTrainer, tmp_path, at=[1, 3], **settings)


@pytest.mark.train
def test_stream_goes_on_in_a_later_pass(tmp_path):
    # 4 live prompts of 32 and 3 rounds a batch: the stream has passed its end before the last checkpoint
    full = build(DAPOTrainer, tmp_path / "full", tiny.LiveFor({4, 5}), max_refill_rounds=4, max_steps=6)
    full.train()
    assert full.prompt_stream.epoch > 0
    resumed = build(DAPOTrainer, tmp_path / "resumed", tiny.LiveFor({4, 5}), max_refill_rounds=4, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-5"))
    assert_same_state(full, resumed)


@pytest.mark.train
def test_metrics_between_two_logs_survive(tmp_path):
    # logged every 4 steps, stopped at 2: the mean is still over 4
    full = build(DAPOTrainer, tmp_path / "full", max_steps=4, logging_steps=4)
    full.train()
    resumed = build(DAPOTrainer, tmp_path / "resumed", max_steps=4, logging_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-2"))
    (one,), (other,) = tiny.history(full), tiny.history(resumed)
    # transformers itself restarts the mean of the loss
    one.pop("loss"), other.pop("loss")
    assert one == other


@pytest.mark.train
def test_between_two_generations_no_buffer_is_saved(tmp_path):
    trainer = build(DAPOTrainer, tmp_path, max_steps=2)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "trl_ext_state.pt").exists()
    assert not list((tmp_path / "checkpoint-1").glob("trl_ext_buffer_*"))


def test_model_only_checkpoints_hold_no_state(tmp_path):
    build(DAPOTrainer, tmp_path, max_steps=1, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-1" / "trl_ext_state.pt").exists()


@pytest.mark.train
def test_a_checkpoint_of_trls_can_be_resumed(tmp_path):
    # Change the import in mid-run: what TRL didn't save begins anew
    import trl

    theirs = trl.GRPOTrainer(
        model=tiny.stopping(),
        reward_funcs=tiny.LiveFor(LIVE),
        args=trl.GRPOConfig(**tiny.cpu_settings(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    theirs.train()
    ours = build(DAPOTrainer, tmp_path, max_steps=4)
    ours.train(resume_from_checkpoint=True)
    assert ours.state.global_step == 4
    assert len(ours.batches) == 2


# Reward functions that fail


class Fails:
    """Rewards until a step, and then does something wrong with one sample."""

    __name__ = "flaky"

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def __call__(self, completion_ids: Any, target: Any, trainer_state: Any, **kwargs: Any) -> list[Any]:
        rewards: list[Any] = tiny.hashed(completion_ids)
        if trainer_state.global_step < self.step:
            return rewards
        if self.how == "raises":
            raise ZeroDivisionError("no such thing")
        if self.how == "NaN":
            rewards[2] = math.nan
        if self.how == "infinity":
            rewards[2] = math.inf
        if self.how == "too few":
            rewards.pop()
        return rewards


SAID = {"raises": "ZeroDivisionError: no such thing", "NaN": "nan", "infinity": "inf", "too few": "15 rewards"}


@pytest.mark.train
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DAPOTrainer, DUPOTrainer])
@pytest.mark.parametrize("how", SAID)
def test_a_reward_function_that_fails(tmp_path, trainer_class, how):
    settings = {"max_steps": 5, "save_strategy": "no"}
    trainer = build(trainer_class, tmp_path, Fails(3, how), **settings)
    with pytest.raises(RewardFunctionError) as error:
        trainer.train()
    # One message: the function, what it did, the sample
    message = str(error.value)
    assert "`flaky`" in message
    assert SAID[how] in message
    sample = re.search(r"prompts: '(w\d+ w\d+)'", message)
    assert sample
    assert sample.group(1) in tiny.prompts()["prompt"]
    assert "completion_ids: [" in message
    assert "target: " in message
    # The three steps that were trained are saved, and the error says where
    checkpoint = tmp_path / "checkpoint-3"
    assert str(checkpoint) in "".join(error.value.__notes__)
    saved = load_file(checkpoint / "model.safetensors")
    for name, value in saved.items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    assert any((value != tiny.stopping().state_dict()[name]).any() for name, value in saved.items())
    if how != "raises":
        return  # the checkpoint is the same, however the function failed
    # and the run goes on from there
    mended = build(trainer_class, tmp_path, tiny.hashed, **settings)
    mended.train(resume_from_checkpoint=True)
    assert len(mended.batches) == 2
    # as if nothing had happened: what the failed generation drew was undone
    whole = build(trainer_class, tmp_path / "whole", tiny.hashed, **settings)
    whole.train()
    assert_same_state(whole, mended)


@pytest.mark.train
def test_an_async_reward_function_that_fails(tmp_path):
    inner = Fails(2, "raises")

    async def flaky(**columns: Any) -> list[float]:
        return inner(**columns)

    with pytest.raises(RewardFunctionError, match="`flaky` raised ZeroDivisionError"):
        build(DAPOTrainer, tmp_path, flaky, save_strategy="no").train()
    assert (tmp_path / "checkpoint-2").exists()


def test_one_of_several_is_named(tmp_path):
    funcs = [tiny.hashed, Fails(1, "NaN"), tiny.low_ids]
    with pytest.raises(RewardFunctionError, match="`flaky` returned nan"):
        build(DAPOTrainer, tmp_path, funcs, save_strategy="no").train()
    assert (tmp_path / "checkpoint-1").exists()


def test_failing_before_the_first_step_saves_nothing(tmp_path):
    with pytest.raises(RewardFunctionError, match="`flaky`"):
        build(GRPOTrainer, tmp_path, Fails(0, "raises"), save_strategy="no").train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.train
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DUPOTrainer])
def test_failing_in_the_middle_of_a_step(tmp_path, trainer_class):
    # 1 micro-batch a generation, 2 a step: the second generation of step 3 fails, the first one's gradient is lost
    class FailsInTheMiddle:
        __name__ = "flaky"

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, completion_ids: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
            self.calls += 1
            if self.calls == 6:
                raise ZeroDivisionError
            return tiny.hashed(completion_ids)

    settings = {
        "max_steps": 4,
        "save_strategy": "no",
        "steps_per_generation": 1,
        "token_normalization": "generation_batch",
    }
    trainer = build(trainer_class, tmp_path, FailsInTheMiddle(), **settings)
    with pytest.raises(RewardFunctionError, match="on none of its first 8 samples alone"):
        trainer.train()
    state = torch.load(tmp_path / "checkpoint-2" / "trl_ext_state.pt", weights_only=False)
    assert state["step"] == 4  # 2 finished steps, not the 5 micro-batches that were begun
    mended = build(trainer_class, tmp_path, tiny.hashed, **settings)
    mended.train(resume_from_checkpoint=True)
    assert mended.state.global_step == 4
    assert mended._step == 8


@pytest.mark.train
def test_failing_in_an_evaluation(tmp_path):
    class FailsInEvaluation:
        __name__ = "flaky"

        def __call__(self, completion_ids: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
            if trainer_state.global_step == 2 and len(completion_ids) == 8:
                raise ZeroDivisionError
            return tiny.hashed(completion_ids)

    trainer = build(
        GRPOTrainer,
        tmp_path,
        FailsInEvaluation(),
        {"eval_dataset": tiny.prompts(2)},
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
    )
    with pytest.raises(RewardFunctionError, match="`flaky`"):
        trainer.train()
    # Two steps were trained: they must not be lost
    assert (tmp_path / "checkpoint-2").exists()


@pytest.mark.train
@pytest.mark.parametrize("every", [2, 0])
def test_failing_while_held_out_prompts_are_measured(tmp_path, every):
    # In the middle of the run and after its last step
    held_out = [{"prompt": "w1 w2", "target": -1}, {"prompt": "w2 w3", "target": -1}]

    class FailsOnHeldOut:
        __name__ = "flaky"

        def __call__(self, completion_ids: Any, target: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
            if trainer_state.global_step == 2 and target[0] == -1:
                raise ZeroDivisionError
            return tiny.hashed(completion_ids)

    trainer = build(GRPOTrainer, tmp_path, FailsOnHeldOut(), max_steps=3 if every else 2, save_strategy="no")
    trainer.add_callback(HeldOut(trainer, held_out, num_samples=2, every=every))
    with pytest.raises(RewardFunctionError, match="`flaky`"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_an_interrupted_generation_leaves_nothing_behind(tmp_path):
    class Interrupted(DUPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt  # after the selection

    trainer = build(Interrupted, tmp_path, updates_per_generation=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    rows = [trainer.train_dataset[0]]
    rewards = trainer.roll_out(rows, 2, seed=1).rewards
    assert rewards.shape == (1, 2, 1)
    assert torch.equal(rewards, trainer.roll_out(rows, 2, seed=1).rewards)


@pytest.mark.train
@pytest.mark.parametrize("change", [{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}])
def test_a_half_used_batch_of_another_layout_is_generated_anew(tmp_path, caplog, change):
    settings = {"num_iterations": 2, "steps_per_generation": 2}
    build(GRPOTrainer, tmp_path, **settings).train()
    resumed = build(GRPOTrainer, tmp_path, **{**settings, **change, "steps_per_generation": 4})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 5
    assert "generated anew" in caplog.text


@pytest.mark.train
def test_failing_does_not_spoil_a_good_checkpoint(tmp_path):
    # Saved after step 2, as every step; then the next generation fails. What is resumed must still be the run that
    # would have been: the failed attempt has used random numbers, and drawn prompts.
    full = build(DAPOTrainer, tmp_path / "full", tiny.hashed, max_steps=4)
    full.train()
    with pytest.raises(RewardFunctionError):
        build(DAPOTrainer, tmp_path / "failed", Fails(2, "raises"), max_steps=4).train()
    mended = build(DAPOTrainer, tmp_path / "failed", tiny.hashed, max_steps=4)
    mended.train(resume_from_checkpoint=True)
    assert_same_state(full, mended)


@pytest.mark.train
def test_a_failure_elsewhere_saves_too(tmp_path):
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        if trainer.state.global_step == 2:
            raise ConnectionError("no server")
        ids = [tiny.tokenizer()(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": [[5, i % 7 + 4] for i in range(len(ids))], "logprobs": None}

    with pytest.raises(ConnectionError, match="no server") as error:
        build(GRPOTrainer, tmp_path, tiny.hashed, {"rollout_func": rollout}, save_strategy="no").train()
    assert "checkpoint-2" in "".join(error.value.__notes__)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
