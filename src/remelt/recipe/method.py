"""What a merge method declares: its signature in spaces, how it may be cut, what it reduces, what it skips.

A method is a pure function on tensors. The declaration is all that the planner and the engine know of it.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, ParamSpec, TypeVar, get_origin, overload

from remelt.core.place import Place
from remelt.core.random import Random
from remelt.errors import RecipeError
from remelt.recipe.declaration import ELEMENTS as ELEMENTS
from remelt.recipe.declaration import AnyTensor, Cut, Declaration
from remelt.recipe.declaration import Bindings as Bindings
from remelt.recipe.declaration import Group as Group
from remelt.recipe.declaration import Mass as Mass
from remelt.recipe.declaration import Reduction as Reduction
from remelt.recipe.declaration import Shortcut as Shortcut
from remelt.recipe.node import Call, Node, Operand, Value, as_node, literal, model


@dataclass(frozen=True)
class Role:
    """What an argument or a result is: its kind, for annotations."""

    kind: str


TENSOR_KINDS = {"same": None, "weight": 1.0, "delta": 0.0, "mask": None, "any": None}
"""Kinds that are tensors, with the affine mass that each demands."""

Same = Annotated[AnyTensor, Role("same")]
"""A tensor in the space that all other ``Same`` arguments have: all weights, or all deltas."""
Weight = Annotated[AnyTensor, Role("weight")]
"""A tensor of a model's weights."""
Delta = Annotated[AnyTensor, Role("delta")]
"""A difference of weights."""
AnySpace = Annotated[AnyTensor, Role("any")]
"""A tensor of any space; the method's ``mass`` rule tells what comes of it."""
Mask = Annotated[Any, Role("mask")]
"""A number, one number per block, or a tensor of numbers: `float` or tensor in the function."""
Number = Annotated[float, Role("number")]
"""A number, or one number per block: always a `float` in the function."""
Numbers = Annotated[Any, Role("numbers")]
"""A number for each of the models that follow one another, or one for all: in the function always one for each."""
Integer = Annotated[int, Role("integer")]
"""A whole number."""
Flag = Annotated[bool, Role("flag")]
"""True or false."""
Text = Annotated[str, Role("text")]
"""A text."""
Sums = Annotated[Mapping[str, Any], Role("sums")]
"""The results of the method's reductions by name, or the numbers that they come to; given by the engine."""
Prepared = Annotated[Mapping[str, Any], Role("prepared")]
"""What the method's ``prepares`` made of the whole operands, by name; given by the engine."""
Tensors = Annotated[Mapping[str, AnyTensor], Role("same")]
"""For methods of cut ``model``: the tensors of one argument by key."""


@dataclass(frozen=True)
class MethodParameter:
    """One argument of a method: its name, its kind, its default, and whether it takes any number of operands."""

    name: str
    kind: str
    default: object = inspect.Parameter.empty
    variadic: bool = False
    keyword_only: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether the function gets a tensor there (a mask may also be a number)."""
        return self.kind in TENSOR_KINDS

    @property
    def is_numeric(self) -> bool:
        """Whether block weights may stand there."""
        return self.kind in ("number", "numbers", "mask")

    @property
    def required(self) -> bool:
        """Whether a call must give it."""
        return self.default is inspect.Parameter.empty and not self.variadic

    def __str__(self) -> str:
        shown = f"*{self.name}" if self.variadic else self.name
        return shown if self.default is inspect.Parameter.empty else f"{shown}={self.default!r}"


P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Method(Generic[P, R]):
    """A merge method: called with recipe nodes it makes a `Call`; `on` runs it on tensors.

    >>> import remelt.methods.linear as linear
    >>> linear.weighted_sum("a", "b", alpha=0.3)
    <call weighted_sum(2 arguments, alpha)>
    """

    name: str
    function: Callable[P, R]
    parameters: tuple[MethodParameter, ...]
    returns: str
    declaration: Declaration
    given: frozenset[str] = field(default=frozenset())
    """The keyword arguments that the engine gives: ``sums``, ``random``, ``key``, ``place``."""

    def __call__(self, *args: Operand, **kwargs: Any) -> Call:
        from remelt.recipe.signature import bind

        call = Call(self.name, tuple(_node(arg) for arg in args), tuple((k, _node(v)) for k, v in kwargs.items()))
        bind(self, call)
        return call

    def on(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the method on whole tensors, reductions first.

        Random methods take ``random=Random(...)``; others need nothing but what their signature names.
        """
        from remelt.recipe.signature import apply_to_tensors

        result: R = apply_to_tensors(self, args, kwargs)
        return result

    @property
    def tensor_parameters(self) -> tuple[MethodParameter, ...]:
        """The arguments that must be tensors, in order."""
        return tuple(parameter for parameter in self.parameters if parameter.is_tensor and parameter.kind != "mask")

    @property
    def variadic(self) -> str:
        """The name of the argument that takes any number of models; empty where there is none."""
        return next((parameter.name for parameter in self.parameters if parameter.variadic), "")

    @property
    def signature(self) -> str:
        """The call as people write it: ``weighted_sum(a, b, *, alpha=0.5)``."""
        shown, keyword_only = [], False
        for parameter in self.parameters:
            if parameter.variadic:
                keyword_only = True
            elif parameter.keyword_only and not keyword_only:
                shown.append("*")
                keyword_only = True
            shown.append(str(parameter))
        return f"{self.name}({', '.join(shown)})"

    @property
    def documentation(self) -> str:
        """The function's docstring, with its indentation removed."""
        return inspect.getdoc(self.function) or ""

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.function.__doc__

    def __reduce__(self) -> str | tuple[Any, ...]:
        module = self.function.__module__
        held = vars(importlib.import_module(module)).items()
        return _held, (module, next((variable for variable, value in held if value is self), self.name))

    def __repr__(self) -> str:
        return f"<merge method {self.signature}>"


