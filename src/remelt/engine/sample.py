"""A sample on which a kernel is tried before it is believed: it must give the bits of the methods themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from remelt.check.program import Load
from remelt.engine.language import Kernel
from remelt.engine.torch_program import PADDING
from remelt.planning.passes import Sweep
from remelt.tensors import TORCH

if TYPE_CHECKING:
    from remelt.engine.tiles import TaskRun

_TOLERANCE = 1e-9
"""By how much a sum may differ, relatively: another order of adding rounds otherwise."""


class Sample:
    """Values for what a kernel reads, and what the methods of its sweep make of them."""

    def __init__(self, kernel: Kernel, run: TaskRun, sweep: Sweep) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.kernel = kernel
        self.sources: list[torch.Tensor] = []
        for source in kernel.sources:
            values = torch.randn(PADDING, generator=drawn, dtype=torch.float64)
            values[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
            self.sources.append(values.to(TORCH[source.dtype]))
        device = run.place.device
        by_register = {
            one.register: values.to(device) for one, values in zip(kernel.sources, self.sources, strict=True)
        }
        methods = _sampled(run, by_register)
        found = methods.evaluate(sweep, 0, PADDING, PADDING)
        self.targets = []
        for target in kernel.targets:
            register = target.register if target.output is None else run.program.outputs[target.output].register
            assert register is not None
            self.targets.append(found[register].to(TORCH[target.dtype]).cpu())
        sums: dict[int, dict[str, torch.Tensor]] = {}
        for register, number in sweep.reductions:
            methods.reduce(register, number, found, PADDING, sums.setdefault(register, {}), sweep)
        self.sums = [sums[partial.register][partial.name].cpu() for partial in kernel.partials]

    def agrees(self, targets: Sequence[torch.Tensor], sums: Sequence[torch.Tensor] = ()) -> bool:
        """Whether an executor gives the same bits, and the same sums but for the order of adding."""
        for expected, got in zip(self.targets, targets, strict=True):
            if not torch.equal(expected.view(torch.uint8), got.to(expected.dtype).view(torch.uint8)):
                return False
        return all(
            torch.allclose(expected.double(), got.double(), rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
            for expected, got in zip(self.sums, sums, strict=False)
        )


def _sampled(run: TaskRun, samples: Mapping[int, torch.Tensor]) -> TaskRun:
    """The same task over the samples."""
    from remelt.engine.tiles import TaskRun

    class Sampled(TaskRun):
        def load(self, load: Load, begin: int, end: int) -> torch.Tensor:
            register = self.program.instructions.index(load)
            return samples[register].to(self.place.compute)

    sampled = Sampled(run.planned, run.place)
    sampled.known = run.known
    whole: dict[int, Any] = {
        register: samples.get(register, held.reshape(-1)[:PADDING]) for register, held in run.whole.items()
    }
    sampled.whole = whole
    return sampled
