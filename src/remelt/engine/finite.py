"""NaN and infinities: found in passing, told by key, and settled by policy."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

HIGHEST_E4M3 = 464.0
"""The largest number that rounds to one of F8_E4M3, 448: what is larger becomes that, and no infinity."""

_MOST = 0.5
"""Share of what a merge changes in a tensor from which on its loss is told."""
_SHOWN = 5

NonFinite = Literal["error", "keep", "missing"]


_LIMITS: dict[torch.dtype, tuple[type[np.signedinteger[Any]], type[np.unsignedinteger[Any]], int]] = {
    torch.float64: (np.int64, np.uint64, 0x7FF0000000000000),
    torch.float32: (np.int32, np.uint32, 0x7F800000),
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
    torch.float8_e5m2: (np.int8, np.uint8, 0x7C),
    torch.float8_e4m3fn: (np.int8, np.uint8, 0x7F),
}
"""For each type its bits as integers with and without sign, and the bits of the lowest value that is not finite."""


def is_finite(values: torch.Tensor) -> bool:
    """Whether every element is finite.

    Taken for integers, the bits of what is not finite are the largest: among positive numbers of integers with a sign,
    among negative ones of those without. Both maxima cost a tenth of looking at each element.
    """
    if values.numel() == 0 or not values.is_floating_point():
        return True
    signed, unsigned, limit = _LIMITS[values.dtype]
    if values.device.type != "cpu" or not values.is_contiguous():
        return bool(torch.isfinite(values.float() if values.element_size() == 1 else values).all())
    bits = values.detach().view(-1).view(torch.uint8).numpy()
    return bool(bits.view(signed).max() < limit and bits.view(unsigned).max() < limit + np.iinfo(signed).max + 1)


def overflows(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether storing values in a type cuts them off without making them infinite."""
    return dtype is torch.float8_e4m3fn and values.numel() > 0 and bool(values.abs().max() > HIGHEST_E4M3)


def with_infinities(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """What was rounded to F8_E4M3, with infinities for what that type cuts off: they are found wherever they go."""
    return torch.where(values.abs() > HIGHEST_E4M3, values * torch.inf, rounded)


@dataclass
class FiniteReport:
    """Keys with NaN or infinities, by the input that holds them; and results that overflowed their element type."""

    inputs: dict[str, set[str]] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    steps: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of results in few bits, how many elements the merge changes, and how many of these by less than half a step."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_input(self, label: str, key: str) -> None:
        """An input's tensor is not finite."""
        with self._lock:
            self.inputs.setdefault(label, set()).add(key)

    def add_result(self, key: str, dtype: str) -> None:
        """A result is not finite though its inputs are."""
        with self._lock:
            self.results[key] = dtype

    def add_replaced(self, key: str, label: str) -> None:
        """A result was taken from one input because another's tensor is not finite."""
        with self._lock:
            self.replaced[key] = label

    def add_lost(self, key: str, changed: int, lost: int) -> None:
        """So many elements of a part of a result are changed, and so many by less than half a step of its numbers."""
        with self._lock:
            before = self.steps.get(key, (0, 0))
            self.steps[key] = before[0] + changed, before[1] + lost

    def describe(self) -> list[str]:
        """One line for each input and each result, keys in order."""
        lines = [
            f"{label}: NaN or infinity in {len(keys)} tensor{'s' if len(keys) != 1 else ''}: {', '.join(sorted(keys))}"
            for label, keys in sorted(self.inputs.items())
        ]
        lines += [f"result: {key} overflows {dtype}" for key, dtype in sorted(self.results.items())]
        shares = {key: lost / changed for key, (changed, lost) in self.steps.items() if lost > _MOST * changed}
        if shares:
            worst = sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))
            named = ", ".join(f"{key} ({share:.0%})" for key, share in worst[:_SHOWN])
            more = f" and {len(worst) - _SHOWN} more" if len(worst) > _SHOWN else ""
            lines.append(
                f"result: most of what the merge changes is less than half a step of the numbers stored, and lost, in "
                f"{len(worst)} tensor{'s' if len(worst) != 1 else ''}: {named}{more}; --dtype bf16 keeps it"
            )
        lines += [f"result: {key} taken from {label}" for key, label in sorted(self.replaced.items())]
        return lines
