"""
The README and the documentation: links lead somewhere, files that are named exist, and examples run as written.
"""

import ast
import builtins
import importlib
import inspect
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import trl_ext
from trl_ext.objectives.advantages import ESTIMATORS


ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *(ROOT / name for name in ("README.zh.md", "AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md")), *DOCS]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
IMPORTS = (ast.Import, ast.ImportFrom)
MODEL, DATA = "Qwen/Qwen2.5-0.5B-Instruct", "trl-lib/DeepMath-103K"
# Other programs that train run up to their last line, which trains: three training runs are enough here
TRAINED = (README, ROOT / "docs" / "methods" / "ppo.md", ROOT / "docs" / "adding_a_method.md")
TRAIN = ".train()"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def code(page: Path, language: str) -> list[str]:
    return [block for found, block in FENCED.findall(page.read_text(encoding="utf-8")) if found == language]


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_complete(block: str) -> bool:
    """Whether a block is a program, not a fragment: it defines or imports all it uses, and nothing is left out."""
    nodes = list(ast.walk(ast.parse(block)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    defined = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defined |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    defined |= {alias.asname or alias.name for node in nodes if isinstance(node, IMPORTS) for alias in node.names}
    left_out = any(isinstance(node, ast.Constant) and node.value is ... for node in nodes)
    return used <= defined | set(dir(builtins)) and not left_out


def programs() -> list[Any]:
    found = [(page, block) for page in PAGES for block in code(page, "python") if is_complete(block)]
    return [pytest.param(page, block, id=name_of(page)) for page, block in found]


# Links and names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_index_lists_every_page_with_a_phrase() -> None:
    index = ROOT / "docs" / "index.md"
    listed = re.findall(r"^- \[[^\]]+\]\(([^)#]+)\): \S.{10,}", prose(index), re.MULTILINE)
    pages = [str(page.relative_to(index.parent)) for page in DOCS if page != index]
    assert sorted(listed) == pages == sorted(pages)


def named_files() -> Iterator[str]:
    """Paths in the README: those of the plan under "Where things are", and those in its text."""
    (plan,) = (block for block in code(README, "") if block.startswith("trl_ext/\n"))
    room = ""
    for line in plan.splitlines():
        path = line.split()[0]
        room = "" if not line.startswith(" ") else room
        yield room + path
        room = room or path
    for quoted in re.findall(r"`([^`\s]+)`", prose(README)):
        if re.fullmatch(r"[\w.]+(/[\w.]+)*(/|\.(py|md|lock|toml))", quoted):
            yield quoted


@pytest.mark.parametrize("path", list(named_files()))
def test_every_file_and_room_that_the_readme_names_exists(path: str) -> None:
    found = ROOT / path
    assert found.is_dir() if path.endswith("/") else found.is_file()


def test_the_readme_names_every_room() -> None:
    rooms = {f"trl_ext/{package.parent.name}/" for package in (ROOT / "trl_ext").glob("*/__init__.py")}
    assert rooms == {path for path in named_files() if re.fullmatch(r"trl_ext/\w+/", path)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_targets_recipes_and_configurations_that_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:^|`|cpu )make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
    for recipe in re.findall(r"trl-ext (?:run|copy) (\w+)|(?<= )recipes/(\w+)\.py", text):
        assert list((ROOT / "recipes").rglob(f"{''.join(recipe)}.py"))
    for config in re.findall(r"--config (\S+\.yaml)", text):
        assert (ROOT / "recipes" / "configs" / Path(config).name).is_file()


def test_the_readme_fits_on_two_screens() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900


# Code


def callable_named(name: str) -> Any:
    return getattr(trl_ext, name, None) or getattr(trl, name, None)


@pytest.mark.parametrize("page", [page for page in PAGES if code(page, "python")], ids=name_of)
def test_names_and_arguments_in_code_exist(page: Path) -> None:
    checked = 0
    for block in code(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("trl_ext"):
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []
                checked += 1
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).removeprefix("trl_ext.")
                called = callable_named(name)
                if called is None:
                    continue
                inspect.signature(called).bind_partial(
                    *node.args, **{keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
                )
                checked += 1
    assert checked


@pytest.fixture
def hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """
    A working directory in which the names that examples load from the Hub are folders, so that the examples find tiny
    ones there. The model writes boxed answers now and then, and ends most completions early.
    """
    words = [*(rf"\boxed{{{answer}}}" for answer in range(5)), *tiny.WORDS[5:]]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=tiny.tokenizer().chat_template, padding_side="left", **special
    ).save_pretrained(tmp_path / MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / MODEL)

    rows = [
        {"prompt": [{"role": "user", "content": f"w{5 + i % 15} w{5 + 7 * i % 15}"}], "solution": str(i % 5)}
        for i in range(16)
    ]
    (tmp_path / DATA).mkdir(parents=True)
    (tmp_path / DATA / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(ESTIMATORS, "median", ESTIMATORS["leave_one_out"])  # so that it is taken out again
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(source: str, name: str) -> dict[str, Any]:
    """Runs a program as a script of its own, in which classes can be pickled, and returns its variables."""
    script = Path(f"{name}.py")
    script.write_text(source, encoding="utf-8")
    return runpy.run_path(str(script), run_name="__main__")


def test_pages_have_the_programs_that_are_trained() -> None:
    training = [page for page, block in (case.values for case in programs()) if block.rstrip().endswith(TRAIN)]
    assert set(TRAINED) < set(training)
    assert len(training) == len(set(training))


@pytest.mark.train
@pytest.mark.parametrize(("page", "written"), programs())
def test_examples_run_as_written(
    page: Path, written: str, hub_names: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *before, last = written.rstrip().splitlines()
    if not last.endswith(TRAIN):
        run(written, page.name)
        assert capsys.readouterr().out.strip()
    elif page not in TRAINED:
        variables = run("\n".join(before), page.name)
        assert callable(variables[last.removesuffix(TRAIN)].train)
    else:
        trainer = run(written, page.name)[last.removesuffix(TRAIN)]
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        assert trainer.state.global_step == trainer.state.max_steps > 0
        assert any(0 < reward < 1 for reward in rewards)
        assert (hub_names / "out" / f"checkpoint-{trainer.state.global_step}").is_dir()
