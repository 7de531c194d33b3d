"""The figure: what is drawn is what was logged."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from trl_ext.evaluation.credit import TokenCredit
from trl_ext.reports import plots


def held_out(step: int, mean: float) -> dict:
    parts = {"low": mean - 0.05, "high": mean + 0.04, "prompts": 256, "samples": 1024}
    return {"step": step, "held_out/r": mean} | {f"held_out/r/{name}": value for name, value in parts.items()}


def selected(step: int) -> dict:
    return {
        "step": step,
        "reward": 0.1 * step + 1,
        "rewards/r/mean": 0.1 * step,
        "selection/groups_kept": 4.0,
        "selection/groups_surplus": 1.0,
        "selection/groups_all_wrong": 2.0,
        "selection/groups_all_right": float(step),
        "selection/groups_duplicated": 0.0,
        "selection/generated_tokens": 1000.0 * step,
        "selection/trained_tokens": 600.0 * step,
    }


def with_critic(step: int) -> dict:
    return {
        "step": step,
        "rewards/r/mean": 0.1 * step,
        "objective/scores": 1.0 - step,
        "loss/value_avg": 2.0 / step,
        "val/explained_variance": 0.1 * step - 0.2,
        "objective/kl": 0.5 * step,
        "selection/generated_tokens": 1000.0 * step,
        "selection/trained_tokens": 600.0 * step,
    }


def credit(*tokens: str, prompt: str = "s31=", ratios: bool = True) -> TokenCredit:
    numbers = [float(i + 1) for i in range(len(tokens))]
    return TokenCredit(
        prompt, list(tokens), numbers, [1.5 - n for n in numbers], numbers if ratios else None, 2.5, {"r": 2.5}
    )


LOG = [held_out(0, 0.2), *map(selected, (1, 2, 3, 4)), held_out(4, 0.6)]


@pytest.fixture
def axis():
    return Figure().subplots()


def labels(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


@pytest.mark.parametrize(
    "log",
    [
        LOG,
        LOG[1:5],  # no held-out evaluation
        [{"step": 1, "reward": 0.5, "frac_reward_zero_std": 0.25, "num_tokens": 100.0}],  # TRL's own trainer
        [{"step": 1, "loss": 2.0}],  # nothing of all that
        [],
        [
            held_out(0, 0.2),
            *map(with_critic, (1, 2, 3)),
            held_out(3, 0.6),
        ],  # groups of one: there is nothing to select
        [{"step": 1, "val/explained_variance": -3.0}],  # no reference, no value loss
        [{"step": 1, "val/explained_variance": None, "loss/value_avg": 0.0}],  # TRL logs NaN as `None`
    ],
)
def test_every_log_makes_a_picture(log, tmp_path):
    path = plots.plot_learning(log, tmp_path / "deep" / "learning.png", "title")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1430, 936)  # 11 x 7.2 inches at 130 dots
        assert len(image.convert("RGB").getcolors(maxcolors=1_000_000)) > 50


def test_a_critic_has_a_row_of_its_own(tmp_path):
    log = [with_critic(step) | selected(step) for step in (1, 2)]
    with Image.open(plots.plot_learning(log, tmp_path / "learning.png", "title")) as image:
        assert image.size == (1430, 1404)  # 11 x 10.8 inches


def test_series_takes_steps_that_have_all_keys_and_the_later_of_two():
    log = [{"step": 2, "a": 1, "b": 1}, {"step": 1, "a": 5, "b": 6}, {"step": 3, "a": 9}, {"step": 2, "a": 7, "b": 8}]
    assert plots.series(log, "a", "b") == ([1, 2], [[5.0, 7.0], [6.0, 8.0]])
    assert plots.series(log, "c") == ([], [[]])


def test_smoothing_neither_lags_nor_shortens():
    assert plots.smooth([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]
    assert plots.smooth([5.0], 3) == [5.0]


def test_reward_and_held_out_results_share_an_axis(axis):
    read = plots.read_estimates(LOG)
    plots._draw_reward(axis, LOG, {step: found["r"] for step, found in read.items()}, "r")
    sampled, smoothed = axis.lines[:2]
    assert list(sampled.get_ydata()) == pytest.approx([0.1, 0.2, 0.3, 0.4])  # `r` alone, not the sum of rewards
    assert len(smoothed.get_ydata()) == 4
    points, _, bars = axis.containers[0]
    assert list(points.get_ydata()) == [0.2, 0.6]
    ends = [list(segment[:, 1]) for segment in bars[0].get_segments()]
    assert ends == [pytest.approx([0.15, 0.24]), pytest.approx([0.55, 0.64])]


def test_groups_are_stacked(axis):
    plots._draw_groups(axis, LOG)
    assert labels(axis) == ["kept: trained on", "live, but not needed", "dead: all wrong", "dead: all right"]
    tops = [max(collection.get_paths()[0].vertices[:, 1]) for collection in axis.collections]
    assert tops == pytest.approx([4, 5, 7, 11])


def test_copies_are_drawn_where_there_are_any(axis):
    plots._draw_groups(axis, [selected(1), selected(2) | {"selection/groups_duplicated": 3.0}])
    assert list(axis.lines[0].get_ydata()) == [0, 3]
    assert "copies of live groups" in labels(axis)


def test_tokens_are_labelled_with_their_totals(axis):
    plots._draw_tokens(axis, LOG)
    assert labels(axis) == ["generated: 4k", "trained on: 2.4k"]
    assert [list(line.get_ydata()) for line in axis.lines] == [[1000, 2000, 3000, 4000], [600, 1200, 1800, 2400]]


def test_before_and_after(axis):
    plots._draw_before_after(axis, {step: found["r"] for step, found in plots.read_estimates(LOG).items()}, "r")
    assert [bar.get_height() for bar in axis.patches] == [0.2, 0.6]
    assert {"0.20", "0.60"} <= {text.get_text() for text in axis.texts}
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["before\nstep 0", "after\nstep 4"]


def test_what_was_not_logged_is_said(axis):
    plots._draw_tokens(axis, [])
    assert axis.texts[0].get_text() == "no token was counted"


def test_what_the_critic_is_worth_is_drawn_as_it_was_logged(axis):
    log = [with_critic(step) for step in (1, 2, 4)]
    figure = Figure()
    loss, explained, kl = figure.subplots(1, 3)
    plots._draw_value_loss(loss, log)
    plots._draw_explained_variance(explained, log)
    plots._draw_kl(kl, log)
    assert list(loss.lines[0].get_ydata()) == [2.0, 1.0, 0.5]
    assert list(explained.lines[0].get_ydata()) == pytest.approx([-0.1, 0.0, 0.2])
    assert explained.get_ylim() == (-0.1, 1)
    assert list(kl.lines[0].get_ydata()) == [0.5, 1.0, 2.0]
    plots._draw_kl(axis, [{"step": 1, "val/explained_variance": 0.1}])
    assert axis.texts[0].get_text() == "there was no reference"


def test_a_score_that_is_not_shown_has_its_own_axis(axis):
    log = [with_critic(step) for step in (1, 2, 3)]
    plots._draw_reward(axis, log, {}, "r")
    (right,) = [other for other in axis.figure.axes if other is not axis]
    assert list(right.lines[0].get_ydata()) == pytest.approx([-0.5, -1.0, -1.5])  # smoothed
    assert labels(axis)[-1] == "score maximised (right)"
    other = Figure().subplots()
    plots._draw_reward(other, [entry | {"objective/scores": entry["rewards/r/mean"]} for entry in log], {}, "r")
    assert len(other.figure.axes) == 1


@pytest.mark.parametrize(
    "credits",
    [
        [credit("1", "3", "<eos>"), credit("3", "<eos>")],
        [credit("The", " cost", "\n", " is $4$", prompt="what " * 40)],
        [credit(*("a" * 200), ratios=False)],
    ],
    ids=["two", "words", "long, without a reference"],
)
def test_every_completion_makes_a_picture(credits, tmp_path):
    with Image.open(plots.plot_tokens(credits, tmp_path / "deep" / "tokens.png", "title")) as image:
        assert image.format == "PNG"
        assert image.height == 936
        assert len(image.convert("RGB").getcolors(maxcolors=1_000_000)) > 50


def test_tokens_are_drawn_as_they_were_credited():
    shown = credit("1", "3", "<eos>")
    values, advantages, ratios = Figure().subplots(3)
    plots._draw_values(values, shown)
    plots._draw_advantages(advantages, shown)
    plots._draw_ratios(ratios, shown)
    plots._name_tokens(ratios, shown.tokens)
    score, value = values.lines
    assert set(score.get_ydata()) == {2.5}
    assert list(value.get_ydata()) == [1, 2, 3]
    assert [bar.get_height() for bar in advantages.patches] == [0.5, -0.5, -1.5]
    assert [bar.get_y() + bar.get_height() for bar in ratios.patches] == [1, 2, 3]
    assert ratios.get_yscale() == "log"
    assert [tick.get_text() for tick in ratios.get_xticklabels()] == ["1", "3", "<eos>"]
    assert values.get_title(loc="left") == "s31=\nr 2.5"


def test_predictions_against_what_came_true(tmp_path, monkeypatch):
    assert plots.plot_reliability(LOG, tmp_path / "none.png", "title") is None
    assert not (tmp_path / "none.png").exists()
    log = [
        *LOG,
        {
            f"reliability/{bin_}/{name}": value
            for bin_, values in {2: (30.0, 0.25, 0.1), 9: (10.0, 0.95, 0.8)}.items()
            for name, value in zip(("groups", "predicted", "came_true"), values, strict=True)
        },
    ]
    drawn, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or save(figure, path))
    path = plots.plot_reliability(log, tmp_path / "reliability.png", "title")
    with Image.open(path) as image:
        assert image.format == "PNG"
    (axis,) = drawn[0].axes
    assert axis.collections[0].get_offsets().tolist() == [[0.25, 0.1], [0.95, 0.8]]
    # (30 · 0.15 + 10 · 0.15) / 40
    assert axis.get_title(loc="left") == "the last 40 groups, error 0.150"