def _held(module: str, variable: str) -> object:
    """What a module holds under a name of its own: several methods may be called alike."""
    found = vars(importlib.import_module(module)).get(variable)
    if isinstance(found, Method):
        return found
    hint = "keep a method under a name of its module"
    raise RecipeError(f"module {module} holds no merge method {variable!r}", hint=hint)


def _node(value: Any) -> Node:
    """An argument as a node; text stays a text until the method's signature says whether it is a model's name."""
    if isinstance(value, Mapping):
        return model(value)
    if isinstance(value, (Node, os.PathLike)):
        return as_node(value)
    return Value(literal(value))


@overload
def merge_method(function: Callable[P, R], /) -> Method[P, R]: ...
@overload
def merge_method(
    *, cut: Cut = ..., name: str | None = ..., **declared: Any
) -> Callable[[Callable[P, R]], Method[P, R]]: ...
def merge_method(function: Any = None, /, *, cut: Cut = "tensor", name: str | None = None, **declared: Any) -> Any:
    """Declare a function on tensors as a merge method.

    Its annotations say what each argument is (`Same`, `Weight`, `Delta`, `Mask`, `Number`, `Integer`, `Flag`,
    `Text`), its keywords how it may be cut and what it skips (see `Declaration`). Raises `RecipeError` where the
    declaration contradicts itself.
    """

    def declare(function: Callable[P, R]) -> Method[P, R]:
        return _declare(function, name or function.__name__, Declaration(cut=cut, **declared))

    return declare if function is None else declare(function)


def _declare(function: Callable[P, R], name: str, declaration: Declaration) -> Method[P, R]:
    annotations = inspect.get_annotations(function, eval_str=True)
    parameters, given = [], set()
    for parameter in inspect.signature(function).parameters.values():
        annotation = annotations.get(parameter.name)
        if annotation in (Random, Place) or parameter.name == "key":
            given.add(parameter.name)
            continue
        kind = _kind(annotation, name, parameter.name)
        if kind in ("sums", "prepared"):
            given.add(parameter.name)
            continue
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            raise RecipeError(f"method {name}: a merge method names its arguments, but takes **{parameter.name}")
        variadic = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        keyword_only = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        parameters.append(MethodParameter(parameter.name, kind, parameter.default, variadic, keyword_only))
    returns = _kind(annotations.get("return"), name, "return")
    method = Method(name, function, tuple(parameters), returns, declaration, frozenset(given))
    _validate(method)
    return method


def _kind(annotation: Any, method: str, parameter: str) -> str:
    if get_origin(annotation) is Annotated or hasattr(annotation, "__metadata__"):
        for item in annotation.__metadata__:
            if isinstance(item, Role):
                return item.kind
    raise RecipeError(
        f"method {method}: the annotation of {parameter!r} says no kind",
        hint="use Same, Weight, Delta, Mask, Number, Integer, Flag, Text, Sums, Random, Place of remelt.recipe.method",
    )


