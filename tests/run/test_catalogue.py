"""Recipes, as they are listed, found and copied."""

import pytest
import yaml

from trl_ext.errors import UserError
from trl_ext.run import catalogue
from trl_ext.run.files import recipes_folder


def test_every_recipe_has_a_phrase():
    found = {recipe.name: recipe for recipe in catalogue.list_recipes()}
    assert set(found) == {path.stem for path in recipes_folder().glob("*.py")} | {
        "kind_sentence",
        "smollm2",
        "sort_digits",
    }
    for recipe in found.values():
        assert 20 < len(recipe.phrase) < 250 and "http" not in recipe.phrase and "\n" not in recipe.phrase
    assert found["reinforce"].phrase == (
        "REINFORCE (Williams, 1992): plain policy gradient, where the baseline is a running mean of the rewards so far"
    )
    assert found["dapo"].configs == (
        "quickstart_dapo.yaml",
        "dapo_qwen2.5_0.5b_gsm8k.yaml",
        "dapo_qwen2.5_7b_gsm8k.yaml",
        "dapo_qwen2.5_32b_gsm8k.yaml",
        "dapo_smollm2_chain_sum.yaml",
        "smoke_dapo.yaml",
    )


def test_a_phrase_is_the_first_sentence_without_links(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""\nTrust (https://x.org/1.2, for LMs https://x.org/3.4): clip 0.2\nonly. More.\n\nrecipes/configs/b.yaml"""'
    )
    recipe = catalogue.Recipe.read(tmp_path / "a.py")
    assert (recipe.name, recipe.phrase, recipe.configs) == ("a", "Trust: clip 0.2 only", ("b.yaml",))


def test_recipes_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert catalogue.find_recipe("ppo").file == recipes_folder() / "ppo.py"
    (tmp_path / "mine.py").write_text('"""Mine."""\n')
    assert str(catalogue.find_recipe("mine.py").file) == "mine.py"
    with pytest.raises(UserError, match=r"there is no recipe 'trpo'\. Choose one of dapo, dpo"):
        catalogue.find_recipe("trpo")


def test_configurations_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    installed = recipes_folder() / "configs" / "quickstart_ppo.yaml"
    assert catalogue.find_config("quickstart_ppo.yaml", "configs", "--config") == installed
    assert catalogue.find_config("quickstart_ppo", "configs", "--config") == installed
    (tmp_path / "quickstart_ppo.yaml").touch()
    assert str(catalogue.find_config("quickstart_ppo.yaml", "configs", "--config")) == "quickstart_ppo.yaml"
    with pytest.raises(UserError, match=r"--config is 'none', which is no file in .* nor one of dapo_qwen"):
        catalogue.find_config("none", "configs", "--config")


def test_a_copy_is_complete_and_names_itself(tmp_path):
    folder = tmp_path / "mine"
    copies = catalogue.copy_recipe(catalogue.find_recipe("dapo"), folder)
    assert {str(path.relative_to(folder)) for path in copies} == {
        *("dapo.py", "quickstart_dapo.yaml", "smoke_dapo.yaml"),
        *("dapo_qwen2.5_0.5b_gsm8k.yaml", "dapo_qwen2.5_7b_gsm8k.yaml", "dapo_qwen2.5_32b_gsm8k.yaml"),
        "dapo_smollm2_chain_sum.yaml",
        *("tasks/sort_digits.py", "tasks/gsm8k.py"),
    }
    assert copies[0] == folder / "dapo.py"
    settings = yaml.safe_load((folder / "dapo_qwen2.5_0.5b_gsm8k.yaml").read_text())
    assert settings["prepare_row"] == "tasks/gsm8k.py:prepare_row"
    assert settings["reward_funcs"] == ["tasks/gsm8k.py:correct_answer"]
    command = f"accelerate launch {folder}/dapo.py --config {folder}/quickstart_dapo.yaml"
    assert command in (folder / "dapo.py").read_text()


def test_a_copy_overwrites_nothing(tmp_path):
    (tmp_path / "quickstart_dapo.yaml").write_text("mine\n")
    with pytest.raises(UserError, match=r"quickstart_dapo\.yaml would be overwritten"):
        catalogue.copy_recipe(catalogue.find_recipe("dapo"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart_dapo.yaml"]
    with pytest.raises(UserError, match=r"is a file\. Name a folder"):
        catalogue.copy_recipe(catalogue.find_recipe("dapo"), tmp_path / "quickstart_dapo.yaml")
