"""Tensors and numbers that only write down what is done with them: how plain torch functions become a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from remelt.engine.language import BY_TORCH, COMPARISONS, LOGIC, Kind, Number, Operand, Scalar
from remelt.engine.writer import Untraceable, Writer
from remelt.methods.selection import UPPER_BINS


class SymbolicNumber:
    """A number that differs from task to task: arithmetic with it is written down, asking for its value is refused."""

    __slots__ = ("number", "writer")

    def __init__(self, writer: Writer, number: Number) -> None:
        self.writer, self.number = writer, number

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return written(func, args, kwargs or {})

    def _with(self, name: str, *others: object) -> SymbolicNumber:
        operands = [number_of(self.writer, other) for other in others]
        return SymbolicNumber(self.writer, self.writer.scalar(Scalar(name, tuple(o.index for o in operands))))

    def __add__(self, other: object) -> Any:
        return NotImplemented if issubclass(type(other), torch.Tensor) else self._with("add", self, other)

    def __radd__(self, other: object) -> Any:
        return self._with("add", other, self)

    def __sub__(self, other: object) -> Any:
        return NotImplemented if issubclass(type(other), torch.Tensor) else self._with("sub", self, other)

    def __rsub__(self, other: object) -> Any:
        return self._with("sub", other, self)

    def __mul__(self, other: object) -> Any:
        return NotImplemented if issubclass(type(other), torch.Tensor) else self._with("mul", self, other)

    def __rmul__(self, other: object) -> Any:
        return self._with("mul", other, self)

    def __truediv__(self, other: object) -> Any:
        return NotImplemented if issubclass(type(other), torch.Tensor) else self._with("div", self, other)

    def __rtruediv__(self, other: object) -> Any:
        return self._with("div", other, self)

    def __neg__(self) -> Any:
        return self._with("neg", self)

    def __abs__(self) -> Any:
        return self._with("abs", self)

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(f"a number's {name}")

    def _refuse(self, *_: object) -> Any:
        raise Untraceable("a number's value")

    __bool__ = __float__ = __int__ = __index__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = None  # type: ignore[assignment]
    __class__ = property(_refuse)


class SymbolicSums(Mapping[str, SymbolicNumber]):
    """The sums of one call's reductions, each known once its pass is done."""

    def __init__(self, writer: Writer, register: int) -> None:
        self.writer, self.register = writer, register

    def __getitem__(self, name: str) -> SymbolicNumber:
        return SymbolicNumber(self.writer, self.writer.scalar(Scalar("sum", sum_of=(self.register, name))))

    def __iter__(self) -> Iterator[str]:
        raise Untraceable("the names of sums")

    def __len__(self) -> int:
        raise Untraceable("the number of sums")


class SymbolicSum:
    """A sum over all elements, or a histogram of them, of which each tile gives a part."""

    def __init__(self, value: int, bins: int = 0, begin: Number | None = None) -> None:
        self.value, self.bins, self.begin = value, bins, begin

    def double(self) -> SymbolicSum:
        """In double precision, as it is."""
        return self


