"""Merge methods that were written for sd-mecha: its annotations, and its way to look at several keys."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

from torch import Tensor

from remelt.core.nearest import nearest_hint
from remelt.core.tensor_info import TensorInfo
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.recipe import method as today
from remelt.recipe.method import Bindings, Group, Mass, Method
from remelt.recipe.node import Node

T = TypeVar("T")
_MASSES: dict[str, float | None] = {"weight": 1.0, "delta": 0.0, "param": None}
_SETTLED = ("is_conversion", "is_interface", "implements", "reuse_outputs", "cache_factory")
"""Arguments of ``merge_method`` that say how sd-mecha works."""
_KINDS = {float: today.Number, int: today.Integer, bool: today.Flag, str: today.Text}


class StateDict(Mapping[str, T], Generic[T]):
    """An argument's tensors by key, for a method that looks at several."""

    def __init__(self, tensors: Mapping[str, T]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: str) -> T:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Annotation:
    """What an argument or a result is: its type, and the spaces that it may be in; none where they follow others."""

    interface: Any
    spaces: tuple[str, ...] = ()

    @property
    def is_state_dict(self) -> bool:
        """Whether it is all tensors by key."""
        return (typing.get_origin(self.interface) or self.interface) is StateDict


def Parameter(interface: Any, merge_space: object = None, model_config: object = None) -> Any:
    """What an argument is: a type, the spaces that it may be in, and a model config, which is not looked at."""
    return Annotation(interface, _spaces(merge_space))


def Return(interface: Any, merge_space: object = None, model_config: object = None) -> Any:
    """What a method returns."""
    return Annotation(interface, _spaces(merge_space))


