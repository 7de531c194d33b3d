"""What a run leaves. Uploads are in `tests/recipes/test_push.py`."""

import shlex

from trl_ext.run import publishing
from trl_ext.run.files import recipes_folder


def test_the_command_repeats_the_run():
    argv = ["--config", "a b.yaml", "--max_steps", "2"]
    assert publishing.command_line("recipes/dapo.py", argv, 1) == (
        "accelerate launch recipes/dapo.py --config 'a b.yaml' --max_steps 2"
    )
    assert publishing.command_line("/home/me/dapo.py", [], 4) == (
        "accelerate launch --num_processes 4 /home/me/dapo.py"
    )


def test_the_command_of_an_installed_recipe_has_no_path_of_the_machine():
    config = recipes_folder() / "configs" / "quickstart_dapo.yaml"
    argv = ["--config", str(config), "--output_dir", "/out"]
    command = publishing.command_line(str(recipes_folder() / "dapo.py"), argv, 2)
    assert shlex.split(command) == [
        *("trl-ext", "run", "dapo", "--num_processes", "2"),
        *("--config", "quickstart_dapo.yaml", "--output_dir", "/out"),
    ]


def test_local_data_is_not_linked(tmp_path):
    assert publishing.on_the_hub(str(tmp_path)) is None
    assert publishing.on_the_hub(None) is None
    assert publishing.on_the_hub("openai/gsm8k") == "openai/gsm8k"


def test_the_yaml_file_is_read_as_it_is(tmp_path):
    (tmp_path / "a.yaml").write_text("# β\nbeta: 0.1\n", encoding="utf-8")
    assert publishing.config_text(tmp_path / "a.yaml") == "# β\nbeta: 0.1\n"
    assert publishing.config_text(None) is None


def test_a_run_ends_with_what_it_reached(tmp_path):
    after = {"exact_match": 0.796, "intervals": {"exact_match": [0.775, 0.817]}, "prompts": 512}
    before = {"exact_match": 0.403, "intervals": {"exact_match": [0.367, 0.438]}, "prompts": 512}
    line = "exact match: 0.40 (0.37 to 0.44) → 0.80 (0.78 to 0.82), 95 % intervals, 512 held out"
    assert publishing.closing_lines({"before": before, "after": after}, tmp_path) == [line]
    (tmp_path / "learning.png").touch()
    pictures = f"pictures: {tmp_path / 'learning.png'}"
    assert publishing.closing_lines({"before": before, "after": after}, tmp_path) == [line, pictures]
    assert publishing.closing_lines({"before": None, "after": None}, tmp_path) == [pictures]
    (only_after,) = publishing.closing_lines({"before": None, "after": after}, tmp_path / "none")
    assert only_after.startswith("exact match: 0.80 (0.78 to 0.82), 95 %")
