"""
Our overrides fit the classes they override: same signature, `super()` called, short, and private ones in the seams.

Everything is found by introspection of the classes in `trl_ext.trainers`; there is no list to forget an entry in.
"""

import ast
import dataclasses
import inspect
import textwrap
from functools import cache

import pytest
import transformers
from upstream import record
from upstream.record import path_of

import trl_ext


SEAMS = "trl_ext.trainers.seams."
LONGEST_OVERRIDE = 40

TRAINERS = [cls for cls in record.our_classes() if issubclass(cls, transformers.Trainer)]
CONFIGS = [cls for cls in record.our_classes() if issubclass(cls, transformers.TrainingArguments)]

# Attributes of TRL's that are ours to replace
REPLACED = {
    "reward_funcs": "wrapped, so that a fault names the function and the sample",
    "data_collator": "DPO's, wrapped, so that a batch has the weights of its pairs",
    "beta": "not zero while TRL is asked for a reference that its loss doesn't need; adapted by PPO",
    "eos_token_ids": "PPO's stop_token_id",
    "importance_sampling_level": "TRL's loss runs at level 'token' under GSPO-token",
    "epsilon_low": "infinite where a trust region takes the clip's place",
    "epsilon_high": "infinite where a trust region takes the clip's place",
}


def parametrized(overrides):
    ids = [f"{cls.__name__}.{name}" for cls, name, *_ in overrides]
    return pytest.mark.parametrize("cls, name, function, parent, parents_function", overrides, ids=ids)


def shape(function):
    """Names, kinds and defaults of the parameters; annotations bind nobody."""
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


def passes_everything_through(function):
    """It may take further keywords, with defaults."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    added = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    kinds = [p.kind for p in parameters if p not in added]
    optional = all(p.default is not inspect.Parameter.empty for p in added)
    return optional and kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


@cache
def tree_of(thing):
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


def attributes_of_self(tree):
    """`self.<name>` in a tree: `(all names, names that are assigned)`."""
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]
    return {node.attr for node in nodes}, {node.attr for node in nodes if isinstance(node.ctx, ast.Store)}


@cache
def upstream_names(trainer):
    """What the trainer of TRL's behind one of ours, and its bases, define or assign on `self`."""
    names = set()
    for cls in record.upstream_classes(trainer):
        names |= set(vars(cls))
        if issubclass(cls, transformers.Trainer):
            names |= attributes_of_self(tree_of(cls))[1]
    return names


def own_state(cls):
    """What `__init__` of a class of ours creates, with its parts `_set_up_…`."""
    parts = [value for name, value in vars(cls).items() if name == "__init__" or name.startswith("_set_up_")]
    return {name for part in parts for name in attributes_of_self(tree_of(part))[1]}


def test_every_trainer_of_the_package_is_looked_at():
    exported = {getattr(trl_ext, name) for name in trl_ext.__all__}
    kinds = transformers.Trainer | transformers.TrainingArguments
    exported = {value for value in exported if inspect.isclass(value) and issubclass(value, kinds)}
    assert exported <= set(record.our_classes())
    assert len(TRAINERS) > 4 and len(CONFIGS) >= 4  # the seams too
    assert all(cls.__module__.split(".")[0] == "trl" for cls in {record.upstream_classes(ours)[0] for ours in CONFIGS})


@parametrized(record.overrides(of_upstream=False))
def test_an_override_has_its_parents_signature_or_passes_everything_through(
    cls, name, function, parent, parents_function
):
    if not passes_everything_through(function):
        assert shape(function) == shape(parents_function), f"{cls.__name__}.{name} against {path_of(parent)}"


@parametrized(record.overrides())
def test_an_override_of_upstream_calls_super(cls, name, function, parent, parents_function):
    """A body that doesn't is a copy of TRL's, and drifts from it in silence."""
    calls = {
        node.attr
        for node in ast.walk(tree_of(function))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "super"
    }
    assert name in calls


@parametrized(record.overrides())
def test_an_override_of_upstream_is_short(cls, name, function, parent, parents_function):
    lines = len(inspect.getsource(function).splitlines())
    assert lines < LONGEST_OVERRIDE, f"{cls.__name__}.{name} has {lines} lines: move a part that has a name out of it"


@parametrized(record.overrides())
def test_private_methods_of_upstream_are_overridden_in_the_seams_only(cls, name, function, parent, parents_function):
    private = name.startswith("_") and not name.startswith("__")
    assert not private or cls.__module__.startswith(SEAMS), f"{cls.__module__} overrides {path_of(parent)}.{name}"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_argument_of_trls_config_is_one_of_ours(config):
    ours = {field.name: field for field in dataclasses.fields(config)}
    for field in dataclasses.fields(record.upstream_classes(config)[0]):
        assert field.name in ours, field.name
        assert ours[field.name].init == field.init, field.name


@pytest.mark.parametrize("trainer", TRAINERS)
def test_private_state_of_trls_that_we_touch_is_there(trainer):
    """If TRL renames `_buffered_inputs`, assigning it would go on to work, and mean nothing."""
    classes = [cls for cls in trainer.__mro__ if record.is_ours(cls)]
    ours = set().union(*(own_state(cls) | vars(cls).keys() for cls in classes))
    touched = set().union(*(attributes_of_self(tree_of(cls))[0] for cls in classes))
    assert {name for name in touched if name.startswith("_")} - ours <= upstream_names(trainer)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_our_state_and_our_methods_dont_hide_upstreams(trainer):
    overridden = {name for _, name, *_ in record.overrides()}
    settled = {"config_class", "_tag_names", "_name", "_paper", "__doc__", "__module__", "__annotations__"}
    for cls in trainer.__mro__:
        if record.is_ours(cls):
            names = own_state(cls) | {name for name in vars(cls) if not name.startswith("__")}
            hidden = (names & upstream_names(trainer)) - overridden - settled - REPLACED.keys()
            assert not hidden, f"{cls.__name__} uses names of upstream's for something else: {sorted(hidden)}"
