"""Binding: which argument of a call is which parameter of its method, and whether it can be one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from remelt.core.nearest import nearest_hint
from remelt.core.place import Place
from remelt.core.tensor_info import batch_of_rows, width_of_rows
from remelt.errors import RecipeError, Span
from remelt.recipe.blocks import BlockWeights, Search
from remelt.recipe.method import ELEMENTS, Method, MethodParameter, Reduction
from remelt.recipe.node import Call, Model, Node, Value
from remelt.recipe.walk import rewrite


@dataclass(frozen=True, slots=True)
class Bound:
    """A call's arguments by parameter: operands are tensors, values are everything else (defaults included).

    ``operands`` holds pairs of parameter and node in the order of the function's arguments; a variadic parameter
    takes several.
    """

    operands: tuple[tuple[MethodParameter, Node], ...]
    values: tuple[tuple[str, Any], ...]


def bind(method: Method[..., Any], call: Call) -> Bound:
    """The call's arguments by parameter, or `RecipeError` with the place, the signature and the nearest name."""
    placed = _place(method, call)
    operands: list[tuple[MethodParameter, Node]] = []
    values: list[tuple[str, Any]] = []
    count = len(placed.get(method.variadic, ()))
    for parameter in method.parameters:
        for node in placed.get(parameter.name, ()):
            if isinstance(node, Value) and not _names_model(parameter, node):
                plain = _plain(method, parameter, node, call)
                require_limits(method, parameter.name, plain, dict(call.spans).get(parameter.name) or node.span)
                values.append((parameter.name, each_of(parameter, plain, count, node.span or call.span)))
            elif parameter.is_tensor:
                operands.append((parameter, _operand(node)))
            else:
                _refuse_tensor(method, parameter, node, call)
        if parameter.name not in placed and not parameter.variadic:
            values.append((parameter.name, each_of(parameter, parameter.default, count)))
    return Bound(tuple(operands), tuple(values))


def each_of(parameter: MethodParameter, value: Any, count: int, span: Span | None = None) -> Any:
    """A value as the function takes it: where numbers are due, one for each of ``count`` models.

    Raises `RecipeError` for a list of another length.
    """
    if parameter.kind != "numbers" or value is None:
        return value
    if not isinstance(value, (tuple, list)):
        return (value,) * count
    if len(value) != count:
        raise RecipeError(
            f"{parameter.name!r} has a number for each model, but got {_count(len(value), 'number')} "
            f"for {_count(count, 'model')}",
            hint="one number alone stands for all of them",
            span=span,
        )
    return tuple(value)


def _place(method: Method[..., Any], call: Call) -> dict[str, tuple[Node, ...]]:
    positional = [parameter for parameter in method.parameters if not parameter.keyword_only]
    placed: dict[str, tuple[Node, ...]] = {}
    for index, parameter in enumerate(positional):
        if parameter.variadic:
            placed[parameter.name] = call.args[index:]
            break
        if index < len(call.args):
            placed[parameter.name] = (call.args[index],)
    else:
        if len(call.args) > len(positional):
            extra = call.args[len(positional)]
            raise RecipeError(
                f"{method.name} takes {_count(len(positional), 'positional argument')}, but got {len(call.args)}",
                hint=f"{method.signature}; the rest goes by name",
                span=extra.span or call.span,
            )
    spans = dict(call.spans)
    known = {parameter.name: parameter for parameter in method.parameters}
    for name, node in call.kwargs:
        span = spans.get(name, node.span or call.span)
        if name not in known or known[name].variadic:
            near = nearest_hint(name, known)
            hint = f"{near} {method.signature}" if near else method.signature
            raise RecipeError(f"{method.name} has no argument {name!r}", hint=hint, span=span)
        if name in placed:
            raise RecipeError(f"{method.name} got {name!r} twice", hint=method.signature, span=span)
        placed[name] = (node,)
    for parameter in method.parameters:
        if parameter.name not in placed and parameter.required:
            raise RecipeError(f"{method.name} needs {parameter.name!r}", hint=method.signature, span=call.span)
        if parameter.variadic and not placed.get(parameter.name) and parameter.is_tensor:
            raise RecipeError(f"{method.name} needs at least one model", hint=method.signature, span=call.span)
    return placed


def name_models(method: Method[..., Any], call: Call) -> Call:
    """The call with every text that stands where a model is due written as the model that it means."""
    texts: set[int] = set()
    placed = _place(method, call)
    for parameter in method.parameters:
        if parameter.is_tensor:
            for node in placed.get(parameter.name, ()):
                if _names_model(parameter, node):
                    texts.add(id(node))
    if not texts:
        return call
    return call.with_children(_operand(child) if id(child) in texts else child for child in call.children)


def name_all_models(recipe: Node, methods: Mapping[str, Method[..., Any]]) -> Node:
    """The recipe with every text that means a model written as that model."""

    def name(node: Node) -> Node:
        if not isinstance(node, Call) or node.method not in methods:
            return node
        has_texts = any(isinstance(child, Value) and isinstance(child.value, str) for child in node.children)
        return name_models(methods[node.method], node) if has_texts else node

    return rewrite(_operand(recipe), name)


