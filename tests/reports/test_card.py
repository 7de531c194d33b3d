"""The card's section: the results in words and tables, and nobody's password."""

import tiny

from trl_ext import DAPOTrainer
from trl_ext.monitors.bands import Band, entries
from trl_ext.reports.card import results_section
from trl_ext.reports.summary import machine_in_words


SUMMARY = {
    "method": "DAPO",
    "model": "runs/sft",
    "dataset": "runs/data",
    "reward_model": None,
    "critic": None,
    "prediction": None,
    "before": {"exact_match": 0.3359, "intervals": {"exact_match": [0.3038, 0.3681]}, "prompts": 512, "samples": 2048},
    "after": {"exact_match": 0.7654, "intervals": {"exact_match": [0.74, 0.79]}, "prompts": 512, "samples": 2048},
    "gain": {"exact_match": 0.4295, "intervals": {"exact_match": [0.4, 0.46]}, "prompts": 512, "samples": 2048},
    "seconds": 22.1,
    "steps": 120,
    "generation_rounds": 133,
    "generated_tokens": 159_801,
    "compute_saved": 0.614,
    "trained_tokens": 117_444,
    "parameters": 109_248,
    "trainable_parameters": 109_248,
    "seed": 0,
    "command": "accelerate launch recipes/dapo.py --config a.yaml --hub_token ***",
    "machine": {"device": "cpu", "processes": 1, "cpus": 2, "platform": "Linux"},
    "versions": {"python": "3.11.7", "trl": "1.16.0"},
}


def test_results_as_a_table():
    card = results_section(SUMMARY, "learning.png", "max_steps: 120\nhub_token: hf_abc\n")
    assert card.startswith("## Results\n")
    assert "Held-out prompts (512, 2048 sampled completions), before and after 120 optimizer steps" in card
    assert "| exact_match | 0.336 (0.304 to 0.368) | 0.765 (0.740 to 0.790) | 0.429 (0.400 to 0.460) |" in card
    assert "](learning.png)" in card
    assert "| tokens generated | 160k |" in card
    assert "| padding and dead rows not computed | 61% |" in card
    assert "| parameters | 109,248 trained of 109,248 |" in card
    assert "```yaml\nmax_steps: 120\nhub_token: ***\n```" in card
    assert "--config a.yaml --hub_token ***" in card
    assert "hf_abc" not in card
    assert "| machine | 1 × cpu (2 cores, Linux) |" in card
    assert card.rstrip().endswith("Made on 1 × cpu (2 cores, Linux) with python 3.11.7, trl 1.16.0.")
    assert "expected" not in card


def test_expected_numbers_and_what_became_of_them():
    bands = [
        Band("reward", 20, 0.2, 0.5, 0.41, 20),
        Band("reward", 20, 0.2, 0.5, 0.1, 22),
        Band("kl", 20, 0.2, 0.5),
        Band("kl", 40, 0.2, 0.5, reached=False),
        Band("loss", 20, 0.2, 0.5, float("nan"), 20),
    ]
    card = results_section(SUMMARY | {"expected": entries(bands)})
    found = [line.split(" | ")[-1].strip(" |") for line in card.splitlines() if " | 0.2 | 0.5 | " in line]
    assert found == ["0.41", "0.1, outside", "not logged", "the run ended before", "no number, outside"]


def test_devices_in_words():
    gpus = {"device": "cuda", "processes": 4, "cpus": 64, "platform": "Linux", "name": "NVIDIA A100-SXM4-80GB"}
    assert machine_in_words(gpus) == "4 × NVIDIA A100-SXM4-80GB"
    assert machine_in_words({"device": "mps", "processes": 1, "cpus": 8, "platform": "Darwin"}) == "1 × mps"


def test_critic_and_reward_model_have_their_rows():
    accuracy = {"pair_accuracy": 0.9336, "intervals": {"pair_accuracy": [0.912, 0.955]}, "prompts": 512}
    before = {"pair_accuracy": 0.5, "intervals": {"pair_accuracy": [0.457, 0.543]}, "prompts": 512}
    learned = {
        "reward_model": {"model": "runs/reward_model", **accuracy, "before": before},
        "critic": {"value_loss": 1.3, "explained_variance": 0.317, "kl": 1.234},
    }
    card = results_section(SUMMARY | learned, "learning.png", token_figure="tokens.png")
    assert "reward, critic, KL and held-out results](learning.png)" in card
    assert "](tokens.png)" in card
    assert "| reward model | `runs/reward_model` |" in card
    assert "| of 512 held-out pairs, it ranks right | 0.934 (0.912 to 0.955) |" in card
    assert "| of 512 held-out pairs, it ranked right before its training | 0.500 (0.457 to 0.543) |" in card
    assert "| explained variance of the critic, at the end | 0.32 |" in card
    assert "| KL to the reference, at the end | 1.23 nats per completion |" in card
    without = results_section(SUMMARY | {"reward_model": {"model": "org/model"}, "critic": {"value_loss": 1.0}})
    assert "| reward model | `org/model` |" in without
    assert "pairs" not in without and "KL" not in without


def test_a_prediction_has_its_picture_and_its_rows():
    predicted = SUMMARY | {"prediction": {"calibration_error": 0.0512, "tokens": 123_456}}
    card = results_section(predicted, "learning.png", reliability_figure="reliability.png")
    assert "](reliability.png)" in card
    assert "| calibration error of the prediction of groups, at the end | 0.05 |" in card
    assert "| prompt tokens read for it | 123k |" in card
    assert "calibration" not in results_section(SUMMARY) and "reliability" not in results_section(SUMMARY)
    unread = results_section(SUMMARY | {"prediction": {"calibration_error": 0.0512, "tokens": 0}})
    assert "calibration" in unread and "read for it" not in unread


def test_a_run_without_evaluation_says_so():
    missing = {
        "before": None,
        "after": None,
        "gain": None,
        "generated_tokens": None,
        "compute_saved": None,
        "command": None,
    }
    card = results_section(SUMMARY | missing)
    assert "without held-out evaluation" in card
    assert "tokens generated" not in card and "not computed" not in card
    assert "not computed" not in results_section(SUMMARY | {"compute_saved": 0.001})
    assert "reward model" not in card and "critic" not in card
    assert "Train it again" not in card


def test_the_section_stands_in_the_model_card(tmp_path):
    trainer = tiny.trainer(DAPOTrainer, tmp_path)
    trainer.card.sections.append(lambda: results_section(SUMMARY))
    trainer.create_model_card(model_name="tiny")
    trainer.create_model_card(model_name="tiny")  # as saving, and then pushing, do
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert card.count("## Results") == 1
    assert "0.336 (0.304 to 0.368)" in card
