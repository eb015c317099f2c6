"""What the passes of a task have found so far, for the passes after them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from remelt.check.program import Apply
from remelt.core.tensor_info import width_of_rows
from remelt.planning.cost import CHUNK, grain
from remelt.recipe.method import ELEMENTS
from remelt.recipe.signature import Prepared, Stage, conclude, reduce_tile

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


def add_chunks(
    sums: dict[str, Any],
    instruction: Apply,
    number: int,
    args: Sequence[Any],
    values: Mapping[str, Any],
    earlier: Mapping[str, Any],
    size: int,
    shape: tuple[int, ...],
    rows: str,
    *,
    batched: bool,
) -> None:
    """Add a tile's partial sums, chunk by chunk: the chunks are the same for any tile size.

    ``number`` is that of the round, ``earlier`` what those before it came to; the tile has ``size`` elements, of a
    tensor of that ``shape``, whose ``rows`` are those of its pass, by the row or ``batched``.
    """
    method, reduction = instruction.method, instruction.reductions[number]
    by_row = method.declaration.cut == "row"
    chunk = grain(shape, rows, sums=True, batched=batched) if by_row else CHUNK
    width = width_of_rows(shape, method.declaration.vectors)
    for first in range(0, max(size, 1), chunk):
        part = [_slice(arg, first, first + chunk) for arg in args]
        named = {name: _slice(value, first, first + chunk) for name, value in values.items()}
        for name, partial in reduce_tile(method, reduction, part, named, earlier, width).items():
            sums[name] = partial if name not in sums else sums[name] + partial


def _slice(value: Any, begin: int, end: int) -> Any:
    """Elements of a tile's tensor; anything else as it is."""
    return value[begin:end] if isinstance(value, torch.Tensor) else value


class Fold:
    """What the slices of a pass have found, to be added in their order: bits depend on no tile and no thread.

    They are added as soon as those before them are there, so that few take memory at a time. Whole numbers, as those of
    histograms, are exact in any order: they are added at once.
    """

    def __init__(self) -> None:
        self._counts: Partials = {}
        self._totals: Partials = {}
        self._parts: dict[int, tuple[int, Partials]] = {}
        """By where a slice begins: where it ends, and what it found."""
        self._next = 0
        self._taken = 0

    def __len__(self) -> int:
        return self._taken

    def add(self, start: int, stop: int, found: Partials) -> None:
        """Take what the slice from an element up to another has found; the first one begins at 0."""
        kept: Partials = {}
        for register, values in found.items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and not value.is_floating_point():
                    counts = self._counts.setdefault(register, {})
                    counts[name] = _more(counts[name], value) if name in counts else value
                else:
                    kept.setdefault(register, {})[name] = value
        self._parts[start] = stop, kept
        self._taken += 1
        while self._next in self._parts:
            self._next, part = self._parts.pop(self._next)
            for register, values in part.items():
                sums = self._totals.setdefault(register, {})
                for name, value in values.items():
                    sums[name] = value if name not in sums else sums[name] + value

    def totals(self) -> Partials:
        """All of it added up, once every slice is there."""
        assert not self._parts, "a slice is missing"
        registers = dict.fromkeys((*self._counts, *self._totals))
        return {one: {**self._counts.get(one, {}), **self._totals.get(one, {})} for one in registers}


@dataclass
class Known:
    """Sums over whole tensors, by register and name, and what methods conclude from theirs."""

    sums: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    conclusions: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    preparations: dict[int, Prepared] = field(default_factory=dict)
    """What methods by row make of their sums, once a tensor."""
    recalled: set[int] = field(default_factory=set)
    """Registers whose sums an earlier merge has found: no pass is due for them."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """For what one thread concludes, and the others wait for."""

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
            with self.lock:
                if register not in self.conclusions:
                    self.conclusions[register] = conclude(instruction.method, self.sums.get(register, {}), values)
        return self.conclusions[register]

    def prepared(self, register: int, make: Callable[[], list[Stage]]) -> Prepared:
        """What a method by row prepares, of which each stage is made once."""
        with self.lock:
            if register not in self.preparations:
                self.preparations[register] = Prepared(make(), self.lock)
            return self.preparations[register]
