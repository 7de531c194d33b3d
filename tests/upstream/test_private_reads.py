"""
Private names of TRL, transformers, Accelerate, PEFT and torch are read in `trainers/seams/` only, and in the one file
of the roles that switches adapters, and what is read there exists upstream.

`test_signatures` looks at what we override; this file looks at what we read. A private name can disappear from any
release, and a read that goes through `getattr` with a default, or a write, would then succeed and mean nothing.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import transformers
import trl
from upstream import record


# The second is of use below the trainers, where nothing of them can be imported
SEAMS = ("trl_ext/trainers/seams/", "trl_ext/roles/switching.py")
FILES = {file: tree for file, tree in record.trees() if not file.startswith(SEAMS)}
SEAM_FILES = {file: tree for file, tree in record.trees() if file.startswith(SEAMS)}
READERS = ("getattr", "hasattr", "setattr", "delattr")

# Names that only look private, with the reason
NOT_PRIVATE = {
    "_make": "a documented method of named tuples",
    "_replace": "a documented method of named tuples",
    "_asdict": "a documented method of named tuples",
    "_fields": "a documented attribute of named tuples",
    "_exit": "a documented function of os",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NOT_PRIVATE


class PrivateReads(ast.NodeVisitor):
    """
    Collects private names that a module reads or writes on objects, with the class around each read on `self`.

    Attributes:
        on_self (`list[tuple[str, str, int]]`):
            Qualified name of the class, attribute and line.
        on_others (`list[tuple[str, str, int]]`):
            The object as it is written, attribute and line.
        imported (`list[tuple[str, str, int]]`):
            Module, name and line of imports from other packages.
    """

    def __init__(self) -> None:
        self.classes: list[str] = []
        self.on_self: list[tuple[str, str, int]] = []
        self.on_others: list[tuple[str, str, int]] = []
        self.imported: list[tuple[str, str, int]] = []

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes.append(node.name)
        self.generic_visit(node)
        self.classes.pop()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not node.level and (node.module or "").split(".")[0] != "trl_ext":
            for alias in node.names:
                parts = [*(node.module or "").split("."), alias.name]
                if any(map(is_private, parts)):
                    self.imported.append((node.module or "", alias.name, node.lineno))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if any(map(is_private, alias.name.split("."))):
                self.imported.append((alias.name, "", node.lineno))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._add(node.value, node.attr, node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in (*READERS, "getattr_static", "attrgetter"):
            for given in node.args:
                if isinstance(given, ast.Constant) and isinstance(given.value, str):
                    self._add(node.args[0], given.value, node.lineno)
        self.generic_visit(node)

    def _add(self, owner: ast.expr, name: str, line: int) -> None:
        if not is_private(name):
            return
        itself = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
        itself |= isinstance(owner, ast.Call) and ast.unparse(owner.func) == "super"
        if itself and self.classes:
            self.on_self.append((".".join(self.classes), name, line))
        else:
            self.on_others.append((ast.unparse(owner), name, line))


def reads_of(tree: ast.Module) -> PrivateReads:
    reads = PrivateReads()
    reads.visit(tree)
    return reads


@cache
def our_names() -> frozenset[str]:
    """Private names that `trl_ext` itself defines: in modules, in classes, and on `self`."""
    found = set()
    for _, tree in record.trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.For):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            found.add(part.id)
                        elif isinstance(part, ast.Attribute) and ast.unparse(part.value) in ("self", "cls"):
                            found.add(part.attr)
    return frozenset(filter(is_private, found))


@cache
def names_of(cls: type) -> frozenset[str]:
    """Private names that a class of another package defines, or assigns to `self` in its source."""
    names = set(vars(cls))
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # built-in
        tree = ast.parse("")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return frozenset(filter(is_private, names))


@cache
def upstream_names(cls: type) -> frozenset[str]:
    """Private names of what a class inherits from other packages."""
    return frozenset().union(*(names_of(base) for base in record.upstream_classes(cls)))


@cache
def upstream_trainers() -> frozenset[str]:
    """Private names of all trainers and configurations of upstream's that ours derive from."""
    bases = (trl.GRPOTrainer, trl.DPOTrainer, trl.GRPOConfig, trl.DPOConfig, transformers.TrainerCallback)
    return frozenset().union(*(upstream_names(cls) for cls in bases))


def class_of(file: str, qualified: str) -> type | None:
    """The class of a module of ours, or `None` for one inside of a function."""
    found = importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    for part in qualified.split("."):
        found = getattr(found, part, None)
    return found if inspect.isclass(found) else None


