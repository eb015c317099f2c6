"""A merge method with arguments to try it on, applied as the engine applies it: one slice, one chunk at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from remelt.archs.facts import KeyFacts, layout
from remelt.check.spaces import SPACE_MASS, name_of
from remelt.core.dtype import DType
from remelt.core.place import Place
from remelt.core.random import Random
from remelt.core.tensor_info import TensorInfo, width_of_rows
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.recipe.method import ELEMENTS, Mass, Method, MethodParameter
from remelt.recipe.signature import (
    Prepared,
    call_by_rows,
    conclude,
    each_of,
    preparations,
    reduce_tile,
    sums_so_far,
)

Shapes = Mapping[str, tuple[int, ...]]

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (5, 8),
    **{
        f"layers.{number}.{layer}": shape
        for number in range(2)
        for layer, shape in {
            "attn.q_proj.weight": (8, 8),
            "attn.k_proj.weight": (4, 8),
            "attn.v_proj.weight": (4, 8),
            "attn.o_proj.weight": (8, 8),
            "mlp.up_proj.weight": (13, 8),
            "mlp.down_proj.weight": (8, 13),
            "norm.weight": (7,),
        }.items()
    },
    "head.weight": (66_001,),
    "head.scale": (),
    "head.empty": (0, 4),
}
"""A small model for the engine: a tensor of more than one chunk and odd length, an empty one, a number."""
VARIADIC = 3
"""How many operands are given where a method takes any number."""
_GUESSES: dict[str, object] = {"number": 0.3, "numbers": 0.3, "mask": 0.3, "integer": 1, "flag": False, "text": "text"}


@dataclass(frozen=True)
class Case:
    """A method, the values of its arguments that are no tensors, and the shapes of a model that it may be tried on.

    ``values`` are those by name that shall not be the defaults, nor guessed where there is no default.
    """

    method: Method[..., Any]
    values: Mapping[str, Any] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=lambda: SHAPES)
    masked: bool = False
    """Whether masks are tensors, not numbers."""

    @classmethod
    def of(cls, method: Method[..., Any] | str, values: Mapping[str, Any] | None = None, **more: Any) -> Case:
        """The case of a method, or of the one registered under a name."""
        return cls(METHODS.find(method) if isinstance(method, str) else method, values or {}, **more)

    @property
    def slots(self) -> list[MethodParameter]:
        """The parameter of each operand, in the order of the function's arguments."""
        return [
            parameter
            for parameter in self.method.parameters
            if parameter.is_tensor and (parameter.kind != "mask" or self.masked)
            for _ in range(VARIADIC if parameter.variadic else 1)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """The value of each argument that is no operand."""
        operands = {parameter.name for parameter in self.slots}
        unknown = set(self.values) - {parameter.name for parameter in self.method.parameters}
        if unknown:
            raise AssertionError(f"`values` names arguments of the method, but got {sorted(unknown)}")
        return {
            parameter.name: each_of(parameter, self.values.get(parameter.name, self._guess(parameter)), VARIADIC)
            for parameter in self.method.parameters
            if parameter.name not in operands and not parameter.variadic
        }

    def _guess(self, parameter: MethodParameter) -> object:
        if not parameter.required:
            return parameter.default
        return "fp16" if parameter.name == self.method.declaration.casts else _GUESSES[parameter.kind]

    def operands(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """Random operands: normal, masks uniform between 0 and 1."""
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
            if parameter.kind == "mask"
            else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for parameter in self.slots
        ]

    def arguments(
        self, tensors: Sequence[Any], settings: Mapping[str, Any] | None = None
    ) -> tuple[list[Any], dict[str, Any]]:
        """Operands and settings as the function takes them."""
        chosen = self.settings if settings is None else settings
        by_name: dict[str, list[Any]] = {}
        for parameter, tensor in zip(self.slots, tensors, strict=True):
            by_name.setdefault(parameter.name, []).append(tensor)
        by_name |= {name: [value] for name, value in chosen.items() if name not in by_name}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in self.method.parameters:
            if parameter.keyword_only:
                kwargs[parameter.name] = by_name[parameter.name][0]
            else:
                args += by_name.get(parameter.name, ())
        return args, kwargs

    def apply(
        self,
        tensors: Sequence[Tensor],
        settings: Mapping[str, Any] | None = None,
        *,
        key: str = "layers.0.weight",
        offset: int = 0,
        sums: Mapping[str, Tensor] | None = None,
        chunk: int = 2**16,
        shape: tuple[int, ...] | None = None,
    ) -> Any:
        """The function's result, with what the engine gives; ``sums`` are computed unless they are given.

        ``offset`` is that of the tensors within others, of which ``shape`` is the shape.
        """
        args, kwargs = self.arguments(tensors, settings)
        if "sums" in self.method.given:
            found = self.sums(tensors, settings, chunk=chunk) if sums is None else sums
            kwargs["sums"] = conclude(self.method, found, kwargs)
        if "prepared" in self.method.given:
            kwargs["prepared"] = Prepared(preparations(self.method, args, kwargs))
        if "key" in self.method.given:
            kwargs["key"] = key
        if "random" in self.method.given:
            size = tensors[0].numel() if isinstance(tensors[0], Tensor) else 0
            kwargs["random"] = Random(int(kwargs.get("seed", 0)), self.method.name, key, offset, size)
        if "place" in self.method.given:
            kwargs["place"] = Place(offset, tuple(tensors[0].shape) if shape is None else shape)
        by_row = self.method.declaration.cut == "row"
        return call_by_rows(self.method, args, kwargs) if by_row else self.method.function(*args, **kwargs)

    def sums(
        self, tensors: Sequence[Tensor], settings: Mapping[str, Any] | None = None, *, chunk: int
    ) -> dict[str, Tensor]:
        """The results of all rounds of reductions, added up over chunks of the flattened operands."""
        found: dict[str, Tensor] = {}
        for number in range(len(self.method.declaration.reductions)):
            found |= self.round(number, tensors, settings, found, chunk)
        return with_elements(found, tensors)

    def round(
        self,
        number: int,
        tensors: Sequence[Tensor],
        settings: Mapping[str, Any] | None,
        earlier: Mapping[str, Tensor],
        chunk: int,
    ) -> dict[str, Tensor]:
        """One round of reductions, added up over chunks, given the sums of the rounds before."""
        flat = [tensor.reshape(-1) for tensor in tensors]
        size = max((tensor.numel() for tensor in flat), default=0)
        width = width_of_rows(tensors[0].shape, self.method.declaration.vectors)
        if self.method.declaration.cut == "row":
            chunk = max(chunk // width, 1) * width
        total: dict[str, Tensor] = {}
        for begin in range(0, max(size, 1), chunk):
            args, kwargs = self.arguments([tensor[begin : begin + chunk] for tensor in flat], settings)
            reduction = self.method.declaration.reductions[number]
            given = sums_so_far(self.method, with_elements(earlier, tensors), kwargs)
            if reduction.unless is not None and reduction.unless(given):
                return {}
            for name, partial in reduce_tile(self.method, reduction, args, kwargs, given, width).items():
                total[name] = partial if name not in total else total[name] + partial
        return total

    def shape_of(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the result that is declared."""
        declared = self.method.declaration.shape
        return shapes[0] if declared is None else tuple(declared(shapes, self.settings))

    def spaces(self) -> list[str] | None:
        """A space for each operand such that the result is a weight or a delta; a mask, where the method returns one.

        None where no spaces do: nothing can then be merged with the method.
        """
        choices = {"any": ("weight", "delta", "param"), "mask": ("param",), "delta": ("delta",)}
        offered = [choices.get(parameter.kind, ("weight",)) for parameter in self.slots]
        for spaces in itertools.product(*offered):
            with contextlib.suppress(RecipeError):
                if self._mass(spaces) in ("weight", "delta"):
                    return list(spaces)
        return None

    def _mass(self, spaces: Sequence[str]) -> str | None:
        rule = self.method.declaration.mass
        return "weight" if rule is None else name_of(rule([SPACE_MASS[space] for space in spaces], self.settings))

    def mass_choices(self) -> Iterator[tuple[list[Mass], Mass]]:
        """Masses of the operands that the method's rule allows, each with the mass of the result."""
        rule = self.method.declaration.mass
        assert rule is not None
        fixed: dict[str, tuple[Mass, ...]] = {"mask": (None,), "delta": (0.0,), "weight": (1.0,), "same": (0.0, 1.0)}
        offered = [fixed.get(parameter.kind, (1.0, 0.0, 0.5, None)) for parameter in self.slots]
        for masses in itertools.product(*offered):
            with contextlib.suppress(RecipeError):
                yield list(masses), rule(list(masses), self.settings)

    def layout(self) -> dict[str, TensorInfo]:
        """The model that the method is tried on, as the declaration's ``keys`` gets it."""
        return {key: TensorInfo(DType.F32, tuple(shape)) for key, shape in self.shapes.items()}

    def facts(self) -> dict[str, KeyFacts]:
        """What is known of each key of that model."""
        known = layout(list(self.shapes), None)
        return {key: known.facts(key) for key in self.shapes}


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have one type, one shape, and the same bits everywhere; any NaN is like any other."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    same = found.contiguous().view(width) == expected.contiguous().view(width)
    return bool((same | (found.isnan() & expected.isnan())).all())


def where_different(found: Tensor, expected: Tensor) -> str:
    """The first place where two tensors of one shape differ, in words."""
    x, y = found.reshape(-1), expected.reshape(-1)
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{list(found.shape)} of {found.dtype} against {list(expected.shape)} of {expected.dtype}"
    unlike = ~((x == y) | (x.isnan() & y.isnan()))
    if not bool(unlike.any()):
        return "a zero of the other sign"
    place = int(unlike.nonzero()[0])
    return f"{int(unlike.sum())} of {x.numel()} elements, the first at {place}: {x[place]:.9g} against {y[place]:.9g}"


def with_elements(sums: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sums, and if there are any, of how many elements."""
    size = max((tensor.numel() for tensor in tensors), default=0)
    return {**sums, ELEMENTS: torch.tensor(float(size))} if sums else {}
