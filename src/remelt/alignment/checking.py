"""Whether a specification holds: by the shapes of tensors, and by running a small model with random permutations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from remelt.alignment.permutation import permuted, random_permutation
from remelt.archs.axis_groups import AxisGroup, Shapes, faults
from remelt.errors import RefusedError

TOLERANCE = 1e-10
"""The relative change of the outputs that rounding explains in float64; a wrong window changes them by far more."""
_SHOWN = 5

Tensors = Mapping[str, torch.Tensor]
Function = Callable[[Tensors], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class CheckReport:
    """How much random permutations changed what a model computes: relative errors, the largest of all outputs.

    ``alone`` has one for every group that may be permuted, ``together`` is that of all of them at once.
    """

    alone: Mapping[str, float]
    together: float
    tolerance: float = TOLERANCE

    @property
    def worst(self) -> tuple[str, float]:
        """The group that changed the outputs most, by itself; an empty name where none was tried."""
        return max(self.alone.items(), key=lambda one: one[1], default=("", 0.0))

    @property
    def broken(self) -> tuple[str, ...]:
        """The groups that by themselves change the outputs, the worst first."""
        wrong = {name: error for name, error in self.alone.items() if error > self.tolerance}
        return tuple(sorted(wrong, key=lambda name: -wrong[name]))

    @property
    def passed(self) -> bool:
        """Whether nothing changed what the model computes."""
        return not self.broken and self.together <= self.tolerance


def check_numerically(
    groups: Iterable[AxisGroup],
    tensors: Tensors,
    function: Function,
    seed: int = 0,
    *,
    alone: bool = True,
    tolerance: float = TOLERANCE,
) -> CheckReport:
    """Permute a small model at random, in float64, and compare what it computes.

    Each group is permuted by itself (unless ``alone`` is false), then all of them at once. Groups that cross two
    components are permuted, too: the model has to hold both.
    """
    exact = {key: one.double() if one.is_floating_point() else one for key, one in tensors.items()}
    before = function(exact)
    tried = [group for group in groups if not group.is_fixed]
    permutations = [
        random_permutation(group, np.random.default_rng((seed, place))) for place, group in enumerate(tried)
    ]
    found = {}
    for one in permutations if alone else ():
        found[one.group.name] = _error(before, function(permuted(exact, [one])))
    together = _error(before, function(permuted(exact, permutations)))
    return CheckReport(found, together, tolerance)


def check_statically(name: str, groups: Iterable[AxisGroup], shapes: Shapes) -> None:
    """Refuse a specification of the model ``name`` with windows out of bounds or twice, or without some elements.

    Raises `RefusedError`, with the first of the faults.
    """
    found = list(faults(groups, shapes))
    if found:
        raise _refusal(name, found, "a model whose parts are not all known cannot be aligned; nothing was written")


def check_specification(
    name: str, groups: Sequence[AxisGroup], tensors: Tensors, function: Function, seed: int = 0
) -> CheckReport:
    """Both checks on a small model; `RefusedError` names what fails, else the report says how close it was."""
    check_statically(name, groups, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    report = check_numerically(groups, tensors, function, seed)
    if not report.passed:
        said = [f"{group} changes the outputs by {report.alone[group]:.1e}" for group in report.broken]
        said = said or [f"all groups at once change the outputs by {report.together:.1e}"]
        raise _refusal(name, said, f"permutations may change them by {report.tolerance:.0e} at most")
    return report


def _refusal(name: str, found: Sequence[str], hint: str) -> RefusedError:
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return RefusedError(f"the axis groups of {name} fail their check: {'; '.join(found[:_SHOWN])}{more}", hint=hint)


def _error(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """The largest relative error of any output; infinity where one is not finite, or nothing."""
    errors = [
        float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(one))
        for one, other in zip(before, after, strict=True)
    ]
    return max((error if math.isfinite(error) else math.inf for error in errors), default=math.inf)
