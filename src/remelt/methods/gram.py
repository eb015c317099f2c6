"""What methods of several operands know of them: their products or distances, as sums over the whole tensor.

Where every step of a method is a sum of multiples of its operands, their products say all of it: the method works on
as many numbers as there are operands, and the tensors are read twice, however many steps it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from remelt.recipe.method import Bindings

Floats = npt.NDArray[np.float64]

_ROUND_OFF = 1e-14
"""What a sum of some shares may be from 1 by round-off alone."""


def dots(*models: Tensor) -> Mapping[str, Tensor]:
    """Partial sums of a tile: the product of each two operands, and of each with itself, in float64.

    >>> from torch import tensor
    >>> {name: float(value) for name, value in dots(tensor([1.0, 2.0]), tensor([3.0, 0.0])).items()}
    {'dot0_0': 5.0, 'dot0_1': 3.0, 'dot1_1': 9.0}
    """
    found = {}
    for i, model in enumerate(models):
        x = model.double().flatten()
        for j in range(i, len(models)):
            found[f"dot{i}_{j}"] = (x * (x if i == j else models[j].double().flatten())).sum()
    return found


def distances(*models: Tensor) -> Mapping[str, Tensor]:
    """Partial sums of a tile: the squared distance of each two operands, in float64.

    Each is exact to round-off, however near to each other or far from the others the two are.

    >>> from torch import tensor
    >>> {name: float(value) for name, value in distances(tensor([1.0, 2.0]), tensor([3.0, 0.0])).items()}
    {'apart0_1': 8.0}
    """
    found = {}
    for i, model in enumerate(models):
        x = model.double().flatten()
        for j in range(i + 1, len(models)):
            way = models[j].double().flatten() - x
            found[f"apart{i}_{j}"] = (way * way).sum()
    return found


def are_several(values: Bindings) -> bool:
    """Whether there is more than one operand, from a list of numbers for each of them: else nothing is summed up."""
    weights = values.get("weights")
    return not isinstance(weights, tuple) or len(weights) > 1


def matrix(sums: Mapping[str, float], name: str, count: int) -> Floats:
    """The sums ``name0_0``, ``name0_1`` and so on as a symmetric matrix; those that are not there are 0.

    >>> matrix({"apart0_1": 8.0}, "apart", 2).tolist()
    [[0.0, 8.0], [8.0, 0.0]]
    """
    found = np.zeros((count, count))
    for i in range(count):
        for j in range(i, count):
            found[i, j] = found[j, i] = sums.get(f"{name}{i}_{j}", 0.0)
    return found


def norms_and_cosines(products: Floats) -> tuple[Floats, Floats]:
    """The norm of each operand and the cosine between each two: 0 where one of them is zero.

    >>> norms_and_cosines(np.array([[4.0, 3.0], [3.0, 9.0]]))[1].tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    with np.errstate(all="ignore"):
        norms = np.sqrt(products.diagonal())
        both = np.outer(norms, norms)
        cosines = np.where(both > 0.0, np.clip(products / both, -1.0, 1.0), 0.0)
    np.fill_diagonal(cosines, np.where(norms > 0.0, 1.0, 0.0))
    return norms, cosines


def fractions(weights: Sequence[float] | Floats) -> Floats:
    """Weights divided by their sum; equal ones where they cancel out, which no number can make a sum of 1.

    >>> fractions((1.0, 3.0)).tolist(), fractions((1.0, -1.0)).tolist()
    ([0.25, 0.75], [0.5, 0.5])
    """
    given = np.array(weights, dtype=np.float64)
    total = given.sum()
    if not math.isfinite(total) or abs(total) <= 1e-12 * np.abs(given).sum():
        return np.full(len(given), 1.0 / len(given))
    fair: Floats = given / total
    return fair


def mixture(shares: Floats, otherwise: Floats, *, near: bool) -> Mapping[str, float]:
    """Shares of operands as numbers for `mixed`. ``otherwise`` stands for shares that are not finite.

    Operands that are ``near`` to each other are better told as a multiple of the first, ``start``, and of the way from
    it to each other one, ``way1`` and so on: what they have in common is then not rounded again. ``near`` is 1 there,
    else 0.

    >>> mixture(np.array([0.5, 1.0]), np.array([0.5, 0.5]), near=True)
    {'start': 1.5, 'near': 1.0, 'way1': 1.0}
    """
    chosen = shares if np.isfinite(shares).all() else otherwise
    start = math.fsum(chosen) if near else float(chosen[0])
    if abs(start - 1.0) <= _ROUND_OFF:
        start = 1.0  # equal operands then give their own bits
    return {"start": start, "near": float(near)} | {
        f"way{place}": float(chosen[place]) for place in range(1, len(chosen))
    }


def mixed(models: Sequence[Tensor], numbers: Mapping[str, Any]) -> Tensor:
    """The sum of the operands' multiples that a `mixture` tells."""
    if len(models) == 1:
        return models[0].clone()
    total: Tensor = models[0] * numbers["start"]
    common = models[0] * numbers["near"]
    for place in range(1, len(models)):
        total += (models[place] - common).mul_(numbers[f"way{place}"])
    return total