def _names_model(parameter: MethodParameter, node: Node) -> bool:
    """Whether a bare text stands for a model: where tensors are due, but no mask, which says its space."""
    return parameter.is_tensor and parameter.kind != "mask" and isinstance(node, Value) and isinstance(node.value, str)


def _operand(node: Node) -> Node:
    if isinstance(node, Value) and isinstance(node.value, str):
        return Model(node.value, span=node.span)
    return node


def _plain(method: Method[..., Any], parameter: MethodParameter, node: Value, call: Call) -> Any:
    """The value as the function takes it, or an error that says what may stand there."""
    value, kind = node.value, parameter.kind
    if kind in ("number", "mask"):
        if _is_number(value):
            return float(value) if isinstance(value, int) else value
    elif kind == "numbers":
        listed = value if isinstance(value, tuple) else (value,)
        if all(_is_number(item) for item in listed):
            numbers = tuple(float(item) if isinstance(item, int) else item for item in listed)
            return numbers if isinstance(value, tuple) else numbers[0]
    elif (
        (kind == "integer" and isinstance(value, int) and not isinstance(value, bool))
        or (kind == "flag" and isinstance(value, bool))
        or (kind == "text" and isinstance(value, str))
    ):
        return value
    if value is None and parameter.default is None:
        return None
    wanted = {
        "number": "a number or block weights",
        "numbers": "a number, block weights, or a list of them,",
        "mask": "a number, block weights or a tensor",
        "integer": "a whole number",
        "flag": "True or False",
        "text": "a text",
    }.get(kind, "a model")
    span = dict(call.spans).get(parameter.name) or node.span or call.span
    hint = method.signature
    if kind == "mask" and isinstance(value, str):
        written = value if value.startswith("model(") else f'model({json.dumps(value)}, space="param")'
        hint = f"{hint}; a mask from a file is {written}{', without quotes around it' if written is value else ''}"
    raise RecipeError(f"{method.name} needs {wanted} for {parameter.name!r}, but got {value!r}", hint=hint, span=span)


def require_limits(method: Method[..., Any], name: str, value: Any, span: Span | None = None) -> None:
    """Refuse a plain value, or one of a list or of block weights, that its declaration does not allow."""
    limits = method.declaration.limits.get(name)
    if limits is None or value is None:
        return
    for one in value if isinstance(value, tuple) else value.numbers() if isinstance(value, BlockWeights) else (value,):
        if isinstance(one, (str, float, int)) and not _is_within(one, limits):
            *others, last = (repr(limit) if isinstance(limit, str) else f"{limit:g}" for limit in limits)
            wanted = f"{', '.join(others)} or {last}" if isinstance(one, str) else f"from {', '.join(others)} to {last}"
            wanted = wanted.replace("from 0 to inf", "0 or more").replace("from 1 to inf", "1 or more")
            raise RecipeError(f"{method.name}: {name} is {wanted}, but got {one!r}", hint=method.signature, span=span)


def _is_within(value: str | float, limits: Sequence[str] | Sequence[float]) -> bool:
    if isinstance(value, str):
        return value in limits
    least, greatest = (float(limit) for limit in limits)
    return least <= value <= greatest


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, BlockWeights, Search)) and not isinstance(value, bool)


