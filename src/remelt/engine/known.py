"""What the passes of a task have found so far, for the passes after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from remelt.check.program import Apply
from remelt.recipe.signature import conclude

Partials = dict[int, dict[str, Any]]
"""What a slice adds to the sums of each register with reductions, by name: numbers, or tensors."""


@dataclass
class Known:
    """Sums over whole tensors, by register and name, and what methods conclude from theirs."""

    sums: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    conclusions: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def settle(self, parts: Sequence[Partials]) -> None:
        """Add what the slices of a pass have found, in their order: bits depend on no tile and no thread."""
        totals: Partials = {}
        for part in parts:
            for register, found in part.items():
                sums = totals.setdefault(register, {})
                for name, value in found.items():
                    sums[name] = value if name not in sums else sums[name] + value
        for register, found in totals.items():
            sums = {
                name: torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float64)
                for name, value in found.items()
            }
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
