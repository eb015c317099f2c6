"""Kernels run by torch: straight through their operations, on blocks that stay in a core's cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch

from remelt.core.dtype import DType
from remelt.engine.finite import is_finite
from remelt.engine.known import Hits
from remelt.engine.language import Kernel, Number, Partial
from remelt.engine.scratch import Scratch
from remelt.engine.torch_program import BITS, KINDS, PADDING, Call, Program, interpreted, scripted
from remelt.methods.selection import ROW
from remelt.planning.cost import CHUNK
from remelt.tensors import TORCH

_BLOCK = 2**16
"""Elements that are computed at a time: fewer cost calls, and more do not stay in the second cache."""
_TILE = 2**20
_COUNTED_TILE = 2**18
_DIRECT_TILE = 2**19
"""Elements of a call: each one costs that two threads hand Python's lock to each other."""

Sums = list[list[float] | torch.Tensor | Hits]
"""For each partial of a kernel the sums of its chunks in order, or the counts of a histogram."""


class TorchExecutor:
    """A kernel as calls of torch, on registers that are used again."""

    def __init__(self, program: Program, call: Call) -> None:
        kernel = self.kernel = program.kernel
        self.program, self.call = program, call
        self.block = CHUNK if kernel.partials else _BLOCK
        self.histograms = [one for one in kernel.partials if one.bins]
        self.unseen = [
            place
            for place, source in enumerate(kernel.sources)
            if source.dtype.is_float and not source.held and place not in program.looked
        ]
        """Sources that are read for nothing but to look at them."""
        self.tile = _COUNTED_TILE if self.histograms else _TILE
        self.width = sum(program.target_type(place).itemsize for place in range(len(kernel.targets)))
        self.width += torch.float32.itemsize * len(self.histograms)
        """Bytes that an element takes until it is written."""
        self.registers = self.block * sum(dtype.itemsize for dtype in program.types)
        """Bytes of what a block is computed in."""

    def run(
        self, sources: Sequence[torch.Tensor], numbers: Sequence[float], size: int, scratch: Scratch, *, looks: bool
    ) -> tuple[list[torch.Tensor], Sums, list[int]]:
        """The kernel's targets for some elements, what they add to its sums, and the sources that may not be finite.

        ``sources`` are flat tensors of as many elements, which are looked at where ``looks`` says so. The results are
        valid until ``scratch`` is reset.
        """
        program, kernel = self.program, self.kernel
        scalars = [
            torch.tensor(numbers[index], dtype=KINDS["single" if dtype in _SINGLE else "double"]).view(dtype)
            for index, dtype in program.scalars.values()
        ]
        outputs = [scratch.take(size, program.target_type(position)) for position in range(len(kernel.targets))]
        magnitudes = [scratch.take(size, torch.float32) for _ in self.histograms]
        registers = self._registers(scratch)
        call = (sources, _bits(sources), numbers, scalars, registers, _bits(registers), outputs + magnitudes)
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # as written: nothing to find anew
            found, looked = self.call(*call, looks, size, self.block)
        columns = len(kernel.partials) - len(self.histograms)
        column, counted = iter(range(columns)), iter(magnitudes)
        sums: Sums = [
            _histogram(next(counted), one, numbers) if one.bins else found[next(column) :: columns]
            for one in kernel.partials
        ]
        suspects = [place for place, value in zip(program.looked, looked, strict=True) if not isfinite(value)]
        return outputs, sums, suspects + self.unseen if looks else []

    def _registers(self, scratch: Scratch) -> list[torch.Tensor]:
        places: dict[torch.dtype, int] = {}
        registers = []
        for dtype in self.program.types:
            places[dtype] = places.get(dtype, -1) + 1
            registers.append(scratch.register(dtype, places[dtype], self.block))
        return registers


class DirectExecutor:
    """One operation on halves, which torch computes in float32 inside and rounds once: no conversions are needed."""

    tile = _DIRECT_TILE
    registers = 0

    def __init__(self, kernel: Kernel) -> None:
        operation = kernel.operations[-1]
        self.kernel = kernel
        self.dtype = TORCH[kernel.targets[0].dtype]
        self.width = self.dtype.itemsize
        self.loads = {place: found.place for place, found in enumerate(kernel.operations[:-1])}
        self.function: Callable[..., Any] = getattr(torch, operation.name)
        self.operation = operation

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

    def run(
        self, sources: Sequence[torch.Tensor], numbers: Sequence[float], size: int, scratch: Scratch, *, looks: bool
    ) -> tuple[list[torch.Tensor], Sums, list[int]]:
        """The kernel's target for some elements, as it is stored, and the sources that are not finite.

        They are looked at where ``looks`` says so. The target is valid until ``scratch`` is reset.
        """
        bad = [place for place, source in enumerate(sources) if looks and not is_finite(source)]
        whole = size // PADDING * PADDING
        result = scratch.take(size, self.dtype)
        if whole:
            self._apply([source[:whole] for source in sources], numbers, result[:whole])
        if whole < size:
            ends = [torch.zeros(PADDING, dtype=self.dtype) for _ in (*sources, None)]
            for end, source in zip(ends, sources, strict=False):
                end[: size - whole] = source[whole:]
            self._apply(ends[:-1], numbers, ends[-1])
            result[whole:] = ends[-1][: size - whole]
        return [result], [], bad

    def _apply(self, sources: Sequence[torch.Tensor], numbers: Sequence[float], out: torch.Tensor) -> None:
        operands: list[Any] = [
            numbers[operand.index] if isinstance(operand, Number) else sources[self.loads[operand]]
            for operand in self.operation.operands
        ]
        self.function(*operands, out=out)


def torch_executors(kernel: Kernel) -> Iterator[TorchExecutor | DirectExecutor]:
    """What runs a kernel by torch, the quickest first."""
    if DirectExecutor.suits(kernel):
        yield DirectExecutor(kernel)
    program = Program(kernel)
    for compiled in (scripted, interpreted):
        with contextlib.suppress(RuntimeError, AttributeError):  # no TorchScript
            yield TorchExecutor(program, compiled(program.source))


def _bits(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The bits of numbers as integers; what is no number to compute with is left as it is."""
    return [one.view(BITS[one.dtype]) if one.dtype in BITS else one for one in tensors]


def _histogram(magnitudes: torch.Tensor, partial: Partial, numbers: Sequence[float]) -> torch.Tensor | Hits:
    """How many magnitudes there are of each kind that the partial tells apart; they are overwritten."""
    bits = magnitudes.view(torch.int32)
    if partial.begin is None:
        upper = torch.bitwise_right_shift(bits, 16, out=bits)
        return torch.bincount(upper, minlength=partial.bins)
    place = bits.sub_(int(numbers[partial.begin.index]) * ROW).numpy()
    within = np.flatnonzero(place.view(np.uint32) < partial.bins)
    return Hits(partial.bins, place[within], int(np.count_nonzero(place < 0)))


_SINGLE = (torch.float32, torch.int32)
_DIRECT = ("lerp", "add", "sub", "mul", "div")
"""Operations that torch computes on halves to the bits of float32 rounded: compared in the tests."""