def _refuse_tensor(method: Method[..., Any], parameter: MethodParameter, node: Node, call: Call) -> None:
    span: Span | None = dict(call.spans).get(parameter.name) or node.span or call.span
    got = "a model" if isinstance(node, Model) else "a computed tensor"
    wanted = {
        "number": "a number or block weights",
        "numbers": "numbers",
        "integer": "a whole number",
        "flag": "True or False",
    }
    raise RecipeError(
        f"{method.name} needs {wanted.get(parameter.kind, 'a text')} for {parameter.name!r}, but got {got}",
        hint=method.signature,
        span=span,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def apply_to_tensors(method: Method[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a method on whole tensors: the reductions as one tile each, then the function."""
    named = {parameter.name: parameter for parameter in method.parameters}
    count = len(args) - sum(not (one.keyword_only or one.variadic) for one in method.parameters)
    given = {name: each_of(named[name], value, count) if name in named else value for name, value in kwargs.items()}
    for parameter in method.parameters:
        if parameter.kind == "numbers" and not parameter.required:
            given.setdefault(parameter.name, each_of(parameter, parameter.default, count))
    for name, value in given.items():
        require_limits(method, name, value)
    if "sums" in method.given and "sums" not in given:
        sums: dict[str, Any] = {}
        for reduction in method.declaration.rounds({**_defaults(method), **given}):
            earlier = sums_so_far(method, sums, given)
            if reduction.unless is not None and reduction.unless(earlier):
                continue
            sums.update(reduce_tile(method, reduction, args, given, earlier))
            sums[ELEMENTS] = args[0].numel()
        given["sums"] = conclude(method, sums, given)
    if "place" in method.given and "place" not in given:
        given["place"] = Place(0, tuple(args[0].shape))
    if "prepared" in method.given and "prepared" not in given:
        given["prepared"] = Prepared(preparations(method, args, given, given.get("sums", {})))
    return call_by_rows(method, args, given) if method.declaration.cut == "row" else method.function(*args, **given)


Stage = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""What is made of whole operands, given what the stages before it made."""


class Prepared(Mapping[str, Any]):
    """What a method prepares, each stage made when it is first looked for: some numbers need none of it."""

    def __init__(self, stages: Sequence[Stage], lock: AbstractContextManager[Any] | None = None) -> None:
        self._stages = list(stages)
        self._made: dict[str, Any] = {}
        self._first = True
        self._lock = lock or nullcontext()

    def _advance(self) -> None:
        self._made.update(self._stages[0](self._made))
        del self._stages[0]
        self._first = False

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            with self._lock:
                while name not in self._made and self._stages:
                    self._advance()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            if self._first:
                self._advance()
            return iter(tuple(self._made))

    def __len__(self) -> int:
        return len(tuple(iter(self)))


def preparations(
    method: Method[..., Any],
    args: Sequence[Any],
    values: Mapping[str, Any],
    sums: Mapping[str, Any] = MappingProxyType({}),
) -> list[Stage]:
    """What a method makes of its whole operands before its plain arguments count, but for those that it asks for.

    A method of cut ``row`` makes it of its ``sums``.
    """
    operands = () if method.declaration.cut == "row" else args

    def stage(function: Callable[..., Mapping[str, Any]]) -> Stage:
        return lambda made: function(*operands, **_asked(method, function, values, sums, made))

    return [stage(function) for function in method.declaration.prepares]


def call_by_rows(method: Method[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], width: int = 0) -> Any:
    """A method of cut ``row`` on tensors, or on tiles whose rows have that width; the result has their shape."""
    shape = args[0].shape
    width = width or width_of_rows(shape, method.declaration.vectors)
    rows = [_as_rows(value, width) for value in args]
    named = {name: _as_rows(value, width) for name, value in kwargs.items()}
    step = batch_of_rows(width) if method.declaration.batched else 0
    if 0 < step < len(rows[0]):
        result = rows[0].new_empty(rows[0].shape)
        for begin in range(0, len(rows[0]), step):
            batch = slice(begin, begin + step)
            result[batch] = method.function(
                *(_some_rows(value, batch) for value in rows),
                **{name: _some_rows(value, batch) for name, value in named.items()},
            )
    else:
        result = method.function(*rows, **named)
    return result.reshape(shape) if hasattr(result, "reshape") and result.numel() == args[0].numel() else result


def _as_rows(value: Any, width: int) -> Any:
    return value.reshape(-1, width) if hasattr(value, "reshape") else value


def _some_rows(value: Any, rows: slice) -> Any:
    return value[rows] if hasattr(value, "reshape") else value


def reduce_tile(
    method: Method[..., Any],
    reduction: Reduction,
    args: Sequence[Any],
    values: Mapping[str, Any],
    sums: Mapping[str, Any],
    width: int = 0,
) -> Mapping[str, Any]:
    """One tile's partial sums: the reduction gets the operands, and by name those values and sums it asks for.

    Operands are tensors, or tiles whose rows have that ``width``.
    """
    function = reduction.function
    if method.declaration.cut == "row":
        width = width or width_of_rows(args[0].shape, method.declaration.vectors)
        args = [_as_rows(value, width) for value in args]
        values = {name: _as_rows(value, width) for name, value in values.items()}
    result: Mapping[str, Any] = function(*args, **_asked(method, function, values, sums))
    return result


def sums_so_far(method: Method[..., Any], sums: Mapping[str, Any], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reduction is given of those before it: their sums, or what a conclusion makes of them."""
    return conclude(method, sums, values) if sums else sums


def conclude(method: Method[..., Any], sums: Mapping[str, Any], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a method is given as its sums: themselves, or the numbers that it declares they come to."""
    conclusion = method.declaration.conclusion
    if conclusion is None:
        return sums
    numbers = {
        name: value if isinstance(value, int) else float(value) if value.numel() == 1 else value
        for name, value in sums.items()
    }
    return conclusion(numbers, **_asked(method, conclusion, values, numbers))


def names_asked(function: Any) -> tuple[str, ...]:
    """The values and sums that a function of a declaration asks for by keyword."""
    code = function.__code__
    names: tuple[str, ...] = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]
    return names


def _asked(
    method: Method[..., Any],
    function: Any,
    values: Mapping[str, Any],
    sums: Mapping[str, Any],
    prepared: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The values, sums and earlier preparations that a function of a declaration names as keywords."""
    wanted = function.__kwdefaults__ or {}
    defaults = _defaults(method)
    chosen: dict[str, Any] = {}
    for name in names_asked(function):
        if name == "sums":
            chosen[name] = sums
        elif name == "prepared":
            chosen[name] = prepared
        elif name in values or name not in wanted:
            chosen[name] = values.get(name, defaults.get(name))
    return chosen


def _defaults(method: Method[..., Any]) -> dict[str, Any]:
    return {parameter.name: parameter.default for parameter in method.parameters if not parameter.required}