class Symbol(torch.Tensor):
    """A tensor of any length that has no values: every function that takes it is written down, or refused."""

    writer: Writer
    operand: Operand
    kind: Kind
    truth: bool
    _shape: ClassVar[tuple[int]] = (64,)

    @staticmethod
    def of(writer: Writer, operand: Operand, kind: Kind, *, truth: bool = False) -> Symbol:
        """A symbol for an operand."""
        dtype = torch.bool if truth else _TYPES[kind]
        symbol: Symbol = torch.Tensor._make_wrapper_subclass(Symbol, Symbol._shape, dtype=dtype)
        symbol.writer, symbol.operand, symbol.kind, symbol.truth = writer, operand, kind, truth
        return symbol

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return written(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: object, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise Untraceable(str(func))


def number_of(writer: Writer, value: object) -> Number:
    """A number as an operand, known or not."""
    kind = type(value)
    if kind is SymbolicNumber:
        return value.number  # type: ignore[attr-defined,no-any-return]
    if kind in (float, int, bool):
        return writer.constant(value)  # type: ignore[arg-type]
    raise Untraceable(f"{kind.__name__} where a number is due")


def written(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a torch function makes of symbols, written down; in place where its name says so."""
    if func == _TYPE_OF:  # made anew whenever it is asked for
        return torch.bool if args[0].truth else _TYPES[args[0].kind]
    name = getattr(func, "__name__", "")
    plain = name.strip("_")
    in_place = name.endswith("_") and not name.startswith("__")
    if name.startswith("__i") and plain[1:] in _BINARY:
        plain, in_place = plain[1:], True
    if name.startswith("__r") and plain[1:] in _BINARY:
        plain, args = plain[1:], [args[1], args[0], *args[2:]]
    elif plain == "rsub":
        plain, args = "sub", [args[1], args[0], *args[2:]]
    function = _FUNCTIONS.get(plain)
    if function is None:
        raise Untraceable(f"torch's {name}")
    try:
        result = function(*args, **kwargs)
    except TypeError as error:
        raise Untraceable(f"torch's {name} with other arguments: {error}") from None
    if in_place:
        target = args[0]
        if (
            type(target) is not Symbol
            or type(result) is not Symbol
            or (target.kind, target.truth)
            != (
                result.kind,
                result.truth,
            )
        ):
            raise Untraceable(f"torch's {name} in place")
        target.operand = result.operand
        return target
    return result


def _writer_of(*values: Any) -> Writer:
    for value in values:
        if type(value) in (Symbol, SymbolicNumber):
            writer: Writer = value.writer
            return writer
    raise Untraceable("no symbol among the arguments")


def _operands(*values: Any, truths: bool = False) -> tuple[Writer, list[Operand], Kind]:
    """Tensors and numbers as operands of one kind: tensors decide, and double outranks single."""
    writer = _writer_of(*values)
    tensors = [value for value in values if type(value) is Symbol and (truths or not value.truth)]
    if not tensors:
        raise Untraceable("arithmetic of truths or numbers alone")
    kind: Kind = "double" if any(tensor.kind == "double" for tensor in tensors) else "single"
    return writer, [_operand(writer, value, kind) for value in values], kind


def _operand(writer: Writer, value: Any, kind: Kind) -> Operand:
    if type(value) is Symbol:
        if value.truth or value.kind != kind:
            return writer.operation("convert", [value.operand], kind)
        return value.operand
    if type(value) is torch.Tensor and value.dim() == 0 and not value.is_complex():
        return writer.constant(value.item())
    return number_of(writer, value)


def _elementwise(name: str) -> Callable[..., Symbol]:
    def function(*values: Any) -> Symbol:
        writer, operands, kind = _operands(*values)
        if not any(isinstance(operand, int) for operand in operands):
            raise Untraceable("arithmetic of numbers as tensors")
        if name in ("mul", "div") and writer.is_one(operands[1]):
            return Symbol.of(writer, operands[0], kind)
        return Symbol.of(writer, writer.operation(name, operands, kind), kind)

    return function


def _of_one(name: str) -> Callable[..., Symbol]:
    elementwise = _elementwise(name)

    def function(a: Any) -> Symbol:
        return elementwise(a)

    return function


def _of_two(name: str) -> Callable[..., Symbol]:
    elementwise = _elementwise(name)

    def function(a: Any, b: Any) -> Symbol:
        return elementwise(a, b)

    return function


def _comparison(name: str) -> Callable[..., Symbol]:
    def function(a: Any, b: Any) -> Symbol:
        writer, operands, kind = _operands(a, b)
        return Symbol.of(writer, writer.operation(name, operands, kind, truth=True), kind, truth=True)

    return function


def _logic(name: str) -> Callable[..., Symbol]:
    def function(*truths: Any) -> Symbol:
        if not all(type(value) is Symbol and value.truth for value in truths):
            raise Untraceable("logic of numbers")
        kinds = {value.kind for value in truths}
        if len(kinds) > 1:
            raise Untraceable("truths of two kinds")
        writer, kind = truths[0].writer, truths[0].kind
        index = writer.operation(name, [value.operand for value in truths], kind, truth=True)
        return Symbol.of(writer, index, kind, truth=True)

    return function


_add, _subtract, _multiply, _divide = map(_of_two, ("add", "sub", "mul", "div"))
_minimum, _maximum = map(_of_two, ("minimum", "maximum"))


def _add_scaled(a: Any, b: Any, *, alpha: Any = 1) -> Symbol:
    if type(alpha) is int and alpha == 1:
        return _add(a, b)
    writer, (first, second), kind = _operands(a, b)
    factor = number_of(writer, alpha)
    return Symbol.of(writer, writer.operation("fma", [second, factor, first], kind), kind)


def _subtract_scaled(a: Any, b: Any, *, alpha: Any = 1) -> Symbol:
    if type(alpha) is int and alpha == 1:
        return _subtract(a, b)
    return _add_scaled(a, b, alpha=-alpha)


def _clamp(a: Any, min: Any = None, max: Any = None) -> Symbol:
    found: Any = a
    if min is not None:
        found = _maximum(min, found)
    if max is not None:
        found = _minimum(max, found)
    return found  # type: ignore[no-any-return]


def _power(a: Any, exponent: Any) -> Symbol:
    if type(exponent) in (int, float) and exponent == 2:
        return _multiply(a, a)
    return _elementwise("pow")(a, exponent)


def _where(condition: Any, a: Any, b: Any) -> Symbol:
    if type(condition) is not Symbol or not condition.truth:
        raise Untraceable("a choice by something else than a truth")
    writer, operands, kind = _operands(a, b)
    if condition.kind != kind:
        raise Untraceable("a choice between numbers of another kind")
    return Symbol.of(writer, writer.operation("select", [condition.operand, *operands], kind), kind)


def _convert(a: Any, kind: Kind) -> Symbol:
    if type(a) is not Symbol:
        raise Untraceable("a conversion")
    return Symbol.of(a.writer, _operand(a.writer, a, kind), kind)


def _to(a: Any, dtype: Any) -> Symbol:
    if dtype is torch.float64:
        return _convert(a, "double")
    if dtype is torch.float32:
        return _convert(a, "single")
    raise Untraceable(f"a conversion to {dtype}")


def _same(a: Any, *shape: Any) -> Symbol:
    if type(a) is not Symbol or shape not in ((), (-1,)):
        raise Untraceable("another shape")
    return Symbol.of(a.writer, a.operand, a.kind, truth=a.truth)


def _filled(a: Any, value: Any) -> Symbol:
    if type(a) is not Symbol or a.truth:
        raise Untraceable("a tensor like a truth")
    return Symbol.of(a.writer, number_of(a.writer, value), a.kind)


def _sum(a: Any) -> SymbolicSum:
    if type(a) is not Symbol or not (a.truth or a.kind == "double"):
        raise Untraceable("a sum in single precision")
    value = _operand(a.writer, a, "double")
    if not isinstance(value, int):
        raise Untraceable("a sum of a number")
    return SymbolicSum(value)


def _upper_histogram(a: Any) -> SymbolicSum:
    return SymbolicSum(_single(a), UPPER_BINS)


def _window_histogram(a: Any, row: Any, bins: int) -> SymbolicSum:
    return SymbolicSum(_single(a), bins, number_of(a.writer, row))


def _single(a: Any) -> int:
    if type(a) is not Symbol or a.truth:
        raise Untraceable("a histogram of truths")
    value = _operand(a.writer, a, "single")
    if not isinstance(value, int):
        raise Untraceable("a histogram of a number")
    return value


_TYPE_OF = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_TYPES: dict[Kind, torch.dtype] = {"single": torch.float32, "double": torch.float64}
_BINARY = ("add", "sub", "mul", "div", "truediv", "pow", "and", "or", "xor")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add",), _add_scaled),
    **dict.fromkeys(("sub", "subtract"), _subtract_scaled),
    **dict.fromkeys(("mul", "multiply"), _multiply),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _divide),
    **dict.fromkeys(("minimum", "min"), _minimum),
    **dict.fromkeys(("maximum", "max"), _maximum),
    **{name: _of_one(name) for name in ("neg", "abs", "sign")},
    "negative": _of_one("neg"),
    "absolute": _of_one("abs"),
    "lerp": lambda a, b, weight: _elementwise("lerp")(a, b, weight),
    "square": lambda a: _multiply(a, a),
    "pow": _power,
    **{name: _of_one(name) for name in BY_TORCH if name not in ("pow", "atan2")},
    "atan2": _of_two("atan2"),
    **{name: _comparison(name) for name in COMPARISONS},
    "less": _comparison("lt"),
    "greater": _comparison("gt"),
    **{name: _logic(name) for name in LOGIC},
    "and": _logic("logical_and"),
    "bitwise_and": _logic("logical_and"),
    "or": _logic("logical_or"),
    "bitwise_or": _logic("logical_or"),
    "xor": _logic("logical_xor"),
    "invert": _logic("logical_not"),
    "bitwise_not": _logic("logical_not"),
    "where": _where,
    "clamp": _clamp,
    "clip": _clamp,
    "double": lambda a: _convert(a, "double"),
    "float": lambda a: _convert(a, "single"),
    "to": _to,
    **dict.fromkeys(("clone", "contiguous", "detach"), lambda a: _same(a)),
    **dict.fromkeys(("flatten",), lambda a: _same(a)),
    **dict.fromkeys(("reshape", "view"), _same),
    "zeros_like": lambda a: _filled(a, 0.0),
    "ones_like": lambda a: _filled(a, 1.0),
    "full_like": _filled,
    "sum": _sum,
    "upper_histogram": _upper_histogram,
    "window_histogram": _window_histogram,
}
