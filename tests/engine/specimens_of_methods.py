"""Methods of every cut, for tests: each is simple enough that its result is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remelt.core.random import Random
from remelt.core.tensor_info import TensorInfo
from remelt.recipe.method import Group, Integer, Number, Same, Sums, Tensors, merge_method


@merge_method(cut="element")
def random_choice(a: Same, b: Same, *, probability: Number = 0.5, seed: Integer = 0, random: Random) -> Same:
    """Each element from ``b`` with a probability, else from ``a``."""
    drawn = torch.from_numpy(random.uniform())
    return torch.where(drawn.view(a.shape) < probability, b, a)


@merge_method(cut="tensor", workspace=1.0)
def sort_rows(a: Same) -> Same:
    """The rows in order: needs whole tensors."""
    return a.sort(dim=0).values if a.dim() else a


def total(a: Tensor) -> Mapping[str, Tensor]:
    return {"total": a.double().sum(), "count": torch.tensor(float(a.numel()), dtype=torch.float64)}


def deviation(a: Tensor, *, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"squares": ((a.double() - sums["total"] / sums["count"]) ** 2).sum()}


@merge_method(cut="element", reductions=(total, deviation))
def standardise(a: Same, *, sums: Sums) -> Same:
    """Mean 0 and deviation 1 over the whole tensor: two rounds of sums."""
    mean = sums["total"] / sums["count"]
    deviation = float((sums["squares"] / sums["count"]).sqrt())
    return (a - float(mean)) / (deviation or 1.0)


def _pairs(layout: Mapping[str, TensorInfo]) -> Sequence[Group]:
    return [
        Group((key, key.replace("left", "right")), (key, key.replace("left", "right")))
        for key in layout
        if "left" in key
    ]


@merge_method(cut="model", keys=_pairs)
def swap_sides(a: Tensors) -> Tensors:
    """``left`` and ``right`` exchanged."""
    (left, x), (right, y) = a.items()
    return {left: y, right: x}


ALL: dict[str, Any] = {method.name: method for method in (random_choice, sort_rows, standardise, swap_sides)}
