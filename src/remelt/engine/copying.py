"""Tensors that go from an input to a result as they are: looked at and written in pieces that stay in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from remelt.check.program import Load
from remelt.engine import native
from remelt.planning.passes import Sweep
from remelt.tensors import tensor_over

if TYPE_CHECKING:
    from remelt.engine.tiles import TaskRun

_PIECE = 2**20
"""Bytes between two calls of the system."""


def copy_bytes(run: TaskRun, sweep: Sweep, start: int, end: int) -> bool:
    """Copy some elements of a task that copies, by the native extension; False where that is not for it."""
    if not run.task.copy or run.place.kernels.executor != "native":
        return False
    for position in sweep.outputs:
        register = run.program.outputs[position].register
        load = run.program.instructions[register]
        dtype = run.task.outputs[position][2].dtype
        if not isinstance(load, Load) or run.stored_type(load) is not dtype:
            return False
        kind = native.TYPES.get(dtype.name, native.TYPES["OPAQUE"])
        key, width = load.key or run.task.key, dtype.itemsize
        for begin in range(start * width, end * width, _PIECE):
            run.pause()
            stop = min(begin + _PIECE, end * width)
            data = run.read(load.input, key, begin, stop)
            finite, checksum = native.inspect(data, kind, begin)
            if not finite and not run.spoiled:
                run.blame(load, tensor_over(data, dtype))
            run.put(position, begin, data)
            run.place.tallies.mine().read += len(data)
            run.settled_part(position, len(data), finite=True, checksum=checksum)
    return True
