"""A card's sections from the folder of a run: what they say is there, and Markdown stays Markdown."""

import re

import run_folders

from trl_ext.reports.card_sections import details, fenced
from trl_ext.reports.run_files import read_run


def card(folder) -> dict[str, str]:
    """Sections by their headings."""
    parts = re.split(r"^## (.*)\n", details(read_run(folder), "someone/tiny"), flags=re.MULTILINE)
    assert parts[0] == ""
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_what_a_finished_run_says(tmp_path):
    chosen = {"learning_rate": 3e-4, "reward_funcs": ["a", "b"], "lora_r": 16}
    sections = card(run_folders.finished(tmp_path / "run", kl=9.0, **chosen))
    assert list(sections) == ["Completions", "Health checks", "Settings", "Limits"]
    completions = sections["Completions"]
    assert "Of 12 held-out prompts, the mean exact rose on 5, fell on 2 and stayed on 5." in completions
    assert completions.count("**better: exact 0 → 1**") == 3 and completions.count("**worse: exact 1 → 0**") == 2
    assert "Prompt\n```text\nprompt 5 word\n```" in completions
    assert "| kl | Out of its range from step 7 to 20, to the end of training." in sections["Health checks"]
    assert "| entropy | In its range." in sections["Health checks"]
    settings = sections["Settings"]
    assert "| `learning_rate` | 0.0003 |" in settings and "| `reward_funcs` | a, b |" in settings
    assert "| `seed` | 0 (default) |" in settings and "output_dir" not in settings
    assert "lora_r" not in settings  # no adapter was trained
    assert "What was measured is exact, on 64 prompts of one data set" in sections["Limits"]
    assert "this is one run" in sections["Limits"]


def test_what_was_not_measured_is_not_said(tmp_path):
    run_folders.state(tmp_path / "run", [{"step": 1, "loss": 0.5}])
    sections = card(tmp_path / "run")
    assert list(sections) == ["Limits"]
    assert "was not measured on held-out data" in sections["Limits"]


def test_a_text_ends_no_block():
    assert fenced("a") == "```text\na\n```"
    assert fenced("a\n```\n````b") == "`````text\na\n```\n````b\n`````"


def test_stages(tmp_path):
    sections = card(run_folders.of_stages(tmp_path / "run"))
    assert "| preference accuracy (dpo) |" in sections["Health checks"] and "| kl (ppo) |" in sections["Health checks"]
    assert "rose on 4, fell on 0 and stayed on 2" in sections["Completions"]
    assert "on 64 prompts" in sections["Limits"]
