"""Recipes that sample and train nothing. Whole runs are in `tests/recipes`."""

from pathlib import Path

import pytest
import tiny
from datasets import DatasetDict

from trl_ext.errors import UserError
from trl_ext.run.sampling import filter_prompts, sample_pairs


@pytest.mark.parametrize("recipe", [sample_pairs, filter_prompts])
def test_a_split_that_is_not_there_is_reported_before_a_model_is_loaded(recipe, tmp_path):
    DatasetDict(train=tiny.prompts(4)).save_to_disk(tmp_path / "prompts")
    argv = [
        *("--model_name_or_path", str(tmp_path / "none"), "--dataset_name", str(tmp_path / "prompts")),
        *("--reward_funcs", f"{Path(tiny.__file__)}:low_ids", "--output_dir", str(tmp_path / "out")),
    ]
    with pytest.raises(UserError, match="--dataset_train_split is 'dev', but the data set has only: train"):
        recipe([*argv, "--dataset_train_split", "dev"])
