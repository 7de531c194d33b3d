"""
All of our metrics reach the trackers that transformers and TRL report to, with the same numbers: selection, critic,
health checks and held-out results, as TRL's own. So do the tables of completions, with rewards and advantages.
"""

import importlib.util
import json
import math
import struct
from pathlib import Path
from typing import Any

import pandas
import pytest
import tiny
from transformers.integrations.integration_utils import rewrite_logs

from trl_ext import DAPOTrainer, DUPOTrainer, GRPOTrainer, HealthChecks, PPOTrainer
from trl_ext.evaluation.held_out import HeldOut
from trl_ext.monitors.progress import ProgressLines


pytestmark = pytest.mark.train


def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (the extra `tracking`)")


def trained(trainer_class: Any, folder: Path, tracker: str, **settings: Any) -> Any:
    """Two steps with everything on that logs."""
    trainer = tiny.trainer(trainer_class, folder, report_to=tracker, log_completions=True, **settings)
    HealthChecks().add_to(trainer)
    trainer.add_callback(HeldOut(trainer, list(tiny.prompts(4)), num_samples=2, batch_size=4, every=1))
    ProgressLines.instead_of_bars(trainer)
    trainer.train()
    return trainer


DAPO, PPO = {"beta": 0.1}, {"num_generations": 1, "kl_coef": 0.1}


# What wandb and trackio keep as a summary of the run
TOTALS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


def logged(trainer: Any, *without: str) -> dict[tuple[str, int], float]:
    """What is in the trainer's own log, by the names that trackers give to it, and by step."""
    found = {}
    for entry in trainer.state.log_history:
        left_out = (
            "step",
            "epoch",
            "total_flos",
            *without,
        )  # what transformers adds to the one or takes from the other
        values = {key: value for key, value in entry.items() if key not in left_out and value is not None}
        found |= {(key, entry["step"]): float(value) for key, value in rewrite_logs(values).items()}
    return found


def events(folder: Path) -> dict[tuple[str, int], float]:
    """The scalars in the event files of a folder. A record is its length, two check sums and a message."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in folder.rglob("events.out.tfevents.*"):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 12 + length + 4
    return found


@needs("tensorboardX")
@pytest.mark.parametrize(("trainer_class", "settings"), [(DAPOTrainer, DAPO), (PPOTrainer, PPO)])
def test_tensorboard_has_all_metrics(trainer_class, settings, tmp_path):
    trainer = trained(trainer_class, tmp_path, "tensorboard", **settings)
    expected, found = logged(trainer), events(tmp_path)
    assert len(expected) > 80
    missing = [key for key in expected if key not in found]
    assert missing == []
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-7), key
    names = {name for name, _ in expected}
    ours = {"train/health/length", "train/held_out/first_token_even/low", "train/completions/mean_length"}
    of_ppo = {"train/objective/kl", "train/val/explained_variance", "train/loss/value_avg"}
    assert ours | (of_ppo if trainer_class is PPOTrainer else {"train/selection/groups_kept", "train/kl"}) <= names


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DAPOTrainer, DUPOTrainer])
def test_tables_of_completions(trainer_class, tmp_path, capsys):
    """Each row has its own reward and advantage, whatever was selected."""
    trainer = tiny.trainer(trainer_class, tmp_path, log_completions=True, num_completions_to_print=2, max_steps=3)
    trainer.train()
    files = sorted((tmp_path / "completions").glob("*.parquet"))
    assert len(files) == 3
    differ = 0
    for file in files:
        table = pandas.read_parquet(file)
        assert set(table) == {"step", "prompt", "completion", "first_token_even", "advantage"} and len(table) == 16
        for at in range(0, 16, 4):
            group = table.iloc[at : at + 4]
            assert len(set(group["prompt"])) == 1
            rewards = group["first_token_even"].to_numpy(float)
            words = [text.split()[:1] for text in group["completion"]]
            # w0 is token 4: the first word is even where its number is. Special tokens are not in the text
            seen = [(float(int(w[0][1:]) % 2 == 0), reward) for w, reward in zip(words, rewards, strict=True) if w]
            assert sum(even == reward for even, reward in seen) >= len(seen) - 1
            expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            assert group["advantage"].to_numpy(float) == pytest.approx(expected, abs=2e-3)
            differ += rewards.std() > 0
    assert differ > 3
    assert "Advantage" in capsys.readouterr().out


@needs("wandb")
def test_wandb_has_all_metrics(tmp_path, monkeypatch):
    """Offline; what it would send is what its run has."""
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    sent: list[dict] = []
    monkeypatch.setattr(
        "wandb.sdk.wandb_run.Run._partial_history_callback", lambda self, data, *_, **__: sent.append(data)
    )
    trainer = trained(DAPOTrainer, tmp_path / "out", "wandb", **DAPO)
    wandb.finish()
    found = {(key, row.get("train/global_step")): value for row in sent for key, value in row.items()}
    for key, value in logged(trainer, *TOTALS).items():
        assert found[key] == value, key
    tables = [row["completions"] for row in sent if "completions" in row]
    assert len(tables) >= 2 and "advantage" in tables[0].columns and len(tables[0].data) == 16


@needs("trackio")
def test_trackio_has_all_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trainer = trained(DAPOTrainer, tmp_path / "out", "trackio", run_name="tiny", project="tests", **DAPO)
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("tests", "tiny")
    found = {(key, row.get("train/global_step")): value for row in rows for key, value in row.items()}
    for key, value in logged(trainer, *TOTALS).items():
        assert found[key] == value or (math.isnan(value) and found[key] is None), key
    assert any("completions" in row for row in rows), json.dumps(rows[-1], default=str)[:500]
