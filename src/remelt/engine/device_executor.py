"""Kernels run by torch on another device: tiles go there and come back through pinned memory.

Each thread has a stream and buffers of its own, so that one thread's copies go on while the device computes another's
tile. Tensors travel in their stored types, and are converted on the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from remelt.check.program import Load
from remelt.core.dtype import DType
from remelt.engine.finite import is_finite
from remelt.engine.known import add_part
from remelt.engine.language import BY_TORCH, COMPARISONS, LOGIC, Kernel, Number, Operand, Operation, Partial, last_uses
from remelt.engine.torch_program import PADDING
from remelt.methods.selection import upper_histogram, window_histogram
from remelt.planning.cost import CHUNK, DEVICE_TILE
from remelt.tensors import TORCH

if TYPE_CHECKING:
    from remelt.engine.scratch import Pinned
    from remelt.engine.tiles import TaskRun

_KINDS = {"single": torch.float32, "double": torch.float64}
_PINNED = ("cuda", "xpu")


class DeviceExecutor:
    """A kernel on a device."""

    def __init__(self, kernel: Kernel, device: torch.device) -> None:
        self.kernel, self.device = kernel, device
        last = last_uses(kernel)
        self.ends: list[list[int]] = [[] for _ in kernel.operations]
        """For each operation, those whose results nothing after it needs."""
        for place, end in enumerate(last):
            if end < len(kernel.operations):
                self.ends[end].append(place)
        self._local = threading.local()

    @staticmethod
    def suits(kernel: Kernel, device: torch.device) -> bool:
        """Whether the device has all types of a kernel: Apple's has no float64, and no numbers of 8 bits."""
        types = {source.dtype for source in kernel.sources} | {target.dtype for target in kernel.targets}
        small = any(operation.kind == "single" for operation in kernel.operations) or kernel.kind == "single"
        wide = any(operation.kind == "double" for operation in kernel.operations) or DType.F64 in types
        return device.type != "mps" or (small and not wide and not any(dtype.itemsize == 1 for dtype in types))

    def step(self, run: TaskRun) -> int:
        """Elements that one call takes."""
        return DEVICE_TILE

    def tile(self, run: TaskRun, numbers: Sequence[float], begin: int, end: int) -> None:
        """Compute some elements: write what goes to results, keep what stays whole, tell what is not finite."""
        kernel, size = self.kernel, end - begin
        with self._stream() as stream:
            pinned = run.place.scratch.pinned
            sources = [self._source(run, place, begin, end, pinned) for place in range(len(kernel.sources))]
            found = {place: values[:size] for place, values in self.run(sources, numbers).items()}
            results: list[torch.Tensor | None] = []
            for position, target in enumerate(kernel.targets):
                values = self._value(found, target.value, numbers, size)
                if target.register is not None:
                    run.whole[target.register].view(-1)[begin:end] = values
                    results.append(None)
                else:
                    results.append(self._download(values.to(_travels(target.dtype)), ("to", position), pinned))
            sums = [self._partial(partial, found[partial.value], numbers) for partial in kernel.partials]
            if stream is not None:
                stream.synchronize()
        for target, result in zip(kernel.targets, results, strict=True):
            if target.output is not None and result is not None:
                run.write(target.output, result, begin)
        for partial, part in zip(kernel.partials, sums, strict=True):
            add_part(run.partials.setdefault(partial.register, {}), partial.name, part)

    def run(self, sources: Sequence[torch.Tensor], numbers: Sequence[float]) -> dict[int, torch.Tensor]:
        """The results that targets and sums need, of sources on the device, with something behind their ends.

        Where a processor stands for the device, torch rounds otherwise in what is left over of a vector.
        """
        found: dict[int, torch.Tensor] = {}
        sources = [torch.nn.functional.pad(one, (0, -len(one) % PADDING)) for one in sources]
        for place, operation in enumerate(self.kernel.operations):
            if operation.name == "load":
                found[place] = sources[operation.place].to(_KINDS[operation.kind])
            else:
                found[place] = _computed(operation, found, numbers)
            for old in self.ends[place]:
                found.pop(old, None)
        return found

    def sample(self, sources: Sequence[torch.Tensor], numbers: Sequence[float]) -> tuple[list[torch.Tensor], list[Any]]:
        """The targets and sums of a sample, as tensors in memory."""
        found = self.run([source.to(self.device) for source in sources], numbers)
        size = len(sources[0]) if sources else 0
        values = [self._value(found, target.value, numbers, size) for target in self.kernel.targets]
        targets = [one.to(TORCH[target.dtype]).cpu() for one, target in zip(values, self.kernel.targets, strict=True)]
        totals: dict[str, Any] = {}
        for place, partial in enumerate(self.kernel.partials):
            add_part(totals, str(place), self._partial(partial, found[partial.value], numbers))
        return targets, [torch.as_tensor(value, dtype=torch.float64) for value in totals.values()]

    def _value(
        self, found: dict[int, torch.Tensor], operand: Operand, numbers: Sequence[float], size: int
    ) -> torch.Tensor:
        if isinstance(operand, Number):
            return torch.full((size,), numbers[operand.index], dtype=_KINDS[self.kernel.kind], device=self.device)
        return found[operand]

    def _source(self, run: TaskRun, place: int, begin: int, end: int, buffers: Pinned) -> torch.Tensor:
        """A source's elements on the device."""
        source = self.kernel.sources[place]
        if source.held:
            held: torch.Tensor = run.whole[source.register].view(-1)[begin:end]
            return held
        load = run.program.instructions[source.register]
        assert isinstance(load, Load)
        raw = run.raw(load, begin, end)
        if not run.shows_all and not is_finite(raw):
            run.blame(load, raw)
        if self.device.type not in _PINNED:
            return raw.to(self.device)
        pinned = buffers.like(raw, ("from", place))
        pinned.copy_(raw)
        return pinned.to(self.device, non_blocking=True)

    def _download(self, values: torch.Tensor, name: tuple[str, int], buffers: Pinned) -> torch.Tensor:
        if self.device.type not in _PINNED:
            return values.cpu()
        return buffers.like(values, name).copy_(values, non_blocking=True)

    @contextlib.contextmanager
    def _stream(self) -> Any:
        """The thread's stream, where the device has such."""
        if self.device.type not in _PINNED:
            yield None
            return
        module = getattr(torch, self.device.type)
        stream = self._local.__dict__.get("stream")
        if stream is None:
            stream = self._local.stream = module.Stream(self.device)
        with module.stream(stream):
            yield stream

    @staticmethod
    def _partial(partial: Partial, values: torch.Tensor, numbers: Sequence[float]) -> list[float] | torch.Tensor:
        """A tile's sums by chunk, or its histogram, in memory."""
        if partial.begin is not None:
            return window_histogram(values, numbers[partial.begin.index], partial.bins).cpu()
        if partial.bins:
            return upper_histogram(values).cpu()
        padded = torch.nn.functional.pad(values, (0, -len(values) % CHUNK))
        sums: list[float] = padded.view(-1, CHUNK).sum(1).tolist()
        return sums