def _validate(method: Method[..., Any]) -> None:
    declaration, names = method.declaration, {parameter.name for parameter in method.parameters}
    refuse = f"method {method.name}: "
    if declaration.cut not in ("element", "row", "tensor", "model"):
        raise RecipeError(f"{refuse}cut is element, row, tensor or model, but got {declaration.cut!r}")
    if callable(declaration.workspace) and declaration.cut not in ("row", "tensor"):
        raise RecipeError(f"{refuse}a `workspace` by shape is for cut 'tensor' or 'row'")
    if declaration.batched and declaration.cut != "row":
        raise RecipeError(f"{refuse}batches are of rows, but its cut is {declaration.cut!r}")
    if declaration.finer is not None and declaration.cut != "tensor":
        raise RecipeError(f"{refuse}a finer cut is of a method of cut 'tensor'")
    if declaration.cut == "row" and declaration.shape is not None:
        raise RecipeError(f"{refuse}a method of cut 'row' keeps the shape of its operands")
    if not method.tensor_parameters:
        raise RecipeError(f"{refuse}at least one argument must be a tensor")
    if (declaration.cut == "model") != (declaration.keys is not None):
        raise RecipeError(f"{refuse}cut 'model' and a function `keys` belong together")
    if bool(declaration.reductions) != ("sums" in method.given):
        raise RecipeError(f"{refuse}reductions and an argument `sums: Sums` belong together")
    if bool(declaration.prepares) != ("prepared" in method.given) or (
        declaration.prepares and declaration.cut not in ("row", "tensor")
    ):
        raise RecipeError(
            f"{refuse}`prepares`, an argument `prepared: Prepared` and cut 'tensor' or 'row' belong together"
        )
    if (declaration.conclusion or declaration.reduces) and not declaration.reductions:
        raise RecipeError(f"{refuse}a conclusion needs reductions")
    if declaration.reduces is not None and declaration.conclusion is None:
        raise RecipeError(f"{refuse}where reductions may be left out, a conclusion says what stands for them")
    if declaration.reductions and declaration.cut not in ("element", "row"):
        raise RecipeError(f"{refuse}only a method of cut 'element' or 'row' is streamed after reductions")
    if declaration.cut == "row" and any(one.sampled or one.across for one in declaration.reductions):
        raise RecipeError(f"{refuse}rounds of cut 'row' are of all rows of one tensor: none is sampled or across")
    if "any" in {method.returns, *(parameter.kind for parameter in method.parameters)} and declaration.mass is None:
        raise RecipeError(f"{refuse}arguments of any space need a `mass` rule")
    for shortcut in declaration.shortcuts:
        if not {shortcut.parameter, shortcut.result} <= names:
            raise RecipeError(f"{refuse}the shortcut at {shortcut.parameter}={shortcut.value} names no argument")
        if next(one.kind for one in method.parameters if one.name == shortcut.parameter) == "numbers":
            raise RecipeError(f"{refuse}a shortcut is at one number, but {shortcut.parameter!r} is one for each model")
    if unknown := {*declaration.limits, *declaration.identities} - names:
        raise RecipeError(f"{refuse}limits and identities name no argument: {sorted(unknown)}")
    if declaration.casts is not None and declaration.casts not in names:
        raise RecipeError(f"{refuse}casts names no argument: {declaration.casts!r}")
    for parameter in method.parameters:
        _validate_parameter(method, parameter)


def _validate_parameter(method: Method[..., Any], parameter: MethodParameter) -> None:
    """What the engine gives by keyword must be taken by keyword."""
    refuse = f"method {method.name}: "
    if method.declaration.cut == "model" and (
        parameter.kind == "mask" or parameter.keyword_only == parameter.is_tensor
    ):
        raise RecipeError(
            f"{refuse}with cut 'model', tensors are positional and numbers go by keyword: not so {parameter.name!r}",
            hint="def f(a: Tensors, b: Tensors, *, strength: Number = 0.5)",
        )
    if parameter.kind == "numbers" and not any(one.variadic and one.is_tensor for one in method.parameters):
        raise RecipeError(
            f"{refuse}numbers for each model go with *models, but {parameter.name!r} has none beside it",
            hint=f"{parameter.name}: Number, or def f(*models: Same, {parameter.name}: Numbers = 1.0)",
        )
    seed = "random" in method.given and parameter.name == "seed"
    if seed and (parameter.kind != "integer" or not parameter.keyword_only):
        raise RecipeError(f"{refuse}the seed of random numbers goes by keyword", hint="*, seed: Integer = 0")