def foreign(file: str, reads: PrivateReads) -> Iterator[str]:
    """What a module reads of other packages' private names, a line each."""
    for module, name, line in reads.imported:
        yield f"{file}:{line} imports {name or module} from {module}"
    for owner, name, line in reads.on_others:
        # A name of both is taken for upstream's, because the object's class is unknown here
        if name not in our_names() or name in upstream_trainers():
            yield f"{file}:{line} reads {owner}.{name}"
    for qualified, name, line in reads.on_self:
        cls = class_of(file, qualified)
        if name not in our_names() or (cls is not None and name in upstream_names(cls)):
            yield f"{file}:{line} reads self.{name} in {qualified}"


@pytest.mark.parametrize("file", FILES)
def test_private_names_of_others_are_read_in_the_seams_only(file):
    found = list(foreign(file, reads_of(FILES[file])))
    assert not found, "move these behind a function or a method in trainers/seams/:\n" + "\n".join(found)


@cache
def checked_upstream() -> frozenset[str]:
    """
    Names whose disappearance turns a test red: recorded sources, private attributes of recorded classes, and what
    upstream's trainers define or assign.
    """
    names = set(upstream_trainers())
    for path in record.recorded()["sources"]:
        names.add(path.rpartition(".")[2])
        thing = record.resolve(path)
        if inspect.isclass(thing):
            nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(thing))))
            own = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"]
            names |= {node.attr for node in own if is_private(node.attr)}
    return frozenset(names)


def unchecked(file: str, reads: PrivateReads) -> Iterator[str]:
    """What a seam reads of other packages' private names although nobody checks that it exists, a line each."""
    for module, name, line in reads.imported:
        if f"{module}.{name}" not in record.recorded()["sources"]:
            yield f"{file}:{line} imports {name or module} from {module}"
    for owner, name, line in (*reads.on_others, *reads.on_self):
        if name not in our_names() | checked_upstream():
            yield f"{file}:{line} reads {owner}.{name}"


@pytest.mark.parametrize("file", SEAM_FILES)
def test_what_the_seams_read_is_there_or_recorded(file):
    found = list(unchecked(file, reads_of(SEAM_FILES[file])))
    assert not found, (
        "neither ours, nor on upstream's trainers, nor recorded. If a trainer has lost the name, read what changed. "
        f"If it is of a different class, name it in LEANED_ON of tests/upstream/record.py and run `{record.COMMAND}`"
        ":\n" + "\n".join(found)
    )


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("trainer._buffered_inputs", False),
        ("trainer._buffered_outputs", True),
        ("AcceleratorState._reset_state()", False),
        ("PartialState._forget()", True),
        ("layer._active_adapter", False),
        ("layer._gradient_checkpointing_func", False),
        ("layer._checkpointing_func", True),
        ("from trl.data_utils import _tokenize", False),
        ("from trl.data_utils import _unpair_row", True),
        ("class Seams:\n    def f(self):\n        return self._metrics", False),
        ("class Seams:\n    def f(self):\n        return self._no_such_metrics", True),
    ],
)
def test_the_guard_of_the_seams_sees(code, seen):
    assert bool(list(unchecked("trl_ext/trainers/seams/dpo.py", reads_of(ast.parse(code))))) is seen


EXAMPLES = {
    "from trl.data_utils import _tokenize": "imports _tokenize from trl.data_utils",
    "from peft._private import name": "imports name from peft._private",
    "import transformers._guard": "imports transformers._guard",
    "AcceleratorState._reset_state()": "reads AcceleratorState._reset_state",
    "trainer._step": "reads trainer._step",
    "getattr(trainer, '_buffered_inputs', None)": "reads trainer._buffered_inputs",
    "setattr(model, '_is_quantized', 1)": "reads model._is_quantized",
    "trainer.args._n_gpu": "reads trainer.args._n_gpu",
}


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_guard_sees(code):
    assert any(EXAMPLES[code] in found for found in foreign("trl_ext/errors.py", reads_of(ast.parse(code))))


@pytest.mark.parametrize("code", ["from .grpo import _own", "row._replace(a=1)", "x.__dict__", "trainer.metrics"])
def test_the_guard_lets_pass(code):
    assert not list(foreign("trl_ext/errors.py", reads_of(ast.parse(code))))


def test_the_guard_tells_our_names_on_self_from_upstreams():
    code = "class DPOTrainer:\n    def f(self):\n        return self.{}"
    file = "trl_ext/trainers/dpo.py"
    for name, seen in (
        ("_metrics", True),
        ("_get_train_sampler", True),
        ("_name", True),
        ("_check_curriculum", False),
    ):
        assert bool(list(foreign(file, reads_of(ast.parse(code.format(name)))))) is seen, name


def test_the_guard_reads_every_file():
    assert len(FILES) + len(SEAM_FILES) == sum(1 for _ in Path(trl_ext_root()).rglob("*.py"))
    assert SEAM_FILES


def trl_ext_root() -> str:
    return importlib.import_module("trl_ext").__path__[0]