def _travels(dtype: DType) -> torch.dtype:
    """The type in which a result comes back: its own, unless that cuts off what is too large without a trace."""
    return torch.float32 if dtype is DType.F8_E4M3 else TORCH[dtype]


def _computed(operation: Operation, found: dict[int, torch.Tensor], numbers: Sequence[float]) -> torch.Tensor:
    kind = _KINDS[operation.kind]
    first = operation.operands[0]
    plain = operation.name not in _TENSORS_ONLY and not isinstance(first, Number)
    values: list[Any] = []
    for operand in operation.operands:
        if not isinstance(operand, Number):
            values.append(found[operand])
        else:
            values.append(numbers[operand.index] if plain else torch.tensor(numbers[operand.index], dtype=kind))
    if operation.name == "convert":
        return values[0].to(kind)  # type: ignore[no-any-return]
    if operation.name == "round":
        assert operation.dtype is not None
        return values[0].to(TORCH[operation.dtype]).to(kind)  # type: ignore[no-any-return]
    return _FUNCTIONS[operation.name](*values)  # type: ignore[no-any-return]


_TENSORS_ONLY = ("minimum", "maximum", "select", "atan2")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "minimum", "maximum", "lerp")},
    **{name: getattr(torch, name) for name in ("neg", "abs", "sign", *COMPARISONS, *LOGIC, *BY_TORCH)},
    "fma": lambda b, factor, a: torch.add(a, b, alpha=factor),
    "select": torch.where,
}
