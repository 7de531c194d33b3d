"""
What `trl_ext` wraps or leans on upstream has not changed since somebody read it.

A new TRL can change the body of a method without a word in its signature. Then nothing may fail but the recorded hash:
read what changed, decide whether our side still holds, and record it.
"""

import ast
import inspect
import textwrap

import pytest
import trl
from upstream import record

from trl_ext.trainers import dpo, ratio_checks


RECORDED = record.recorded()


def test_every_override_and_every_dependence_has_a_record():
    missing = {path: reason for path, reason in record.watched().items() if path not in RECORDED["sources"]}
    assert not missing, (
        "not recorded yet. Read these sources, then record them with "
        f"`{record.COMMAND}`:\n" + "\n".join(f"  {path}: {reason}" for path, reason in missing.items())
    )


def test_nothing_is_recorded_that_no_longer_matters():
    stale = sorted(RECORDED["sources"].keys() - record.watched().keys())
    assert not stale, f"no longer overridden or leaned on. Re-record with `{record.COMMAND}`:\n" + "\n".join(stale)


@pytest.mark.parametrize("path", RECORDED["sources"])
def test_upstream_source_is_the_one_that_was_read(path):
    versions = ", ".join(
        f"{package} {was} -> {record.installed()[package]}" for package, was in RECORDED["versions"].items()
    )
    matters = f"It matters because: {record.watched().get(path, 'no longer')}."
    try:
        digest = record.digest(path)
    except (AttributeError, ModuleNotFoundError):
        pytest.fail(f"{path} is gone upstream ({versions}). {matters}", pytrace=False)
    assert digest == RECORDED["sources"][path], (
        f"{path} changed upstream ({versions}). {matters} Read the diff, then re-record with `{record.COMMAND}`."
    )


def test_overrides_calls_and_imports_are_found_by_themselves():
    assert record.overridden().keys() >= {
        "trl.trainer.grpo_trainer.GRPOTrainer.__init__",
        "trl.trainer.grpo_trainer.GRPOTrainer._generate",
        "trl.trainer.grpo_trainer.GRPOTrainer._generate_and_score_completions",
        "trl.trainer.grpo_trainer.GRPOTrainer._calculate_rewards",
        "trl.trainer.grpo_trainer.GRPOTrainer._prepare_inputs",
        "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss",
        "trl.trainer.grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies",
        "trl.trainer.grpo_trainer.GRPOTrainer._get_train_sampler",
        "transformers.trainer.Trainer._save_checkpoint",
        "trl.trainer.grpo_trainer.GRPOTrainer._load_optimizer_and_scheduler",
        "trl.trainer.base_trainer._BaseTrainer.create_model_card",
        "trl.trainer.grpo_config.GRPOConfig.__post_init__",
    }
    assert "transformers.trainer.Trainer._get_output_dir" in record.called()
    assert "trl.trainer.utils.nanstd" in record.imported()


def compared_with(method, names: set[str]) -> set[str]:
    """The texts with which a method compares a variable or attribute of one of these names."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
        left = getattr(node, "left", None)
        if isinstance(node, ast.Compare) and (getattr(left, "attr", None) or getattr(left, "id", None)) in names:
            found |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    return found


def test_trl_knows_the_losses_that_are_listed():
    assert set(ratio_checks.LOSS_TYPES) == compared_with(trl.GRPOTrainer._compute_loss, {"loss_type"})
    assert set(dpo.LOSS_TYPES) == compared_with(trl.DPOTrainer._compute_loss, {"loss_type"})
