"""Where files are looked for."""

from pathlib import Path

import pytest

from trl_ext.errors import UserError
from trl_ext.run import files


ROOT = Path(__file__).parents[2]


def test_a_checkout_has_its_recipes_beside_the_package(tmp_path, monkeypatch):
    assert files.recipes_folder() == ROOT / "recipes"
    package = tmp_path / "trl_ext"
    (package / "recipes").mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(package / "run" / "files.py"))
    assert files.recipes_folder() == package / "recipes"  # as in a wheel


def test_the_working_directory_first_then_the_yaml_files_then_the_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    installed = ROOT / "recipes/tasks/gsm8k.py"
    name = Path("recipes/tasks/gsm8k.py")
    assert files.find_file(name, "x") == installed
    beside = tmp_path / "beside"
    for folder in (beside, tmp_path):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
        assert files.find_file(name, "x", beside).resolve() == folder / name
    assert files.places(installed) == [installed]  # an absolute path is one place
    assert len(files.places("tasks/gsm8k.py")) == 1  # no recipe's


def test_the_error_lists_every_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        files.find_file("recipes/tasks/none.py", "--prepare_row is 'recipes/tasks/none.py:f'", tmp_path / "beside")
    said = str(error.value)
    assert said.startswith("--prepare_row is 'recipes/tasks/none.py:f', but there is no file 'recipes/tasks/none.py'.")
    for place in (tmp_path, tmp_path / "beside", ROOT):
        assert str(place / "recipes/tasks/none.py") in said
