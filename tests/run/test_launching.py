"""How a recipe is started."""

import sys

import pytest
from accelerate.commands import launch

from trl_ext.errors import UserError
from trl_ext.run import launching
from trl_ext.run.files import recipes_folder


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script that imports from its own folder and notes its arguments there."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "its_neighbour.py").write_text("NAME = 'neighbour'\n")
    file = tmp_path / "script.py"
    file.write_text(
        "import sys\nfrom pathlib import Path\nfrom its_neighbour import NAME\n"
        "if __name__ == '__main__':\n    Path(__file__).with_name('seen').write_text(f'{NAME} {sys.argv[1:]}')\n"
    )
    return file


def test_a_script_in_this_process(script):
    launching.run_here(script, ["--lr", "-1"])
    assert script.with_name("seen").read_text() == "neighbour ['--lr', '-1']"


def test_a_script_through_accelerate(script):
    launching.run_by_accelerate(script, ["--lr", "-1", "--num_processes", "7"], ["--num_processes", "1", "--cpu"])
    assert script.with_name("seen").read_text() == "neighbour ['--lr', '-1', '--num_processes', '7']"


def test_deepspeeds_file_is_found_where_the_recipes_are(tmp_path, monkeypatch):
    config = recipes_folder() / "accelerate" / "4xa100_80g.yaml"
    monkeypatch.chdir(recipes_folder().parent)
    options = launching.options_of_config(config)
    assert options == ["--config_file", str(config)]  # Accelerate finds it itself
    monkeypatch.chdir(tmp_path)
    options = launching.options_of_config(config)
    zero3 = str(recipes_folder() / "deepspeed" / "zero3.json")
    assert options == ["--config_file", str(config), "--deepspeed_config_file", zero3]
    args = launch.launch_command_parser().parse_args([*options, "--num_processes", "2", "script.py"])
    args, _, _ = launch._validate_launch_command(args)
    assert (args.deepspeed_config_file, args.num_processes, args.use_deepspeed) == (zero3, 2, True)


def test_a_configuration_without_deepspeed_and_one_without_its_file(tmp_path):
    (tmp_path / "plain.yaml").write_text("distributed_type: MULTI_GPU\n")
    assert len(launching.options_of_config(tmp_path / "plain.yaml")) == 2
    (tmp_path / "missing.yaml").write_text("deepspeed_config: {deepspeed_config_file: missing.json}\n")
    with pytest.raises(UserError, match=r"deepspeed_config_file of .*missing.yaml is 'missing.json', but there is no"):
        launching.options_of_config(tmp_path / "missing.yaml")
