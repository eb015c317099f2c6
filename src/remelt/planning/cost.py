"""What a task holds while it runs: tiles in flight, and tensors that must be whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from remelt.check.keys import Task
from remelt.check.program import Apply, Constant, Program
from remelt.core.tensor_info import batch_of_rows, width_of_rows
from remelt.planning.passes import Schedule, Sweep, WholeCall

TILE = 2**17
"""Elements of a tile: its scratch stays in a core's cache, and Python's cost per call no longer shows."""
SMALLEST_TILE = 2**12
CHUNK = 2**16
"""Elements of one partial sum of a reduction: fixed, so that no tile size or number of threads changes a bit."""
DEVICE_TILE = 2**22
"""Elements of a tile on another device, which is kept busy for longer than it takes to tell it what to do."""
SLICE = 2**22
"""Elements that one thread takes at a time from a tensor that may be cut anywhere."""
COPIED = 2**18
"""Elements that a thread takes at a time of what is not looked at where it lies: they stay in the second cache."""
FOLD = 2**22
"""Elements whose partial sums are added up before they are added to those of others: fixed, as chunks are."""
SCRATCH = 2**25
"""Bytes that the tiles of one thread should not exceed while smaller ones are possible."""
SAMPLE = 2**17
"""Elements of a sample."""
SMALL = 2**18
"""Elements up to which a tensor's intermediate results are kept whole between passes, and no sample is taken of it."""
_COPIES = 4
"""How often large sums are held by a thread at a time: a call's, a slice's, and those of the passes before."""
_TEMPORARIES = 3
"""Registers' worth of memory that conversions and plain methods use beside what the schedule counts."""


@dataclass(frozen=True)
class Cost:
    """Bytes that one unit of a task holds at its peak, the tile size that this assumes, and elements computed.

    ``tiles`` are those bytes of it that are for tiles: an executor takes tiles of its own size within them.
    """

    memory: int
    tile: int
    work: int
    tiles: int
    heavy: tuple[tuple[str, float], ...] = ()
    """Methods whose work is told apart, and their floating-point operations."""


class CostModel:
    """The costs of all tasks of one program that are streamed alike, in a compute type of ``itemsize`` bytes."""

    def __init__(self, program: Program, passes: Schedule, itemsize: int, *, device: bool = False) -> None:
        sweeps = [one for one in passes.passes if isinstance(one, Sweep)]
        self.passes, self.itemsize = passes, itemsize
        self.live = max((one.live for one in sweeps), default=1) + _temporaries(program)
        tile = TILE
        while tile > SMALLEST_TILE and tile * self.live * itemsize > SCRATCH:
            tile //= 2
        self.tile = tile
        self.longest = max(tile, CHUNK) if any(one.reductions for one in sweeps) else tile
        self.shapes = list(dict.fromkeys(one.shape for one in sweeps))
        self.rows = list(
            dict.fromkeys((one.shape, one.rows, bool(one.reductions), one.batched) for one in sweeps if one.rows)
        )
        self.concluding = [
            instruction
            for instruction in program.instructions
            if isinstance(instruction, Apply)
            and instruction.method.declaration.cut == "row"
            and callable(instruction.method.declaration.workspace)
        ]
        self.sums = [
            (instruction.method.declaration.held, program.shapes[register], _COPIES * len(instruction.operands))
            for register, instruction in enumerate(program.instructions)
            if isinstance(instruction, Apply) and instruction.reductions
        ]
        self.heavy = [
            instruction
            for instruction in program.instructions
            if isinstance(instruction, Apply) and instruction.method.declaration.work is not None
        ]
        self.holds = any(isinstance(one, WholeCall) or one.gathers for one in passes.passes)
        self.travels = (len(program.loads) + len(program.outputs)) * itemsize if device else 0
        """Bytes of an element on its way to a device and back."""
        calls = sum(isinstance(instruction, Apply) for instruction in program.instructions)
        self.steps = max(calls, 1) * sum(isinstance(one, WholeCall) or one.due for one in passes.passes)

    def cost(self, task: Task) -> Cost:
        """The cost of one task."""
        numel = math.prod(task.shape)
        largest = max([numel if shape is None else math.prod(shape) for shape in self.shapes], default=0)
        rows = (
            grain(task.shape if shape is None else shape, vectors, sums=sums, batched=batched)
            for shape, vectors, sums, batched in self.rows
        )
        longest = max([self.longest, *rows])
        tiles = min(longest, max(largest, 1)) * self.live * self.itemsize
        held = sum(
            times * (size if isinstance(size, int) else size(task.shape if shape is None else shape))
            for size, shape, times in self.sums
        )
        held += sum(_workspace_bytes(task, instruction) for instruction in self.concluding)
        memory = tiles + held + self.travels * min(DEVICE_TILE, max(largest, 1))
        if self.holds:
            memory += _whole_peak(task, self.passes, self.itemsize)
        heavy = tuple((found.method.name, _operations(task, found)) for found in self.heavy)
        return Cost(memory, self.tile, numel * self.steps, tiles, heavy)


