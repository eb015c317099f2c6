"""What every task of a merge works with, and how one task reads its inputs there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from remelt.check.program import Load
from remelt.core.dtype import DType
from remelt.engine.finite import FiniteReport, is_finite
from remelt.engine.scratch import Scratch
from remelt.engine.sink import Sink
from remelt.engine.sweeps import Kernels
from remelt.engine.tensors import aligned_view, tensor_over
from remelt.formats.checkpoint import Checkpoint
from remelt.planning.plan import PlannedTask


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
    wrote: Callable[[int], None]
    scratch: Scratch = field(default_factory=Scratch)
    kernels: Kernels = field(default_factory=Kernels)
    watched: dict[int, bool] = field(default_factory=dict)
    """For each program, by identity, whether its results show every NaN and infinity of what it reads."""


class Reader:
    """What one task reads, and whom it blames for NaN and infinities."""

    def __init__(self, planned: PlannedTask, place: Workplace) -> None:
        self.planned, self.task, self.place = planned, planned.task, place
        self.program = planned.task.program
        self.spoiled = False
        self.views: dict[Load, torch.Tensor | None] = {}

    def raw(self, load: Load, begin: int, end: int) -> torch.Tensor:
        """A tile of an input as it is stored."""
        if load not in self.views:
            self.views[load] = self.view(load)
        whole = self.views[load]
        if whole is not None:
            return whole[begin:end]
        key = load.key or self.task.key
        checkpoint = self.place.checkpoints[load.input]
        dtype = checkpoint.tensors[key].dtype
        return tensor_over(checkpoint.read(key, begin * dtype.itemsize, end * dtype.itemsize), dtype)

    def view(self, load: Load) -> torch.Tensor | None:
        """The whole of an input where it lies, if it can be looked at there."""
        key = load.key or self.task.key
        checkpoint = self.place.checkpoints[load.input]
        return aligned_view(checkpoint.read(key), checkpoint.tensors[key].dtype) if checkpoint.is_view(key) else None

    def stored_type(self, load: Load) -> DType:
        """The type in which an input stores a tensor."""
        return self.place.checkpoints[load.input].tensors[load.key or self.task.key].dtype

    def stored_bytes(self, register: int, begin: int, end: int) -> memoryview:
        """Some elements of an input's tensor as they are stored."""
        load = self.program.instructions[register]
        assert isinstance(load, Load)
        checkpoint, key = self.place.checkpoints[load.input], load.key or self.task.key
        width = checkpoint.tensors[key].dtype.itemsize
        return checkpoint.read(key, begin * width, end * width)

    def blame(self, load: Load, raw: torch.Tensor) -> None:
        """Tell whose NaN or infinity was met: the input's, or that of converting it to the compute type."""
        self.spoiled = True
        key = load.key or self.task.key
        if is_finite(raw):
            self.place.report.add_result(key, self.arithmetic)
        else:
            self.place.report.add_input(self.place.labels[load.input], key)

    def blame_stored(self, load: Load) -> None:
        """An input's stored values hold NaN or an infinity."""
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
