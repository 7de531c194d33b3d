"""
A whole run of a recipe, with secrets in its environment and in its arguments: none of them is in what it prints, and
in none of the files that it writes, whether checkpoint, configuration, log, card or report.
"""

from pathlib import Path

import pytest
import sort_digits
from processes import run


pytestmark = [pytest.mark.train, pytest.mark.slow]
ROOT = Path(sort_digits.__file__).parents[2]
SECRETS = {
    "HF_TOKEN": "hf_EnVirOnMeNtAbCdEfGhIjKlMnOpQrStUvWx",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
}
HUB_TOKEN = "hf_ArGuMeNtAbCdEfGhIjKlMnOpQrStUvWxYz"


def test_no_secret_is_in_what_a_run_writes_and_prints(tmp_path):
    tokenizer = sort_digits.build_tokenizer()
    sort_digits.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "init")
    tokenizer.save_pretrained(tmp_path / "init")
    sort_digits.build_data("N", tokenizer, 0, 8, 64, 16).save_to_disk(tmp_path / "data")
    config = tmp_path / "with_secrets.yaml"
    text = (ROOT / "recipes/configs/quickstart_dapo.yaml").read_text()
    config.write_text(f"{text}\nhub_token: {HUB_TOKEN}\n")
    printed = run(
        [
            *(ROOT / "recipes/dapo.py", "--config", config),
            *("--model_name_or_path", tmp_path / "init", "--dataset_name", tmp_path / "data"),
            *("--reward_funcs", "tests/tiny.py:first_token_even", "--held_out_prompts", "4"),
            *("--output_dir", tmp_path / "out", "--max_steps", "2", "--per_device_train_batch_size", "16"),
            *("--save_strategy", "steps", "--save_steps", "1", "--log_completions", "true"),
        ],
        env=SECRETS,
        cwd=ROOT,
    )
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"README.md", "summary.json", "training_args.bin", "trainer_state.json", "trl_ext_state.pt"} <= names
    for name, secret in {**SECRETS, "hub_token": HUB_TOKEN}.items():
        assert secret not in printed, name
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == [], name
