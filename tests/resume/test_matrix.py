"""
Every trainer with every feature, interrupted and resumed: the result is that of the uninterrupted run, bit for bit.
`cases.py` has the table. What is interrupted here by an exception is killed in `test_faults.py`, for all cells.
"""

import random

import pytest
import torch
from comparing import equal
from pipelines.runs import adapter, same
from resume import cases
from resume.cases import CELLS, FEATURES, PIPELINE, REFUSED, RUNS, SAME, STEPS, TRAINERS, built
from resume.worker import result
from transformers import TrainerCallback

import trl_ext
from trl_ext.trainers.seams.whole_checkpoints import checkpoints_of


# One cell a feature, and each trainer at least once; `make test-faults` has them all
SHORT = [
    ("GRPO", "sync_ref_model"),
    ("GRPO", "all at once"),
    ("RLOO", "all at once"),
    ("DAPO", "informed draws"),
    ("DUPO", "half-used batches"),
    ("GSPO", "objectives"),
    ("RLOO", "curriculum"),
    ("PPO head", "QLoRA"),
    ("PPO head", "LoRA and sync_ref_model"),
    ("PPO model", "all at once"),
    ("VAPO", "all at once"),
    ("DPO", "LoRA, eval and curriculum"),
    ("DPO", "sync_ref_model"),
    ("DPO", "LoRA and sync_ref_model"),
]


class Interruption(TrainerCallback):
    """An exception before an optimizer step, when its gradient is there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_table_is_complete():
    public = {name.removesuffix("Trainer") for name in trl_ext.__all__ if name.endswith("Trainer")}
    assert public == {name.partition(" ")[0] for name in TRAINERS}
    assert len(CELLS) == len(set(CELLS)) == len(TRAINERS) * len(FEATURES)
    assert set(REFUSED) | set(SAME) | set(RUNS) == set(CELLS)
    assert len(REFUSED) + len(SAME) + len(RUNS) == len(CELLS)
    assert {trainer for trainer, _ in [*SHORT, (PIPELINE, "")]} == set(TRAINERS)


@pytest.mark.parametrize(("trainer", "name"), REFUSED, ids=map(", ".join, REFUSED))
def test_a_combination_without_a_meaning_is_refused(trainer, name, tmp_path):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=REFUSED[trainer, name]):
        built(trainer, name, tmp_path, tmp_path / "run")


@pytest.mark.train
@pytest.mark.parametrize(("trainer", "name"), SHORT, ids=map(", ".join, SHORT))
def test_interrupted_and_resumed(trainer, name, tmp_path):
    whole = built(trainer, name, tmp_path, tmp_path / "whole")
    whole.train()
    step = random.Random(f"{trainer} {name}").randrange(1, STEPS)
    cut = built(trainer, name, tmp_path, tmp_path / "cut")
    cut.add_callback(Interruption(step))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert checkpoints_of(tmp_path / "cut")[0].name == f"checkpoint-{step}"
    again = built(trainer, name, tmp_path, tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS
    found, expected = result(again), result(whole)
    for what, value in expected.items():
        assert equal(found[what], value), what


@pytest.mark.slow
@pytest.mark.train
def test_the_pipeline_interrupted_and_resumed(tmp_path):
    built(PIPELINE, "all at once", tmp_path, tmp_path / "whole").train()
    for stage, step in (("dpo", 2), ("ppo", 3)):
        cut = built(PIPELINE, "all at once", tmp_path, tmp_path / "cut")
        prepare = cut.prepare

        def interrupted(name, trainer, stage=stage, step=step, prepare=prepare):
            prepare(name, trainer)
            if name == stage:
                trainer.add_callback(Interruption(step))

        cut.prepare = interrupted
        with pytest.raises(KeyboardInterrupt):
            cut.train()
    built(PIPELINE, "all at once", tmp_path, tmp_path / "cut").train()
    for folder in ("round_1/dpo", "round_1/ppo", "."):
        assert same(adapter(tmp_path / "whole" / folder), adapter(tmp_path / "cut" / folder)), folder
    critics = [tmp_path / name / "critic/critic.safetensors" for name in ("whole", "cut")]
    assert critics[0].read_bytes() == critics[1].read_bytes()


def test_the_policy_is_the_same_for_all(tmp_path):
    """Or runs would differ from the start."""
    first, second = (cases.policy(tmp_path / name, False) for name in ("a", "b") if (tmp_path / name).mkdir() is None)
    one, other = (cases.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (first, second))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
