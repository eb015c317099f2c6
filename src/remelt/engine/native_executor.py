"""Kernels run by the native extension: conversions, arithmetic, checks and checksums in one go over each block."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from remelt.check.program import Load
from remelt.core.dtype import DType
from remelt.engine import native
from remelt.engine.finite import HIGHEST_E4M3
from remelt.engine.known import Partials, add_part
from remelt.engine.language import Kernel, Number, Operand, Operation, Partial
from remelt.engine.torch_program import PADDING
from remelt.engine.workplace import cut_short
from remelt.errors import FormatError
from remelt.planning.cost import CHUNK, COPIED, SLICE
from remelt.tensors import TORCH, bytes_of

if TYPE_CHECKING:
    from remelt.engine.sample import Sample
    from remelt.engine.tiles import TaskRun

_KINDS = {"single": 0, "double": 1}
_MOST = 2**16 - 1
"""Registers, numbers and places of a program."""
_OFTEN = 64
"""Operations on a slice between two looks whether to stop: some tens of milliseconds."""


class NativeExecutor:
    """A kernel as a program of the extension."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        encoder = _Encoder(kernel)
        self.program = encoder.program()
        self.sums = [one for one in kernel.partials if not one.bins]
        self.histograms = [one for one in kernel.partials if one.bins]
        self.loads, self.stores, self.limited = encoder.loads, encoder.stores, encoder.limited
        self.sizes = [target.dtype.itemsize for target in kernel.targets]
        loaded = [kernel.sources[place] for place in dict.fromkeys(self.loads)]
        self.width = sum(source.dtype.itemsize for source in loaded if not source.held)
        """Bytes that are read for each element."""
        self._local = threading.local()

    @staticmethod
    def suits(kernel: Kernel) -> bool:
        """Whether the extension says everything that a kernel does."""
        known = all(source.dtype.name in native.TYPES for source in kernel.sources) and all(
            target.dtype.name in native.TYPES for target in kernel.targets
        )
        return known and kernel.is_exact and len(kernel.scalars) < _MOST and len(kernel.operations) < 2**20

    def sample(self, sample: Sample, numbers: Sequence[float]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the program makes of a sample: its targets, and its sums."""
        outputs = [torch.empty(PADDING, dtype=TORCH[target.dtype]) for target in self.kernel.targets]
        sums = self._sums(1)
        inputs = [bytes_of(source) for source in sample.sources]
        memories = [bytes_of(one) for one in outputs]
        found: Partials = {}
        counts = self._counts(found)
        native.run(self.program, numbers, inputs, memories, PADDING, sums=sums, counts=counts)
        self._add(found, sums)
        return outputs, [
            torch.as_tensor(found[one.register][one.name], dtype=torch.float64) for one in self.kernel.partials
        ]

    def _sums(self, chunks: int) -> np.ndarray | None:
        """Memory for a call's sums."""
        columns = len(self.sums) + len(self.limited)
        return np.empty((chunks, columns)) if columns else None

    def _counts(self, partials: Partials) -> np.ndarray | None:
        """Memory for the counts of histograms, which are among what a slice has found from the beginning."""
        if not self.histograms:
            return None
        counts = np.zeros(self.program.counts, dtype=np.int32)
        begin = 0
        for one in self.histograms:
            end = begin + one.bins + (one.begin is not None)
            partials.setdefault(one.register, {})[one.name] = torch.from_numpy(counts[begin:end])
            begin = end
        return counts

    def tile(self, run: TaskRun, numbers: Sequence[float], begin: int, end: int) -> None:
        """Compute some elements: write what goes to results, keep what stays whole, tell what is not finite."""
        kernel, size = self.kernel, end - begin
        inputs = [
            run.held_bytes(source.register, begin, end)
            if source.held
            else run.stored_memory(source.register, begin, end)
            for source in kernel.sources
        ]
        outputs = [self._place(run, position, begin, end) for position in range(len(kernel.targets))]
        sums = self._sums(-(-size // CHUNK))
        if run.counts is None:
            run.counts = self._counts(run.partials)
        report = self._run(run, numbers, inputs, outputs, size, begin, sums)
        tally = run.place.tallies.mine()
        tally.reading += report.reading * 1e-9
        tally.writing += report.writing * 1e-9
        tally.read += size * self.width
        for place in report.loads:
            load = run.program.instructions[kernel.sources[self.loads[place]].register]
            if isinstance(load, Load):
                run.blame_stored(load)
        too_large = set()
        if sums is not None and self.limited:
            largest = sums[:, len(self.sums) :].max(axis=0, initial=0.0)
            too_large = {place for place, found in zip(self.limited, largest, strict=True) if found > HIGHEST_E4M3}
        too_large |= {
            place
            for place, target in enumerate(kernel.targets)
            if target.dtype is DType.F8_E4M3
            and isinstance(target.value, Number)
            and abs(numbers[target.value.index]) > HIGHEST_E4M3
        }
        for store, place in enumerate(self.stores):
            position = kernel.targets[place].output
            if position is None:
                continue
            if isinstance(outputs[place], np.ndarray):
                run.put(position, begin * self.sizes[place], memoryview(outputs[place]))
            finite = store not in report.stores and place not in too_large
            run.settled_part(position, size * self.sizes[place], finite=finite, checksum=report.checksums[store])
        self._add(run.partials, sums)

    def step(self, run: TaskRun) -> int:
        """Elements that one call takes: as many as pass between two looks whether to stop, where nothing is copied."""
        if math.prod(run.task.shape) <= COPIED:
            return max(COPIED, CHUNK)
        copied = any(not source.held and not run.is_streamed(source.register) for source in self.kernel.sources)
        placed = all(target.output is None or run.is_placed(target.output) for target in self.kernel.targets)
        if copied or not placed:
            return max(COPIED, CHUNK)
        often = SLICE // (1 + len(self.kernel.operations) // _OFTEN)
        return max(often // CHUNK, 1) * CHUNK  # where checksums and sums may begin

    def _run(
        self,
        run: TaskRun,
        numbers: Sequence[float],
        inputs: list[Any],
        outputs: list[Any],
        size: int,
        begin: int,
        sums: np.ndarray | None,
    ) -> native.Report:
        try:
            return native.run(self.program, numbers, inputs, outputs, size, start=begin, sums=sums, counts=run.counts)
        except EOFError:
            raise cut_short(self._named(run, inputs)) from None
        except OSError as error:
            if error.filename == "input":
                raise FormatError(
                    f"{self._named(run, inputs)} cannot be read: {error.strerror}",
                    hint="merge again once its disk answers: what is done is kept",
                ) from error
            root, key, _ = run.task.outputs[0]
            raise run.place.sinks[root].refused(key, error) from error

    def _named(self, run: TaskRun, inputs: list[Any]) -> str:
        """The tensor that could not be read, and the inputs it may be of: those that are too short, if any."""
        read, short = [], []
        for source, memory in zip(self.kernel.sources, inputs, strict=True):
            load = run.program.instructions[source.register]
            if isinstance(load, Load) and isinstance(memory, tuple):
                read.append(run.place.labels[load.input])
                if os.fstat(memory[0]).st_size < memory[1] + memory[2]:
                    short.append(read[-1])
        return f"{run.task.key} of {' or '.join(dict.fromkeys(short or read))}"

    def _place(self, run: TaskRun, position: int, begin: int, end: int) -> Any:
        """Where a target's elements go: a file, memory, or a buffer of this thread that is written then."""
        target, width = self.kernel.targets[position], self.sizes[position]
        if target.register is not None:
            return run.held_bytes(target.register, begin, end)
        assert target.output is not None
        place = run.place_of(target.output, begin * width, end * width)
        return self._buffer(position, (end - begin) * width) if place is None else place

    def _add(self, partials: Partials, sums: np.ndarray | None) -> None:
        """Add the chunks' sums to those before, one after the other."""
        if sums is not None:
            for place, one in enumerate(self.sums):
                add_part(partials.setdefault(one.register, {}), one.name, sums[:, place].tolist())

    def _buffer(self, place: int, size: int) -> np.ndarray:
        buffers: dict[int, np.ndarray] = self._local.__dict__.setdefault("buffers", {})
        found = buffers.get(place)
        if found is None or len(found) < size:
            found = buffers[place] = np.empty(size, dtype=np.uint8)
        return found[:size]


class _Encoder:
    """Instructions as the extension takes them: registers are used again, each result is stored once it is known."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.loads = [operation.place for operation in kernel.operations if operation.name == "load"]
        self.stores: list[int] = []
        """The targets in the order in which they are stored."""
        self.limited: list[int] = []
        """The targets whose type turns what is too large into its largest number."""
        self.rows: list[list[int]] = []
        self.placed: dict[int, int] = {}
        self.free: list[int] = []
        self.registers = 0
        self.products = {
            place: pair for place, one in enumerate(kernel.partials) if (pair := self._product(one)) is not None
        }
        """The sums of products of two float32, whose registers are taken as they are."""
        self.uses = self._uses()
        """How often each operation's result is still needed."""

    def _product(self, summed: Partial) -> tuple[int, int] | None:
        """The two float32 whose product a sum adds up: float64 holds it exactly, so it need not be computed apart."""
        product = self.kernel.operations[summed.value]
        if summed.bins or product.name != "mul" or product.kind != "double":
            return None
        found = []
        for operand in product.operands:
            made = self.kernel.operations[operand] if isinstance(operand, int) else None
            if made is None or made.name != "convert" or not isinstance(made.operands[0], int):
                return None
            if self.kernel.operations[made.operands[0]].kind != "single":
                return None
            found.append(made.operands[0])
        return found[0], found[1]

    def _uses(self) -> list[int]:
        kernel = self.kernel
        uses = [0] * len(kernel.operations)
        wanted: list[Operand] = [target.value for target in kernel.targets]
        for place, one in enumerate(kernel.partials):
            wanted += self.products.get(place, (one.value,))
        for operand in wanted:
            if isinstance(operand, int):
                uses[operand] += 1
        for place in range(len(kernel.operations) - 1, -1, -1):
            for operand in kernel.operations[place].operands if uses[place] else ():
                if isinstance(operand, int):
                    uses[operand] += 1
        return uses

    def program(self) -> native.Program:
        """The program; `ValueError` where it is too large for the extension."""
        kernel = self.kernel
        wanted: dict[int, list[Callable[[], None]]] = {}
        for position, target in enumerate(kernel.targets):
            if isinstance(target.value, int):
                wanted.setdefault(target.value, []).append(partial(self._store, position))
        columns = counts = 0
        for index, one in enumerate(kernel.partials):
            last = max(self.products.get(index, (one.value,)))
            wanted.setdefault(last, []).append(partial(self._sum, index, counts if one.bins else columns))
            columns, counts = columns + (not one.bins), counts + bool(one.bins)
        for place, operation in enumerate(kernel.operations):
            if self.uses[place]:
                self._operation(place, operation)
            for row in wanted.get(place, ()):
                row()
        for position, target in enumerate(kernel.targets):
            if isinstance(target.value, Number):
                self._store(position)
        rows = np.array(self.rows, dtype=np.uint16).reshape(-1, 8)
        return native.Program(
            rows,
            max(self.registers, 1),
            len(kernel.scalars),
            len(kernel.sources),
            len(kernel.targets),
            columns + len(self.limited),
            counts,
        )

    def _operation(self, place: int, operation: Operation) -> None:
        name, kind, operands = operation.name, _KINDS[operation.kind], operation.operands
        if name == "select":
            operands = (operands[1], operands[2], operands[0])
        elif name == "convert":
            name = self._conversion(operation)
        fields, flags = [0, 0, 0], 0
        for index, operand in enumerate(operands):
            fields[index], flag = self._field(operand, index)
            flags |= flag
        if name == "load":
            fields[0] = operation.place
        register = self.free.pop() if self.free else self.registers
        self.registers = max(self.registers, register + 1)
        self.placed[place] = register
        extra = 0 if operation.dtype is None else native.TYPES[operation.dtype.name]
        self.rows.append([native.OPERATIONS[name], kind, register, *fields, flags, extra])
        for operand in operation.operands:
            self._used(operand)

    def _conversion(self, operation: Operation) -> str:
        """Which instruction converts: truths are numbers already, of the kind that was compared."""
        operand = operation.operands[0]
        assert isinstance(operand, int)
        before = self.kernel.operations[operand].kind
        if before == operation.kind:
            return "copy"
        return "widen" if operation.kind == "double" else "narrow"

    def _store(self, position: int) -> None:
        target = self.kernel.targets[position]
        field, flag = self._field(target.value, 0)
        kind = _KINDS[self._kind(target.value)]
        flags = flag | (native.WITH_CHECKSUM if target.output is not None else 0)
        stored = native.TYPES[target.dtype.name]
        self.rows.append([native.OPERATIONS["store"], kind, position, field, 0, 0, flags, stored])
        self.stores.append(position)
        if target.dtype is DType.F8_E4M3 and isinstance(target.value, int):
            self._limit(position, self.placed[target.value], kind)
        self._used(target.value)

    def _limit(self, position: int, register: int, kind: int) -> None:
        """Find the largest size of what is stored."""
        size = self.free[-1] if self.free else self.registers
        self.registers = max(self.registers, size + 1)
        self.rows.append([native.OPERATIONS["abs"], kind, size, register, 0, 0, 0, 0])
        column = sum(not one.bins for one in self.kernel.partials) + len(self.limited)
        self.rows.append([native.OPERATIONS["reduce_maximum"], kind, column, size, 0, 0, 0, 0])
        self.limited.append(position)

    def _sum(self, index: int, column: int) -> None:
        one = self.kernel.partials[index]
        operands: tuple[int, ...] = self.products.get(index, (one.value,))
        first, second, flags, wide, kind = self.placed[operands[0]], 0, 0, 0, _KINDS["single"]
        if one.bins:
            name = "histogram_upper"
            if one.begin is not None:
                name, wide = "histogram_window", one.bins.bit_length() - 1
                second, flags = self._field(one.begin, 1)
        elif index in self.products:
            name, second = "reduce_product", self.placed[operands[1]]
        else:
            name, kind = "reduce_sum", _KINDS["double"]
        self.rows.append([native.OPERATIONS[name], kind, column, first, second, 0, flags, wide])
        for operand in operands:
            self._used(operand)

    def _kind(self, operand: Operand) -> str:
        return self.kernel.kind if isinstance(operand, Number) else self.kernel.operations[operand].kind

    def _field(self, operand: Operand, index: int) -> tuple[int, int]:
        if isinstance(operand, Number):
            return operand.index, (native.NUMBER_A, native.NUMBER_B, native.NUMBER_C)[index]
        return self.placed[operand], 0

    def _used(self, operand: Operand) -> None:
        """A register that nothing needs any more is free."""
        if isinstance(operand, int):
            self.uses[operand] -= 1
            if not self.uses[operand]:
                self.free.append(self.placed[operand])
