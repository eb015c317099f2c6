"""Differences as factors, as steps of the engine: what a task for one weight computes in the place of the weight.

They are declared as merge methods, so that a plan counts their memory and their time, but no recipe can name them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remelt.adapters.factors import factors_of, gram, nearest_factor
from remelt.recipe.method import Bindings, Delta, Integer, Method, merge_method


def matrix_sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix: outputs, and everything else."""
    return (shape[0], math.prod(shape[1:])) if shape else (0, 0)


def _work(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """As `truncate_rank` has it."""
    sides = matrix_sides(shapes[0])
    return 2.5 * min(sides) ** 3 + 0.4 * min(sides) ** 2 * max(sides)


def _workspace(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """Bytes that it holds: matrices of the smaller side, and the factors."""
    sides = matrix_sides(shapes[0])
    rank = min(int(values.get("rank", min(sides))), min(sides))
    return 8.0 * (5.0 * min(sides) ** 2 + 4.0 * max(2**20, 256 * min(sides)) + 4.0 * rank * sum(sides))


@merge_method(cut="tensor", work=_work, workspace=_workspace)
def measured(delta: Delta) -> Delta:
    """The squares of the singular values of a weight as a matrix, the largest first."""
    return _squares(delta.flatten(1))


def _squares(rows: Tensor) -> Delta:
    squares = torch.linalg.eigvalsh(gram(rows if rows.shape[0] <= rows.shape[1] else rows.T))
    found: Any = {"squares": squares.flip(0).clamp_(min=0.0)}
    return found  # type: ignore[no-any-return]


@merge_method(cut="tensor", workspace=2.0)
def squared(delta: Delta) -> Delta:
    """The square of a tensor's norm."""
    found: Any = {"square": delta.double().square().sum()}
    return found  # type: ignore[no-any-return]


@merge_method(cut="tensor", work=_work, workspace=_workspace)
def lora_factors(delta: Delta, *, rank: Integer, alpha: Integer = 0) -> Delta:
    """The factors of the nearest difference of a rank, as a LoRA's parts.

    With an ``alpha`` they are larger, as loaders multiply their product by alpha over rank; by default it is the rank.
    """
    found = factors_of(delta.flatten(1), rank, None)
    kernel = delta.shape[2:]
    weight = math.sqrt(rank / alpha) if alpha else 1.0
    up, down = _padded(found.up, rank) * weight, _padded(found.down.T, rank).T * weight
    parts: Any = {
        "up": up.reshape(up.shape[0], rank, *(1 for _ in kernel)),
        "down": down.reshape(rank, *delta.shape[1:]),
        "alpha": torch.tensor(float(alpha or rank)),
    }
    return parts  # type: ignore[no-any-return]


def _padded(columns: Tensor, rank: int) -> Tensor:
    """As many columns as a rank asks for, where there are fewer: of zeros."""
    missing = rank - columns.shape[1]
    return columns if missing <= 0 else torch.cat((columns, columns.new_zeros(columns.shape[0], missing)), 1)


ALPHA = 1
"""Of every module that has an alpha: trainers give all the same, and diffusers loses one that differs from others."""


def lora_shapes(shape: Sequence[int], rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a LoRA's parts for a weight of that shape."""
    ones = tuple(1 for _ in shape[2:])
    return {"up": (shape[0], rank, *ones), "down": (rank, *shape[1:]), "alpha": ()}


def _kron_work(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    one, other = (math.prod(part) for part in lokr_shapes(shapes[0], int(values.get("factor", -1))).values())
    return 2.5 * min(one, other) ** 3 + 0.4 * min(one, other) ** 2 * max(one, other)


def _kron_workspace(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    one, other = (math.prod(part) for part in lokr_shapes(shapes[0], int(values.get("factor", -1))).values())
    return 8.0 * (2.0 * math.prod(shapes[0]) + 5.0 * min(one, other) ** 2 + 4.0 * max(2**20, 256 * min(one, other)))


@merge_method(cut="tensor", work=_kron_work, workspace=_kron_workspace)
def lokr_factors(delta: Delta, *, factor: Integer = -1) -> Delta:
    """The two matrices whose Kronecker product is nearest to a difference, as a LoKr's parts."""
    shapes = lokr_shapes(delta.shape, factor)
    found = factors_of(_rearranged(delta, factor), 1, None)
    parts: Any = {
        "w1": found.up.reshape(shapes["w1"]),
        "w2": found.down.reshape(shapes["w2"]),
        "alpha": torch.tensor(1.0),  # it does not count where both are whole, but LyCORIS asks for one
    }
    return parts  # type: ignore[no-any-return]


@merge_method(cut="tensor", work=_kron_work, workspace=_kron_workspace)
def measured_kronecker(delta: Delta, *, factor: Integer = -1) -> Delta:
    """Squares of which the first is what the nearest Kronecker product keeps of a difference, and all are its own."""
    return _squares(_rearranged(delta, factor))


def _rearranged(delta: Tensor, factor: int) -> Tensor:
    """A difference with a row for each of its blocks: a Kronecker product is of rank 1 there.

    Source: Van Loan and Pitsianis 1993, *Approximation with Kronecker products*.
    """
    shapes = lokr_shapes(delta.shape, factor)
    (rows, columns), inner = shapes["w1"], shapes["w2"]
    split = delta.reshape(rows, inner[0], columns, inner[1], -1).transpose(1, 2)
    return split.reshape(rows * columns, -1)


def lokr_shapes(shape: Sequence[int], factor: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a LoKr's parts: the first is of the divisors nearest to the factor.

    >>> lokr_shapes((320, 320, 3, 3), 8)
    {'w1': (8, 8), 'w2': (40, 40, 3, 3)}
    """
    rows, columns = nearest_factor(shape[0], factor), nearest_factor(shape[1], factor)
    return {"w1": (rows, columns), "w2": (shape[0] // rows, shape[1] // columns, *shape[2:])}


METHODS: Mapping[str, Method[..., Any]] = {"lora": lora_factors, "lokr": lokr_factors}
MEASURES: Mapping[str, Method[..., Any]] = {"lora": measured, "lokr": measured_kronecker}
"""What is measured before: the squares of which an adapter keeps the first ones."""


def squares_count(kind: str, shape: Sequence[int], factor: int) -> int:
    """How many squares are measured of a weight of that shape."""
    sides = matrix_sides(shape) if kind == "lora" else [math.prod(one) for one in lokr_shapes(shape, factor).values()]
    return min(sides)
