"""What the passes of a task have found so far, for the passes after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from remelt.check.program import Apply
from remelt.recipe.method import ELEMENTS
from remelt.recipe.signature import conclude

Partials = dict[int, dict[str, Any]]
"""What a slice adds to the sums of each register with reductions, by name: numbers, or tensors."""


@dataclass(frozen=True)
class Hits:
    """What falls into a histogram of many bins, of which a part of a tensor hits few: where, and how many below it."""

    bins: int
    places: npt.NDArray[np.integer[Any]]
    below: int


def add_part(found: dict[str, Any], name: str, part: Sequence[float] | torch.Tensor | Hits) -> None:
    """Add chunks' sums to those before, one after the other, or the counts of a histogram."""
    if isinstance(part, Hits):
        if name not in found:
            found[name] = torch.zeros(part.bins + 1, dtype=torch.int64)
        counts = found[name].numpy()
        np.add.at(counts, part.places, 1)
        counts[-1] += part.below
        return
    if isinstance(part, torch.Tensor):
        found[name] = _more(found[name], part) if name in found else part
        return
    total = found.get(name, 0.0)
    for value in part:
        total += value
    found[name] = total


def _more(counts: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The counts of two parts: those of one are fewer than fill 32 bits, but not those of all."""
    return (counts.long() if counts.dtype is torch.int32 else counts).add_(part)


class Fold:
    """What the slices of a pass have found, to be added in their order: bits depend on no tile and no thread.

    Whole numbers, as those of histograms, are exact in any order: they are added at once, and take no more memory for
    more slices.
    """

    def __init__(self) -> None:
        self._counts: Partials = {}
        self._parts: dict[int, Partials] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, start: int, found: Partials) -> None:
        """Take what the slice that begins at an element has found."""
        kept: Partials = {}
        for register, values in found.items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and not value.is_floating_point():
                    counts = self._counts.setdefault(register, {})
                    counts[name] = _more(counts[name], value) if name in counts else value
                else:
                    kept.setdefault(register, {})[name] = value
        self._parts[start] = kept

    def totals(self) -> Partials:
        """All of it added up."""
        totals: Partials = {register: dict(counts) for register, counts in self._counts.items()}
        for start in sorted(self._parts):
            for register, found in self._parts[start].items():
                sums = totals.setdefault(register, {})
                for name, value in found.items():
                    sums[name] = value if name not in sums else sums[name] + value
        return totals


@dataclass
class Known:
    """Sums over whole tensors, by register and name, and what methods conclude from theirs."""

    sums: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    conclusions: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    recalled: set[int] = field(default_factory=set)
    """Registers whose sums an earlier merge has found: no pass is due for them."""

    def settle(self, fold: Fold, size: int) -> None:
        """A pass is complete: its sums over a tensor of that many elements, or over a sample of them, are known."""
        for register, found in fold.totals().items():
            sums = {
                name: torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float64)
                for name, value in found.items()
            }
            sums[ELEMENTS] = torch.tensor(size, dtype=torch.float64)
            self.sums.setdefault(register, {}).update(sums)
            self.conclusions.pop(register, None)

    def so_far(self, register: int, instruction: Apply, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a later reduction is given: the sums before it, or what they come to."""
        if instruction.method.declaration.conclusion is None or register not in self.sums:
            return self.sums.get(register, {})
        return self.concluded(register, instruction, values)

    def concluded(self, register: int, instruction: Apply, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the sums of a method come to, found once."""
        if register not in self.conclusions:
            self.conclusions[register] = conclude(instruction.method, self.sums.get(register, {}), values)
        return self.conclusions[register]
