"""Kernels run by torch: straight through their operations, on tiles that stay in a core's cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from remelt.core.dtype import DType
from remelt.engine.language import BY_TORCH, COMPARISONS, LOGIC, Kernel, Number, Operation, last_uses
from remelt.engine.tensors import TORCH

PADDING = 64
"""Registers are multiples of this long: torch rounds some operations otherwise in what is left over of a vector."""
_KEPT_SIZES = 32
_KINDS = {"single": torch.float32, "double": torch.float64}

Registers = list[torch.Tensor]
Step = Callable[[Registers, Sequence[torch.Tensor], Sequence[float]], object]


class TorchExecutor:
    """A kernel as calls of torch, on registers that are used again."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.types: list[torch.dtype] = []
        self.steps: list[Step] = []
        self.placed: dict[int, int] = {}
        self._allocate()
        self._local = threading.local()

    @property
    def scratch(self) -> int:
        """Bytes that all registers take for each element."""
        return sum(dtype.itemsize for dtype in self.types)

    def run(self, sources: Sequence[torch.Tensor], numbers: Sequence[float], size: int) -> list[torch.Tensor]:
        """The kernel's targets for some elements, in the kind that they were computed in.

        ``sources`` are flat tensors of as many elements. The results are valid until the next run in this thread.
        """
        registers = self._registers(size)
        for step in self.steps:
            step(registers, sources, numbers)
        return [
            torch.full((size,), numbers[target.value.index], dtype=_KINDS[self.kernel.kind])
            if isinstance(target.value, Number)
            else registers[self.placed[target.value]][:size]
            for target in self.kernel.targets
        ]

    def _allocate(self) -> None:
        """A register for each operation; what no later operation needs is used again, but for a source itself."""
        last = last_uses(self.kernel)
        free: dict[torch.dtype, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for place, operation in enumerate(self.kernel.operations):
            for old in ends.pop(place, ()):
                free.setdefault(self.types[old], []).append(old)
            dtype = _register_type(operation)
            is_source = operation.dtype is not None and operation.name == "load" and TORCH[operation.dtype] is dtype
            reused = [] if is_source else free.get(dtype, [])
            register = reused.pop() if reused else len(self.types)
            if register == len(self.types):
                self.types.append(dtype)
            self.placed[place] = register
            if not is_source:
                ends.setdefault(max(last[place], place + 1), []).append(register)
            if operation.name == "load":
                self.steps.append(_load(register, operation.place, is_source=is_source))
            else:
                self.steps.append(_step(operation, self.placed, register))

    def _registers(self, size: int) -> Registers:
        """Registers of some elements, of undefined content."""
        padded = -(-size // PADDING) * PADDING
        kept: dict[int, Registers] = self._local.__dict__.setdefault("kept", {})
        found = kept.get(padded)
        if found is None:
            longest: Registers = self._local.__dict__.get("longest", [])
            if not longest or longest[0].numel() < padded:
                longest = self._local.longest = [torch.empty(padded, dtype=dtype) for dtype in self.types]
                kept.clear()
            if len(kept) >= _KEPT_SIZES:
                kept.clear()
            found = kept[padded] = [register[:padded] for register in longest]
        return found.copy()


class DirectExecutor:
    """One operation on halves, which torch computes in float32 inside and rounds once: no conversions are needed."""

    def __init__(self, kernel: Kernel) -> None:
        operation = kernel.operations[-1]
        self.kernel = kernel
        self.dtype = TORCH[kernel.targets[0].dtype]
        self.loads = {place: found.place for place, found in enumerate(kernel.operations[:-1])}
        self.function = _FUNCTIONS[operation.name]
        self.operation = operation
        self._local = threading.local()

    @staticmethod
    def suits(kernel: Kernel) -> bool:
        """Whether a kernel is one operation on sources of one half type, to a result of the same."""
        *loads, last = kernel.operations if kernel.operations else (None,)
        return (
            last is not None
            and last.name in _DIRECT
            and last.kind == "single"
            and len(kernel.targets) == 1
            and not kernel.partials
            and kernel.targets[0].value == len(loads)
            and kernel.targets[0].dtype in (DType.F16, DType.BF16)
            and all(load is not None and load.name == "load" for load in loads)
            and {source.dtype for source in kernel.sources} == {kernel.targets[0].dtype}
            and isinstance(last.operands[0], int)
            and (isinstance(last.operands[1], int) or last.name in ("mul", "div"))
        )

    @property
    def scratch(self) -> int:
        """Bytes that all registers take for each element."""
        return self.dtype.itemsize

    def run(self, sources: Sequence[torch.Tensor], numbers: Sequence[float], size: int) -> list[torch.Tensor]:
        """The kernel's target for some elements, as it is stored. It is valid until the next run in this thread."""
        whole = size // PADDING * PADDING
        result = self._buffer(size)
        if whole:
            self._apply([source[:whole] for source in sources], numbers, result[:whole])
        if whole < size:
            ends = [torch.zeros(PADDING, dtype=self.dtype) for _ in (*sources, None)]
            for end, source in zip(ends, sources, strict=False):
                end[: size - whole] = source[whole:]
            self._apply(ends[:-1], numbers, ends[-1])
            result[whole:] = ends[-1][: size - whole]
        return [result]

    def _apply(self, sources: Sequence[torch.Tensor], numbers: Sequence[float], out: torch.Tensor) -> None:
        operands: list[Any] = [
            numbers[operand.index] if isinstance(operand, Number) else sources[self.loads[operand]]
            for operand in self.operation.operands
        ]
        self.function(*operands, out=out)

    def _buffer(self, size: int) -> torch.Tensor:
        found: torch.Tensor | None = self._local.__dict__.get("buffer")
        if found is None or found.numel() < size:
            found = self._local.buffer = torch.empty(size, dtype=self.dtype)
        return found[:size]


def torch_executor(kernel: Kernel) -> TorchExecutor | DirectExecutor:
    """What runs a kernel by torch."""
    return DirectExecutor(kernel) if DirectExecutor.suits(kernel) else TorchExecutor(kernel)


def _register_type(operation: Operation) -> torch.dtype:
    if operation.truth:
        return torch.bool
    return _KINDS[operation.kind]


def _load(register: int, source: int, *, is_source: bool) -> Step:
    def load(registers: Registers, sources: Sequence[torch.Tensor], numbers: Sequence[float]) -> None:
        raw = sources[source]
        if is_source and raw.numel() == registers[register].numel():
            registers[register] = raw
        else:
            registers[register][: raw.numel()].copy_(raw)

    return load


def _step(operation: Operation, placed: Mapping[int, int], out: int) -> Step:
    function = _FUNCTIONS[operation.name]
    if operation.name == "round":
        assert operation.dtype is not None
        stored, source = TORCH[operation.dtype], operation.operands[0]
        assert isinstance(source, int)
        register = placed[source]
        return lambda registers, sources, numbers: registers[out].copy_(registers[register].to(stored))
    tensors_only = operation.name in ("minimum", "maximum", "select") or isinstance(operation.operands[0], Number)
    kind = _KINDS[operation.kind]
    operands = [
        (True, operand.index) if isinstance(operand, Number) else (False, placed[operand])
        for operand in operation.operands
    ]

    def step(registers: Registers, sources: Sequence[torch.Tensor], numbers: Sequence[float]) -> None:
        values: list[Any] = [numbers[index] if is_number else registers[index] for is_number, index in operands]
        if tensors_only:
            values = [torch.tensor(value, dtype=kind) if type(value) is float else value for value in values]
        function(*values, out=registers[out])

    return step


def _fused(b: torch.Tensor, factor: float, a: torch.Tensor, *, out: torch.Tensor) -> None:
    torch.add(a, b, alpha=factor, out=out)


def _converted(a: torch.Tensor, *, out: torch.Tensor) -> None:
    out.copy_(a)


_DIRECT = ("lerp", "add", "sub", "mul", "div")
"""Operations that torch computes on halves to the bits of float32 rounded: compared in the tests."""
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "minimum", "maximum", "lerp")},
    **{name: getattr(torch, name) for name in ("neg", "abs", "sign", *COMPARISONS, *LOGIC, *BY_TORCH)},
    "fma": _fused,
    "select": torch.where,
    "convert": _converted,
    "round": _converted,
}
