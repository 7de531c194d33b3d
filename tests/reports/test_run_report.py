"""The page of a report: what is in it was in the runs, nothing in it runs or is loaded, and every text is a text."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import run_folders as runs
from PIL import Image

from trl_ext.cli import main
from trl_ext.errors import UserError
from trl_ext.reports.html import escaped
from trl_ext.reports.run_report import write_report


class Page(HTMLParser):
    """Elements with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(file) -> Page:
    page = Page(file.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def pixels(page: Page) -> Image.Image:
    (source,) = [image["src"] for image in page.named("img")]
    kind, data = str(source).split(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_one_run(tmp_path):
    folder = runs.finished(tmp_path / "dapo", learning_rate=3e-4)
    file = write_report([folder])
    assert file == folder / "report.html"
    page = read(file)
    assert pixels(page).width > 1000
    for text in ("Report of dapo", "org/model", "20 of 20", "12k", "0.300 (0.250 to 0.350)", "0.600 (0.550 to 0.650)"):
        assert text in page.text, text
    assert "Settings that were chosen" in page.text and "0.0003" in page.text
    # Prompts 0 and 1 were solved and aren't any more; 5 to 9 are now; 2, 3, 4, 10 and 11 stay
    assert (
        "Of 12 held-out prompts, the mean exact of 2 completion(s) rose on 5, fell on 2 and stayed on 5." in page.text
    )
    improved, worse = page.text.split("Improved most")[1].split("Got worse")
    assert [f"prompt {i} " in improved for i in range(12)] == [5 <= i <= 9 for i in range(12)]
    assert [f"prompt {i} " in worse for i in range(12)] == [i < 2 for i in range(12)]


def test_runs_side_by_side(tmp_path):
    one = runs.finished(tmp_path / "a", beta=0.1, reward_funcs=["x", "y"])
    two = runs.finished(tmp_path / "b", level=0.1, kl=9.0, beta=0.2, reward_funcs=["x", "y"])
    page = read(write_report([one, two], tmp_path / "both.html"))
    assert "2 runs side by side" in page.text
    settings = page.text.split("Settings that differ")[1].split("Completions")[0]
    assert "beta" in settings and "0.1" in settings and "0.2" in settings
    assert not {"output_dir", "seed", "reward_funcs", "learning_rate"} & set(re.findall(r"\w+", settings))
    # KL rises from 1 to 9 in the second run: above the band of the check from step 3 on, for the 5th log at step 7
    health = page.text.split("Health checks")[1].split("Settings that differ")[0]
    assert "Out of its range from step 7 to 20, to the end of training." in health
    assert health.count("In its range") >= 4 and "a larger KL coefficient" in health


def test_nothing_is_loaded_and_nothing_runs(tmp_path):
    folder = runs.finished(tmp_path / "<b>nasty</b> & $x$", nasty=True, note=runs.NASTY)
    state = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(state | {"model": runs.NASTY, "command": "</table>" + runs.NASTY}))
    file = write_report([folder])
    page = read(file)
    known = {*("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "table", "tr", "th", "td")}
    assert {name for name, _ in page.elements} <= known | {"img", "div", "b", "pre"}
    for name, attributes in page.elements:
        assert set(attributes) <= {"lang", "charset", "http-equiv", "content", "name", "class", "alt", "src"}, name
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.named("img"))
    assert not re.search(r"https?://", re.sub(r"https?://(huggingface\.co|arxiv\.org)", "", page.text))
    shown = runs.NASTY.replace("\x00", "\ufffd")
    assert page.text.count(shown) > 10  # as text
    assert "\x00" not in file.read_text(encoding="utf-8")


def test_escaping():
    assert escaped("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert escaped("\x1b[31m\x7f\ud800\n\t") == "\ufffd[31m\ufffd\ufffd\n\t"


def test_stages(tmp_path):
    page = read(write_report([runs.of_stages(tmp_path / "hybrid")]))
    assert "30 of 30" in page.text and "DPO, then PPO" in page.text
    stages = page.text.split("Stages")[1].split("Health checks")[0]
    assert all(name in stages for name in ("start", "dpo", "ppo", "0.300 (0.250 to 0.350)"))
    assert "preference accuracy (dpo)" in page.text and "kl (ppo)" in page.text
    # From the start of all stages to their end: prompts 1 to 4
    assert "Of 6 held-out prompts, the mean exact of 2 completion(s) rose on 4, fell on 0" in page.text


def test_a_run_under_way(tmp_path):
    runs.state(tmp_path / "run/checkpoint-9", runs.log(9), max_steps=40)
    runs.state(tmp_path / "run/checkpoint-10", runs.log(10), max_steps=40)
    page = read(write_report([tmp_path / "run"]))
    assert "10 of 40, not finished" in page.text
    assert "No held-out completions" in page.text and "No recipe wrote down its settings" in page.text


def test_runs_of_the_same_name(tmp_path):
    one, two = runs.finished(tmp_path / "a/dapo"), runs.finished(tmp_path / "b/dapo")
    page = read(write_report([one, two], tmp_path / "both.html"))
    assert str(one) in page.text and str(two) in page.text


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "is no folder. Name the output folder of a run"),
        ("empty", "has no log: there is no trainer_state.json in it"),
        ("cut", "can't be read: .* It may be cut off"),
    ],
)
def test_what_is_no_run(made, message, tmp_path, capsys):
    if made is not None:
        runs.finished(tmp_path / "run") if made == "cut" else (tmp_path / "run").mkdir()
    if made == "cut":
        (tmp_path / "run/summary.json").write_text('{"method": ')
    with pytest.raises(UserError, match=message):
        write_report([tmp_path / "run"])
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "trl-ext: error: " in capsys.readouterr().err


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs.finished(tmp_path / "a")
    runs.finished(tmp_path / "b")
    assert main(["report", "a", "b"]) == 0
    assert capsys.readouterr().out == "Written: report.html\n" and (tmp_path / "report.html").is_file()
    assert main(["report", "a", "--output", "x/y.html"]) == 0
    assert (tmp_path / "x/y.html").is_file() and not (tmp_path / "a/report.html").exists()
    (tmp_path / "file").write_text("")
    assert main(["report", "a", "--output", "file/y.html"]) == 2
    with pytest.raises(UserError, match="Name one or several"):
        write_report([])
