"""Reports of runs of several stages, from stages made by hand."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from trl_ext.evaluation.held_out import Estimate
from trl_ext.pipelines.stages import StageResult
from trl_ext.reports import plots
from trl_ext.reports.card import stages_section, write_stages_card
from trl_ext.reports.plots import plot_stages
from trl_ext.reports.summary import summarize_stages


def estimate(mean: float) -> dict[str, Estimate]:
    return {"right": Estimate(mean, mean - 0.05, mean + 0.05, 8, 32), "length": Estimate(7.0, 6.0, 8.0, 8, 32)}


@pytest.fixture
def stages(tmp_path: Path) -> list[StageResult]:
    """Two rounds of 3 + 4 steps."""
    found = [StageResult("start", 0, str(tmp_path / "start"), measured=estimate(0.4))]
    for round_ in (1, 2):
        found.append(StageResult("pairs", round_, str(tmp_path / f"{round_}/pairs"), 0, 100 * round_, 5.0))
        for name, steps, tokens, key in (("dpo", 3, 0, "rewards/accuracies"), ("ppo", 4, 50, "objective/kl")):
            folder = tmp_path / f"{round_}/{name}"
            folder.mkdir(parents=True)
            log = [{"step": step, key: 0.1 * step, "rewards/right/mean": 0.5} for step in range(1, steps + 1)]
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
            mean = 0.4 + 0.1 * round_ + 0.02 * (name == "ppo")
            found.append(StageResult(name, round_, str(folder), steps, tokens, 10.0, estimate(mean)))
    return found


def test_a_summary_counts_pairs_to_the_stage_that_learns_from_them(stages: list[StageResult]) -> None:
    summary = summarize_stages(stages, "DPO, then PPO", "m", "d", "train --hub_token hf_secret", start_name="sft")
    entries = summary["stages"]
    assert [entry["name"] for entry in entries] == ["sft", "dpo", "ppo", "dpo 2", "ppo 2"]
    assert [entry["generated_tokens"] for entry in entries] == [0, 100, 50, 200, 50]
    assert [entry["seconds"] for entry in entries] == [0.0, 15.0, 10.0, 15.0, 10.0]
    assert [entry["right"] for entry in entries] == pytest.approx([0.4, 0.5, 0.52, 0.6, 0.62])
    assert (entries[2]["low"], entries[2]["high"]) == pytest.approx((0.47, 0.57))
    assert entries[2]["intervals"]["length"] == [6.0, 8.0]
    assert (summary["steps"], summary["generated_tokens"], summary["seconds"]) == (14, 400, 50.0)
    assert "hf_secret" not in summary["command"]


def test_stages_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    summary = summarize_stages([StageResult("dpo", 1, str(tmp_path), 5)], "DPO, then PPO")
    assert summary["stages"] == [] and summary["steps"] == 5
    assert "| stage |" not in stages_section(summary)


def test_the_card_has_a_row_a_stage(stages: list[StageResult], tmp_path: Path) -> None:
    summary = summarize_stages(stages, "DPO, then PPO", "m", None, "train it")
    section = stages_section(summary, "stages.png", "hub_token: hf_secret")
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows[0] == "| stage | right | length | optimizer steps | tokens generated | seconds |"
    assert rows[4] == "| ppo | 0.520 (0.470 to 0.570) | 7.000 (6.000 to 8.000) | 4 | 50 | 10 |"
    assert len(rows) == 7 and "hf_secret" not in section
    write_stages_card(tmp_path, section, summary, "org/base", None, "me/mine", tokenizer=None, example="s31=")
    card = (tmp_path / "README.md").read_text()
    assert "base_model: org/base" in card and "- dpo\n- ppo\n" in card and card.endswith(section)
    assert 'model="me/mine"' in card and 'generator("s31="' in card
    assert "library_name: peft" in card and "type: right" in card and "value: 0.62" in card  # the last stage's


def test_all_stages_share_one_axis(stages: list[StageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or path)
    plot_stages(stages, tmp_path / "stages.png", "title")
    results, accuracy, kl = drawn[0].axes
    held_out = results.containers[0].lines[0]
    assert held_out.get_xdata().tolist() == [0, 3, 7, 10, 14]
    assert held_out.get_ydata().tolist() == pytest.approx([0.4, 0.5, 0.52, 0.6, 0.62])
    assert accuracy.lines[0].get_xdata().tolist() == [1, 2, 3, 8, 9, 10]
    assert kl.lines[0].get_xdata().tolist() == [4, 5, 6, 7, 11, 12, 13, 14]
    assert [text.get_text() for text in results.texts] == ["DPO 1", "PPO 1", "DPO 2", "PPO 2"]


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    assert plot_stages([], tmp_path / "stages.png", "title").stat().st_size > 1000
