"""
What a trainer makes of the arguments that it is given: they are bound to the names that TRL gives them, a
configuration of TRL's is converted to the trainer's own class, and what TRL and PEFT write into is copied first.
"""

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar

from transformers import TrainingArguments
from trl.trainer.utils import get_config_model_id

from ..errors import meant
from .argument_checks import check_arguments, check_policy
from .seams.names import method_name


Config = TypeVar("Config", bound=TrainingArguments)


def model_name(model: Any) -> str:
    """
    The last part of a model's Hub id or path, which TRL puts into the names of folders and rewards.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            An id, a path, or a loaded model.
    """
    identifier = model if isinstance(model, str) else get_config_model_id(model.config)
    return identifier.split("/")[-1]


def bound(trl_class: type, trainer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    The arguments of a trainer's constructor by their names, with its configuration under `args`: the one that was
    passed, adopted by the trainer's `config_class`, or a new one. Neither that configuration nor `peft_config` is the
    caller's own object, because TRL and PEFT write into both.

    Args:
        trl_class (`type`):
            The trainer of TRL whose constructor takes them.
        trainer (trainer of `trl_ext`):
            The trainer that is being constructed.
        args (`tuple`):
            Positional arguments, without `self`.
        kwargs (`Mapping[str, Any]`):
            Arguments by name.

    Returns:
        `dict[str, Any]`: what was given, and `args`.

    Raises:
        TypeError: for an argument that TRL's constructor doesn't take, a configuration of a different kind, or an
            argument of a wrong type.
        ValueError: for arguments that contradict each other.
    """
    signature = inspect.signature(trl_class.__init__)  # type: ignore[misc]
    try:
        given = dict(signature.bind(trainer, *args, **kwargs).arguments)
    except TypeError as error:
        near = [meant(name, signature.parameters) for name in kwargs if name not in signature.parameters]
        remedy = "".join(near) or f" Pass some of {', '.join(list(signature.parameters)[1:])}."
        raise TypeError(f"{type(trainer).__name__}: {error}.{remedy}") from None
    given.pop("self")
    if isinstance(given["model"], os.PathLike):
        given["model"] = os.fspath(given["model"])
    check_policy(given["model"])
    config_class = trainer.config_class
    if given.get("args") is None:
        given["args"] = config_class(f"{model_name(given['model'])}-{method_name(trainer)}")
    given["args"] = copy.copy(config_class.adopt(given["args"]))
    check_arguments(given)
    if given.get("peft_config") is not None:
        given["peft_config"] = copy.deepcopy(given["peft_config"])
    return given


def adopted(
    config_class: type[Config],
    args: Any,
    trl_class: type[TrainingArguments],
    taken: Callable[[Any], Mapping[str, Any]] | None = None,
) -> Config:
    """
    A configuration of `config_class` that says what `args` says, which was written for TRL. This is what the
    classmethods `adopt` are made of.

    Args:
        config_class (`type`):
            The class of the result.
        args (`trl_class`):
            A configuration of `config_class` itself is returned as it is. If it is of a user's own subclass, the
            result is of a class that derives from both: fields, properties, methods and attributes that were added
            remain. Where both define the same method, it is the one of `config_class`.
        trl_class (`type`):
            TRL's class, from which `config_class` derives.
        taken (`Callable[[Any], Mapping[str, Any]]`, *optional*):
            From `args` to the arguments of the result. By default every field that both classes have.

    Raises:
        TypeError: if `args` is a configuration of a different kind.
    """
    if isinstance(args, config_class):
        return args
    if not isinstance(args, trl_class):
        expected = f"a {config_class.__name__} or a trl.{trl_class.__name__}"
        written = f"{config_class.__name__}(**args)" if isinstance(args, dict) else "one of these"
        raise TypeError(f"`args` must be {expected}, not {type(args).__name__}. Pass {written}.")
    own = {f.name for f in fields(config_class)}
    if taken is None:
        arguments: Mapping[str, Any] = {
            f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in own
        }
    else:
        arguments = taken(args)
    result = config_class(**arguments)
    if type(args) is not trl_class and not issubclass(config_class, type(args)):  # a user's own class
        bases: Any = config_class, type(args)
        result.__class__ = _joined(*bases)
        for name, value in vars(args).items():
            result.__dict__.setdefault(name, value)
    return result


@cache
def _joined(config_class: Any, users: Any) -> Any:
    """A class that derives from both, so that a configuration keeps what a user's class adds."""

    def reduce(config: Any) -> Any:  # pickle finds no class that is made in a function
        return _new, (config_class, users), config.__dict__

    names = {"__doc__": users.__doc__, "__module__": users.__module__, "__qualname__": users.__qualname__}
    return dataclass(type(users.__name__, (config_class, users), {**names, "__reduce__": reduce}))


def _new(config_class: Any, users: Any) -> Any:
    return object.__new__(_joined(config_class, users))