def grain(shape: tuple[int, ...], vectors: str = "row", *, sums: bool = False, batched: bool = False) -> int:
    """Elements at multiples of which rows and 8 bytes of any type begin together; with ``sums``, their chunks, too.

    Where rows are ``batched``, those of a batch, which is a chunk then.
    """
    width = width_of_rows(shape, vectors)
    if batched:
        return width * batch_of_rows(width)
    rows = math.lcm(width, 8)
    return max(CHUNK // rows, 1) * rows if sums else rows


def task_cost(task: Task, passes: Schedule, itemsize: int) -> Cost:
    """The cost of a task in a compute type of ``itemsize`` bytes."""
    return CostModel(task.program, passes, itemsize).cost(task)


def _operations(task: Task, instruction: Apply) -> float:
    """What one call of a method takes, by its own account."""
    work = instruction.method.declaration.work
    assert work is not None
    return work(*_known(task, instruction))


def _known(task: Task, instruction: Apply) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
    """The shapes of a call's operands, and its plain arguments; not those that differ from key to key."""
    shapes = [task.program.shapes[operand] for operand in instruction.operands]
    values = {one.name: one.default for one in instruction.method.parameters if not one.required}
    for name, argument in instruction.kwargs:
        values.pop(name, None)
        if isinstance(argument, Constant):
            values[name] = argument.value
    return [task.shape if shape is None else shape for shape in shapes], values


def _temporaries(program: Program) -> int:
    """Registers' worth of memory beside the schedule's: what the neediest method declares, and the conversions."""
    applied = (i.method.declaration.workspace for i in program.instructions if isinstance(i, Apply))
    return max(_TEMPORARIES, math.ceil(max((one for one in applied if not callable(one)), default=0.0)) + 2)


def _numel(task: Task, shape: tuple[int, ...] | None) -> int:
    return math.prod(task.shape if shape is None else shape)


def _whole_peak(task: Task, passes: Schedule, itemsize: int) -> int:
    """The most bytes of whole tensors held at a time, by walking the passes."""
    program = task.program
    sizes = [_numel(task, shape) * itemsize for shape in program.shapes]
    held: dict[int, int] = {}
    peak = 0
    for one in passes.passes:
        if isinstance(one, Sweep):
            held.update({register: sizes[register] for register in one.gathers})
            peak = max(peak, sum(held.values()))
            for register in one.drops:
                held.pop(register, None)
            continue
        peak = max(peak, sum(held.values()) + _call_bytes(one, task, sizes))
        held[one.register] = _result_bytes(one, task, sizes)
        for register in one.drops:
            held.pop(register, None)
    return peak


def _call_bytes(call: WholeCall, task: Task, sizes: list[int]) -> int:
    instruction = task.program.instructions[call.register]
    assert isinstance(instruction, Apply)
    workspace = instruction.method.declaration.workspace
    if callable(workspace):
        return _workspace_bytes(task, instruction) + _result_bytes(call, task, sizes)
    largest = max((sizes[operand] for operand in instruction.operands), default=0)
    return int(workspace * largest) + _result_bytes(call, task, sizes)


def _workspace_bytes(task: Task, instruction: Apply) -> int:
    """What a call holds beside operands and result, by its own account in bytes."""
    workspace = instruction.method.declaration.workspace
    assert callable(workspace)
    return int(workspace(*_known(task, instruction)))


def _result_bytes(call: WholeCall, task: Task, sizes: list[int]) -> int:
    instruction = task.program.instructions[call.register]
    assert isinstance(instruction, Apply)
    if instruction.method.declaration.cut == "model":
        return sum(sizes[operand] for operand in instruction.operands)
    return sizes[call.register]
