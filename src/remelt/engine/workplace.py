"""What every task of a merge works with, and how one task reads its inputs there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from remelt.check.program import Load, Program
from remelt.core.dtype import DType
from remelt.engine.cache import Cache
from remelt.engine.finite import FiniteReport, is_finite
from remelt.engine.scratch import Scratch
from remelt.engine.sink import Sink
from remelt.engine.sweeps import Kernels
from remelt.engine.tally import Tallies
from remelt.errors import FormatError
from remelt.formats.checkpoint import Checkpoint
from remelt.planning.plan import PlannedTask
from remelt.tensors import aligned_view, tensor_over

Memory = memoryview | tuple[int, int, int]
"""Bytes in memory, or those of an open file: its descriptor, their offset, and their number."""


@dataclass(frozen=True)
class Workplace:
    """What every task of a merge works with."""

    checkpoints: Mapping[int, Checkpoint]
    labels: Mapping[int, str]
    sinks: Sequence[Sink]
    report: FiniteReport
    compute: torch.dtype
    device: torch.device
    stopped: Callable[[], bool]
    tallies: Tallies = field(default_factory=Tallies)
    mapped: bool = True
    """Whether inputs are looked at where they are mapped, rather than read."""
    scratch: Scratch = field(default_factory=Scratch)
    kernels: Kernels = field(default_factory=Kernels)
    cache: Cache | None = None
    """What earlier merges found, and later ones may use."""
    identities: Mapping[int, str | None] = field(default_factory=dict)
    """What tells the content of an input from another, for the cache; None where its bytes do."""
    watched: dict[int, tuple[Program, bool]] = field(default_factory=dict)
    """For each program, by identity, whether its results show every NaN and infinity of what it reads."""


class Stopped(Exception):
    """The merge was told to stop."""


class Reader:
    """What one task reads, and whom it blames for NaN and infinities."""

    def __init__(self, planned: PlannedTask, place: Workplace) -> None:
        self.planned, self.task, self.place = planned, planned.task, place
        self.program = planned.task.program
        self.spoiled = False
        self.views: dict[Load, torch.Tensor | None] = {}

    def raw(self, load: Load, begin: int, end: int) -> torch.Tensor:
        """A tile of an input as it is stored."""
        self.place.tallies.mine().read += (end - begin) * self.stored_type(load).itemsize
        if load not in self.views:
            self.views[load] = self.view(load)
        whole = self.views[load]
        if whole is not None:
            return whole[begin:end]
        key = load.key or self.task.key
        dtype = self.place.checkpoints[load.input].tensors[key].dtype
        return tensor_over(self.read(load.input, key, begin * dtype.itemsize, end * dtype.itemsize), dtype)

    def read(self, index: int, key: str, begin: int, end: int) -> memoryview:
        """Bytes of an input's tensor: a view of them, or read into memory where nothing is mapped."""
        checkpoint = self.place.checkpoints[index]
        part = None if self.place.mapped else checkpoint.part(key, begin, end)
        if part is None:
            return checkpoint.read(key, begin, end)
        begun = perf_counter()
        data = read_part(part, f"{key} of {self.place.labels[index]}")
        self.place.tallies.mine().reading += perf_counter() - begun
        return data

    def view(self, load: Load) -> torch.Tensor | None:
        """The whole of an input where it lies, if it can be looked at there."""
        if not self.place.mapped:
            return None
        key = load.key or self.task.key
        checkpoint = self.place.checkpoints[load.input]
        return aligned_view(checkpoint.read(key), checkpoint.tensors[key].dtype) if checkpoint.is_view(key) else None

    def stored_type(self, load: Load) -> DType:
        """The type in which an input stores a tensor."""
        return self.place.checkpoints[load.input].tensors[load.key or self.task.key].dtype

    def stored_memory(self, register: int, begin: int, end: int) -> Memory:
        """Where some elements of an input's tensor lie, as they are stored."""
        load = self.program.instructions[register]
        assert isinstance(load, Load)
        checkpoint, key = self.place.checkpoints[load.input], load.key or self.task.key
        width = checkpoint.tensors[key].dtype.itemsize
        part = None if self.place.mapped else checkpoint.part(key, begin * width, end * width)
        return checkpoint.read(key, begin * width, end * width) if part is None else part

    def is_streamed(self, register: int) -> bool:
        """Whether any number of an input's elements can be taken without a copy of them in memory."""
        load = self.program.instructions[register]
        assert isinstance(load, Load)
        return self.place.checkpoints[load.input].is_view(load.key or self.task.key)

    def blame(self, load: Load, raw: torch.Tensor) -> None:
        """Tell whose NaN or infinity was met: the input's, or that of converting it to the compute type."""
        if load in self.program.mended:
            return
        self.spoiled = True
        key = load.key or self.task.key
        if is_finite(raw):
            self.place.report.add_result(key, self.arithmetic)
        else:
            self.place.report.add_input(self.place.labels[load.input], key)

    def blame_stored(self, load: Load) -> None:
        """An input's stored values hold NaN or an infinity."""
        if load in self.program.mended:
            return
        self.spoiled = True
        self.place.report.add_input(self.place.labels[load.input], load.key or self.task.key)

    def blame_inputs(self, begin: int, end: int) -> None:
        """A result is not finite, and only results were looked at: find the inputs that are to blame."""
        for load in self.program.loads:
            raw = self.raw(load, begin, end)
            if raw.is_floating_point() and not is_finite(raw.to(self.place.compute)):
                self.blame(load, raw)

    @property
    def arithmetic(self) -> str:
        """What overflows where inputs and the result's type do not."""
        return f"{self.place.compute} arithmetic; --compute-dtype float64 does not"


def read_part(part: tuple[int, int, int], name: str) -> memoryview:
    """Bytes of an open file, read into memory; `FormatError` where the file has become shorter."""
    descriptor, offset, length = part
    data = memoryview(bytearray(length))
    done = 0
    while done < length:
        found = os.preadv(descriptor, [data[done:]], offset + done)
        if not found:
            raise cut_short(name)
        done += found
    return data


def cut_short(name: str) -> FormatError:
    """What to say of an input that ends early."""
    return FormatError(f"{name} was cut short while it was read", hint="merge again once nothing writes that file")
