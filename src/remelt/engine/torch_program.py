"""Kernels as straight lines of calls of torch: what is called, on which registers, written out as a function.

Truths are the numbers 1 and 0 of the kind that was compared, and choices are arithmetic on bits: torch's own truths of
one byte, and its `where`, take four to twenty times as long. The text is TorchScript, which runs without Python's lock:
threads that hand the lock to each other between any two calls take twice as long. It is Python as well, where there is
no TorchScript.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from remelt.core.dtype import DType
from remelt.engine.language import COMPARISONS, Kernel, Number, Operand, Operation
from remelt.tensors import TORCH

KINDS = {"single": torch.float32, "double": torch.float64}
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_PREFIXES = {torch.float32: "t", torch.float64: "d", torch.int32: "c", torch.int64: "e"}
_LOGIC = {
    "logical_and": "torch.mul({0}, {1}, out={out})",
    "logical_or": "torch.maximum({0}, {1}, out={out})",
    "logical_xor": "torch.ne({0}, {1}, out={out})",
    "logical_not": "torch.eq({0}, 0.0, out={out})",
}
_NAME = re.compile(r"\b[a-z]\d+\b")
_HEAD = """\
def run(
    sources: List[Tensor],
    codes: List[Tensor],
    numbers: List[float],
    scalars: List[Tensor],
    registers: List[Tensor],
    bits: List[Tensor],
    outputs: List[Tensor],
    looks: bool,
    size: int,
    block: int,
) -> Tuple[List[float], List[float]]:
"""
_TENSORS_ONLY = ("add", "sub", "mul", "div", "minimum", "maximum", "atan2", *COMPARISONS)
"""Functions that take no plain numbers, or that TorchScript has no fast form of for them."""
PADDING = 64
"""Registers are multiples of this long: torch rounds some operations otherwise in what is left over of a vector."""

Call = Callable[..., tuple[list[float], list[float]]]


@dataclass(frozen=True, slots=True)
class Step:
    """One call: its text, with places for the values that it reads and for the one that it makes.

    A value has three names: ``{0}`` is the register, ``{0.bits}`` its bits as integers, and ``{0.head}`` as many of its
    elements as there are.
    """

    text: str
    inputs: tuple[int, ...]
    output: int | None = None
    is_source: bool = False
    """Whether the value is the source that ``text`` names, which nothing else may be written to."""


@dataclass(frozen=True, slots=True)
class _Name:
    index: int

    def __format__(self, spec: str) -> str:
        return f"r{self.index}"

    @property
    def bits(self) -> str:
        return f"b{self.index}"

    @property
    def head(self) -> str:
        return f"h{self.index}"


class Program:
    """A kernel as a function of some elements of its sources.

    ``call(sources, codes, numbers, scalars, registers, bits, outputs, looks, size, block)`` takes flat tensors of
    ``size`` elements, and their bits as integers; numbers as they are, and those of ``scalars`` as tensors; registers
    of ``block`` elements, which are computed at a time, and their bits; and the tensors that targets and the magnitudes
    of histograms are written to. It gives the sums, block after block, and where it ``looks`` something for each source
    of ``looked`` that is not finite if an element is not.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.steps: list[Step] = []
        self.dtypes: list[torch.dtype] = []
        """The element types of the steps' values."""
        self.values: list[int] = []
        """The value of each operation."""
        self.scalars: dict[str, tuple[int, torch.dtype]] = {}
        """The numbers that are needed as tensors, with their types, by name; those of integers hold the bits."""
        self.looked: list[int] = []
        """The sources that are looked at."""
        self.types: list[torch.dtype] = []
        """The element types of the registers."""
        self._truths: dict[int, int] = {}
        self._lower()
        self.source = self._function(self._lines(self._live()))

    def target_type(self, position: int) -> torch.dtype:
        """The type in which a target is written: as stored, or as computed where what is cut off must be seen."""
        target = self.kernel.targets[position]
        return KINDS[self.kernel.kind] if target.dtype is DType.F8_E4M3 else TORCH[target.dtype]

    def _lower(self) -> None:
        for position, target in enumerate(self.kernel.targets):
            if isinstance(target.value, Number):
                scalar = self._scalar(target.value, KINDS[self.kernel.kind])
                self.steps.append(Step(f"o{position}.copy_({scalar})", ()))
        wanted = self._wanted()
        for place, operation in enumerate(self.kernel.operations):
            self.values.append(self._operation(operation))
            if operation.name == "load" and self._is_looked_at(operation.place):
                text = f"if looks:\n    q{operation.place} += float(torch.sum({{0.head}}))"
                self.steps.append(Step(text, (self.values[-1],)))
                self.looked.append(operation.place)
            for text, operands in wanted.get(place, ()):
                self.steps.append(Step(text, tuple(self._of(operands))))

    def _is_looked_at(self, place: int) -> bool:
        source = self.kernel.sources[place]
        return source.dtype.is_float and not source.held

    def _wanted(self) -> dict[int, list[tuple[str, Sequence[Operand]]]]:
        """What is done with each operation's result once it is known: targets are written, sums added up."""
        wanted: dict[int, list[tuple[str, Sequence[Operand]]]] = {}
        for position, target in enumerate(self.kernel.targets):
            if isinstance(target.value, int):
                wanted.setdefault(target.value, []).append((f"o{position}.copy_({{0.head}})", (target.value,)))
        sums, outputs = 0, len(self.kernel.targets)
        for partial in self.kernel.partials:
            known = wanted.setdefault(partial.value, [])
            if partial.bins:
                known.append((f"torch.abs({{0.head}}, out=o{outputs})", (partial.value,)))
                outputs += 1
                continue
            factors = self._factors(self.kernel.operations[partial.value])
            if factors is None:
                known.append((f"p{sums} = float(torch.sum({{0.head}}))", (partial.value,)))
            else:
                known.append((f"p{sums} = float(torch.dot({{0.head}}, {{1.head}}))", factors))
            sums += 1
        return wanted

    def _factors(self, product: Operation) -> Sequence[int] | None:
        """Two converted float32 whose product a sum adds up: float64 holds it exactly, so it need not be made apart."""
        found = [
            operand
            for operand in product.operands
            if isinstance(operand, int)
            and (made := self.kernel.operations[operand]).name == "convert"
            and isinstance(made.operands[0], int)
            and self.kernel.operations[made.operands[0]].kind == "single"
        ]
        return found if product.name == "mul" and product.kind == "double" and len(found) == 2 else None

    def _scalar(self, number: Number, dtype: torch.dtype) -> str:
        """The name of a number as a tensor without dimensions, or of its bits."""
        name = f"{_PREFIXES[dtype]}{number.index}"
        self.scalars[name] = (number.index, dtype)
        return name

    def _new(self, text: str, inputs: Sequence[int], dtype: torch.dtype, *, is_source: bool = False) -> int:
        value = len(self.dtypes)
        self.dtypes.append(dtype)
        self.steps.append(Step(text, tuple(inputs), value, is_source))
        return value

    def _operation(self, operation: Operation) -> int:
        """The value of an operation."""
        kind, operands = KINDS[operation.kind], operation.operands
        if operation.name == "load":
            return self._load(operation, kind)
        if operation.name == "select":
            return self._select(operands, kind)
        if operation.name in _LOGIC:
            return self._new(_LOGIC[operation.name], self._of(operands), kind)
        if operation.name == "convert":
            (value,) = self._of(operands)
            return value if self.dtypes[value] is kind else self._new("{out}.copy_({0})", (value,), kind)
        if operation.name == "round":
            assert operation.dtype is not None
            rounded = self._new("{out}.copy_({0})", self._of(operands), TORCH[operation.dtype])
            return self._new("{out}.copy_({0})", (rounded,), kind)
        if operation.name == "fma":
            second, factor, first = operands
            operands = (first, second, factor)
        tensors_only = operation.name in _TENSORS_ONLY or isinstance(operands[0], Number)
        texts: list[str] = []
        inputs: list[int] = []
        for index, operand in enumerate(operands):
            if isinstance(operand, int):
                texts.append(f"{{{len(inputs)}}}")
                inputs.append(self.values[operand])
            else:
                as_tensor = tensors_only or (operation.name == "lerp" and index == 1)
                texts.append(self._scalar(operand, kind) if as_tensor else f"n{operand.index}")
        if operation.name == "fma":
            return self._new(f"torch.add({texts[0]}, {texts[1]}, alpha={texts[2]}, out={{out}})", inputs, kind)
        return self._new(f"torch.{operation.name}({', '.join(texts)}, out={{out}})", inputs, kind)

    def _load(self, operation: Operation, kind: torch.dtype) -> int:
        assert operation.dtype is not None
        source = f"s{operation.place}"
        if TORCH[operation.dtype] is kind:
            return self._new(source, (), kind, is_source=True)
        return self._new(f"{{out.head}}.copy_({source})", (), kind)

    def _of(self, operands: Sequence[Operand]) -> list[int]:
        return [self.values[operand] for operand in operands if isinstance(operand, int)]

    def _select(self, operands: Sequence[Operand], kind: torch.dtype) -> int:
        """One of two by a truth, bit by bit: ``second + (first - second) * truth`` with bits taken for integers."""
        truth, first, second = operands
        assert isinstance(truth, int)
        condition = self.values[truth]
        if condition not in self._truths:
            self._truths[condition] = self._new("{out}.copy_({0})", (condition,), BITS[kind])
        chosen = self._truths[condition]
        if isinstance(first, int) and self._is_zero(second):
            return self._new("torch.mul({0.bits}, {1}, out={out.bits})", (self.values[first], chosen), kind)
        if isinstance(second, int) and self._is_zero(first):
            text = "torch.addcmul({0.bits}, {0.bits}, {1}, value=-1, out={out.bits})"
            return self._new(text, (self.values[second], chosen), kind)
        inputs = self._of((first, second))
        texts = [self._scalar(one, BITS[kind]) if isinstance(one, Number) else "" for one in (first, second)]
        names = [text or f"{{{place}.bits}}" for text, place in zip(texts, (0, len(inputs) - 1), strict=True)]
        if not inputs:
            scaled = self._new(f"torch.mul({{0}}, {names[0]} - {names[1]}, out={{out}})", (chosen,), BITS[kind])
            return self._new(f"torch.add({{0}}, {names[1]}, out={{out.bits}})", (scaled,), kind)
        between = self._new(f"torch.sub({names[0]}, {names[1]}, out={{out}})", inputs, BITS[kind])
        if isinstance(second, int):
            text = "torch.addcmul({0.bits}, {1}, {2}, out={out.bits})"
            return self._new(text, (self.values[second], between, chosen), kind)
        scaled = self._new("torch.mul({0}, {1}, out={out})", (between, chosen), BITS[kind])
        return self._new(f"torch.add({{0}}, {names[1]}, out={{out.bits}})", (scaled,), kind)

    def _is_zero(self, operand: Operand) -> bool:
        """Whether an operand is the number 0 for every task, whose bits are all 0."""
        scalar = self.kernel.scalars[operand.index] if isinstance(operand, Number) else None
        return (
            scalar is not None
            and scalar.name == "constant"
            and scalar.constant == 0.0
            and math.copysign(1.0, scalar.constant) > 0.0
        )

    def _live(self) -> list[Step]:
        """The steps that something needs."""
        needed: set[int] = set()
        kept = []
        for step in reversed(self.steps):
            if step.output is None or step.output in needed:
                needed.update(step.inputs)
                kept.append(step)
        return kept[::-1]

    def _lines(self, steps: Sequence[Step]) -> list[str]:
        """The calls: a register for each value, and what no later step needs is used again."""
        last = {value: place for place, step in enumerate(steps) for value in step.inputs}
        free: dict[torch.dtype, list[int]] = {}
        placed: dict[int, _Name] = {}
        sources: set[int] = set()
        lines = []
        for place, step in enumerate(steps):
            names = [placed[value] for value in step.inputs]
            for value in dict.fromkeys(step.inputs):
                if last[value] == place and value not in sources:
                    free.setdefault(self.dtypes[value], []).append(placed[value].index)
            if step.output is None:
                lines += step.text.format(*names).splitlines()
                continue
            dtype = self.dtypes[step.output]
            reused = [] if step.is_source else free.get(dtype, [])
            index = reused.pop() if reused else len(self.types)
            if index == len(self.types):
                self.types.append(dtype)
            out = placed[step.output] = _Name(index)
            if step.is_source:
                sources.add(step.output)
                lines += _source_itself(step.text, out)
            else:
                lines.append(step.text.format(*names, out=out))
        return lines

    def _function(self, lines: Sequence[str]) -> str:
        """The function's text."""
        kernel = self.kernel
        used = set(_NAME.findall("\n".join(lines)))
        outputs = len(kernel.targets) + sum(bool(one.bins) for one in kernel.partials)
        sums = sum(not one.bins for one in kernel.partials)
        before = [
            *(f"n{i} = numbers[{i}]" for i in range(len(kernel.scalars)) if f"n{i}" in used),
            *(f"{name} = scalars[{place}]" for place, name in enumerate(self.scalars)),
            *(f"q{place} = 0.0" for place in self.looked),
            "sums: List[float] = []",
        ]
        inside = [
            "end = min(begin + block, size)",
            "count = end - begin",
            f"padded = (count + {PADDING - 1}) // {PADDING} * {PADDING}",
            *(f"s{i} = sources[{i}][begin:end]" for i in range(len(kernel.sources)) if f"s{i}" in used),
            *(f"o{i} = outputs[{i}][begin:end]" for i in range(outputs)),
        ]
        for place in range(len(self.types)):
            inside.append(f"r{place} = registers[{place}][:padded]")
            if f"h{place}" in used:
                inside.append(f"h{place} = registers[{place}][:count]")
            if f"b{place}" in used:
                inside.append(f"b{place} = bits[{place}][:padded]")
        inside += [*lines, *(f"sums.append(p{i})" for i in range(sums))]
        looked = [f"looked.append(q{place})" for place in self.looked]
        after = ["looked: List[float] = []", *looked, "return sums, looked"]
        body = [*before, "for begin in range(0, size, block):", *(f"    {line}" for line in inside), *after]
        return _HEAD + "".join(f"    {line}\n" for line in body)


def _source_itself(source: str, out: _Name) -> list[str]:
    """A source as a register, where it is as long as one."""
    return [
        f"if {source}.numel() == {out}.numel():",
        f"    {out}, {out.bits}, {out.head} = {source}, codes[{source[1:]}][begin:end], {source}",
        "else:",
        f"    {out.head}.copy_({source})",
    ]


def scripted(source: str) -> Call:
    """The function that a text says, by TorchScript; `RuntimeError` or `AttributeError` where torch has none."""
    found: Call = torch.jit.CompilationUnit(source).run
    return found


def interpreted(source: str) -> Call:
    """The function that a text says, by Python."""
    names: dict[str, Any] = {"torch": torch, "Tensor": torch.Tensor, "List": list, "Tuple": tuple}
    exec(compile(source, "<kernel>", "exec"), names)
    found: Call = names["run"]
    return found
