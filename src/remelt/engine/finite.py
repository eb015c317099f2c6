"""NaN and infinities: found in passing, told by key, and settled by policy."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Literal

import torch

HIGHEST_E4M3 = 464.0
"""The largest number that rounds to one of F8_E4M3, 448: what is larger becomes that, and no infinity."""

NonFinite = Literal["error", "keep", "missing"]


def is_finite(values: torch.Tensor) -> bool:
    """Whether every element is finite.

    A sum is finite unless an element is not, or it overflows: only then are the elements looked at one by one, which
    costs more than a merge.
    """
    if values.numel() == 0:
        return True
    if values.element_size() == 1:
        values = values.float()
    if math.isfinite(values.sum(dtype=torch.float32 if values.element_size() == 2 else None).item()):
        return True
    return bool(torch.isfinite(values).all())


def overflows(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether storing values in a type cuts them off without making them infinite."""
    return dtype is torch.float8_e4m3fn and values.numel() > 0 and bool(values.abs().max() > HIGHEST_E4M3)


@dataclass
class FiniteReport:
    """Keys with NaN or infinities, by the input that holds them; and results that overflowed their element type."""

    inputs: dict[str, set[str]] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
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

    def describe(self) -> list[str]:
        """One line for each input and each result, keys in order."""
        lines = [
            f"{label}: NaN or infinity in {len(keys)} tensor{'s' if len(keys) != 1 else ''}: {', '.join(sorted(keys))}"
            for label, keys in sorted(self.inputs.items())
        ]
        lines += [f"result: {key} overflows {dtype}" for key, dtype in sorted(self.results.items())]
        lines += [f"result: {key} taken from {label}" for key, label in sorted(self.replaced.items())]
        return lines