def _spaces(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    names = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    found = tuple(str(getattr(name, "identifier", name)) for name in names)
    for name in found:
        if name not in _MASSES:
            raise RecipeError(f"a merge space is one of {', '.join(_MASSES)}, but got {name!r}")
    return found


class Declared:
    """A merge method that takes its arguments as the function does, numbers after models by position, too."""

    def __init__(self, method: Method[..., Any], function: Callable[..., Any]) -> None:
        self.method = method
        self.__wrapped__ = function
        self.__doc__ = function.__doc__
        self._operands = {one.name for one in method.tensor_parameters}
        kept = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
        self._signature = inspect.Signature(kept)

    def __call__(self, *args: Any, **named: Any) -> Node:
        """The call as a recipe; `RecipeError` for arguments that do not fit."""
        try:
            bound = self._signature.bind(*args, **named)
        except TypeError:
            return self.method(*args, **named)  # says what is wrong
        operands: list[Any] = []
        values: dict[str, Any] = {}
        for name, given in bound.arguments.items():
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
                operands += given
            elif name in self._operands:
                operands.append(given)
            else:
                values[name] = given
        return self.method(*operands, **values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def __repr__(self) -> str:
        return repr(self.method)


def merge_method(
    function: Callable[..., Any] | None = None,
    *,
    identifier: str | None = None,
    register: bool = True,
    **settled: Any,
) -> Any:
    """Make a merge method of a function that is annotated with `Parameter` and `Return`.

    Raises `RecipeError` for what has no counterpart: classes with key maps, arguments without annotations.
    """
    for name, value in settled.items():
        if name not in _SETTLED:
            raise RecipeError(f"merge_method has no argument {name!r}", hint=nearest_hint(name, _SETTLED))
        if value and name in ("is_conversion", "is_interface", "implements"):
            raise RecipeError(f"merge_method with {name} is not read: neither conversions nor interfaces are")
    if function is None:
        return lambda given: merge_method(given, identifier=identifier, register=register)
    if inspect.isclass(function):
        raise RecipeError(
            f"{function.__name__} is a class with a map of keys, which is not read",
            hint="write a function with StateDict arguments, or a method of cut 'model' of remelt.recipe.method",
        )
    method = _translated(function, identifier or function.__name__)
    if register:
        holder = ModuleType(f"sd_mecha_method_{method.name}")
        method.function.__module__ = holder.__name__
        setattr(holder, method.name, method)
        sys.modules[holder.__name__] = holder
        METHODS.add_module(holder)
    return Declared(method, function)


def _translated(function: Callable[..., Any], name: str) -> Method[..., Any]:
    signature = inspect.signature(function)
    hints = inspect.get_annotations(function, eval_str=True)
    given = {one.name: _annotation(one, hints.get(one.name), name) for one in _named(signature)}
    returned = hints.get("return", Annotation(Tensor))
    result = returned if isinstance(returned, Annotation) else Annotation(returned)
    takes_all = any(one.is_state_dict for one in given.values())
    wanted = {one.name for one in signature.parameters.values() if one.kind is inspect.Parameter.VAR_KEYWORD}
    operands = [one.name for one in _named(signature) if _is_operand(given[one.name], one.default)]
    roles = _roles(given, result, operands)
    caller = _by_key(function, operands, wanted) if takes_all else _by_tensor(function, wanted)
    parameters = []
    for one in _named(signature):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if one.name in operands else inspect.Parameter.KEYWORD_ONLY
        kind = one.kind if one.kind is inspect.Parameter.VAR_POSITIONAL else kind  # type: ignore[assignment]
        parameters.append(one.replace(kind=kind, annotation=inspect.Parameter.empty))
    if not takes_all:
        parameters.append(inspect.Parameter("key", inspect.Parameter.KEYWORD_ONLY))
    order = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)
    caller.__signature__ = inspect.Signature(sorted(parameters, key=lambda one: order.index(one.kind)))
    caller.__annotations__ = {**roles, "return": roles["return"]}
    caller.__name__, caller.__doc__ = name, function.__doc__
    declared: dict[str, Any] = {"cut": "model", "keys": _all_keys} if takes_all else {"cut": "tensor"}
    if any(role is today.AnySpace for role in roles.values()):
        declared["mass"] = _mass_rule(result)
    return today.merge_method(name=name, **declared)(caller)


def _named(signature: inspect.Signature) -> list[inspect.Parameter]:
    return [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]


def _annotation(parameter: inspect.Parameter, hint: object, method: str) -> Annotation:
    if isinstance(hint, Annotation):
        return hint
    if hint is None:
        raise RecipeError(f"method {method}: the argument {parameter.name!r} has no annotation")
    return Annotation(hint)


def _is_operand(annotation: Annotation, default: object) -> bool:
    """Whether an argument is a model: tensors, unless they are numbers that go with one."""
    is_number = annotation.spaces == ("param",) or default is not inspect.Parameter.empty
    return annotation.is_state_dict or (annotation.interface is Tensor and not is_number)


def _roles(given: Mapping[str, Annotation], result: Annotation, operands: Sequence[str]) -> dict[str, Any]:
    """Today's annotations; models whose spaces are left open are in one space with the others."""
    roles: dict[str, Any] = {}
    tensors = {"weight": today.Weight, "delta": today.Delta}
    mixed = any(len(given[name].spaces) > 1 for name in operands)
    for name, annotation in given.items():
        if name in operands:
            space = annotation.spaces[0] if len(annotation.spaces) == 1 else ""
            roles[name] = today.Tensors if annotation.is_state_dict else tensors.get(space, today.Same)
        elif annotation.interface is Tensor:
            roles[name] = today.Mask
        elif annotation.interface in _KINDS:
            roles[name] = _KINDS[annotation.interface]
        else:
            raise RecipeError(f"the argument {name!r} is of type {annotation.interface!r}, which no recipe holds")
    space = result.spaces[0] if len(result.spaces) == 1 else ""
    same = any(role is today.Same for role in roles.values()) or mixed
    if any(annotation.is_state_dict for annotation in given.values()):
        roles["return"] = today.Tensors
    elif space in tensors:
        roles["return"] = tensors[space]
    elif space == "param":
        roles["return"] = today.Mask
    else:
        kinds = {id(roles[name]): roles[name] for name in operands}
        roles["return"] = today.Same if same or len(kinds) != 1 else next(iter(kinds.values()))
    return roles


def _mass_rule(result: Annotation) -> Callable[[Sequence[Mass], Bindings], Mass]:
    def rule(masses: Sequence[Mass], values: Bindings) -> Mass:
        return masses[0] if not result.spaces else _MASSES[result.spaces[0]]

    return rule


def _by_tensor(function: Callable[..., Any], wanted: set[str]) -> Any:
    """The function on the tensors of one key."""

    def call(*args: Any, key: str = "", **values: Any) -> Any:
        return function(*args, **values, **({"key": key} if wanted else {}))

    return call


def _by_key(function: Callable[..., Any], operands: Sequence[str], wanted: set[str]) -> Any:
    """The function on all tensors, once for each key of the first argument."""

    def call(*args: Mapping[str, Any], **values: Any) -> dict[str, Any]:
        dicts = [StateDict(one) for one in args]
        return {key: function(*dicts, **values, **({"key": key} if wanted else {})) for key in args[0]}

    return call


def _all_keys(layout: Mapping[str, TensorInfo]) -> list[Group]:
    keys = tuple(layout)
    return [Group(keys, keys)] if keys else []
