"""Factors of a difference: made of a whole matrix, or of the factors that it is the sum of, which is far cheaper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PART = 2**20
"""Elements that are taken to float64 at a time."""
_OF_PRODUCTS = 1e-15
"""What eigenvalues of products are beside the largest by round-off."""


@dataclass(frozen=True)
class Factors:
    """``up @ down`` in float64, and the squares of the norms of what it stands for and of what it keeps of that."""

    up: Tensor
    down: Tensor
    energy: float
    kept: float

    @property
    def rank(self) -> int:
        """The number of columns of ``up``."""
        return self.up.shape[1]

    @property
    def share(self) -> float:
        """The share of the energy that is kept; all of nothing is kept."""
        return self.kept / self.energy if self.energy > 0.0 else 1.0


def joined(terms: Sequence[tuple[Tensor, Tensor]]) -> Factors:
    """The sum of products of factors as one product, exactly: their ranks add up.

    >>> one = torch.ones(2, 1), torch.ones(1, 3)
    >>> found = joined([one, one])
    >>> found.rank, (found.up @ found.down).tolist()
    (2, [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]])
    """
    up = torch.cat([one.double() for one, _ in terms], 1)
    down = torch.cat([one.double() for _, one in terms], 0)
    energy = float(((up.T @ up) * (down @ down.T)).sum())
    return Factors(up, down, max(energy, 0.0), max(energy, 0.0))


def truncated(terms: Sequence[tuple[Tensor, Tensor]], rank: int | None, energy: float | None) -> Factors:
    """The nearest product of a rank, or of the least rank that keeps a share of the energy, to a sum of products.

    It costs O((m + n) R^2) for ranks that add up to R: both factors are made orthonormal, and what is between them is
    decomposed. Source: QR and SVD of factors; Halko, Martinsson and Tropp 2011, section 5.

    >>> up, down = torch.eye(3)[:, :2] * torch.tensor([2.0, 1.0]), torch.eye(4)[:2]
    >>> found = truncated([(up, down)], 1, None)
    >>> found.rank, round(found.share, 6)
    (1, 0.8)
    """
    whole = joined(terms)
    if not whole.rank or not min(whole.up.shape[0], whole.down.shape[1]):
        return whole
    left, between_left = torch.linalg.qr(whole.up)
    right, between_right = torch.linalg.qr(whole.down.T)
    u, values, vh = torch.linalg.svd(between_left @ between_right.T, full_matrices=False)
    return _cut(left @ u, values, vh @ right.T, rank, energy)


def factors_of(delta: Tensor, rank: int | None, energy: float | None) -> Factors:
    """The nearest product to a matrix, by the products of its rows or columns, whichever are fewer, in float64."""
    wide = delta.shape[0] <= delta.shape[1]
    work = delta if wide else delta.T
    products = gram(work)
    total = float(products.trace())
    squares, vectors = torch.linalg.eigh(products)
    squares, vectors = squares.flip(0).clamp_(min=0.0), vectors.flip(1)
    count = chosen_rank(squares, rank, energy, _OF_PRODUCTS)
    basis = vectors[:, :count]
    across = torch.cat([basis.T @ work[:, part].double() for part in _parts(work)], 1)
    kept = float(across.square().sum())
    roots = across.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    one, other = basis * roots, across / roots[:, None]
    up, down = (one, other) if wide else (other.T, one.T)
    return Factors(up, down, total, min(kept, total))


def gram(work: Tensor) -> Tensor:
    """The products of a matrix' rows, in float64."""
    products = torch.zeros(len(work), len(work), dtype=torch.float64, device=work.device)
    for part in _parts(work):
        columns = work[:, part].double()
        products.addmm_(columns, columns.T)
    return products


def chosen_rank(squares: Tensor, rank: int | None, energy: float | None, nothing: float = 1e-26) -> int:
    """How many of the squares of singular values, the largest first, are kept: so many, or the least for a share.

    One at least, where there is any; never one whose share of the first is ``nothing`` but round-off.
    """
    if not len(squares) or not float(squares[0]) > 0.0:
        return min(len(squares), 1)
    real = int((squares > squares[0] * nothing).sum())
    count = real if rank is None else min(rank, real)
    if energy is not None:
        ends = squares.cumsum(0)
        count = min(count, int((ends < energy * ends[-1] * (1.0 - 1e-15)).sum()) + 1)
    return max(count, 1)


def _cut(left: Tensor, values: Tensor, right: Tensor, rank: int | None, energy: float | None) -> Factors:
    """The leading part of a decomposition, its weight shared by both factors."""
    squares = values.square()
    count = chosen_rank(squares, rank, energy)
    roots = values[:count].sqrt()
    kept = float(squares[:count].sum())
    return Factors(left[:, :count] * roots, roots[:, None] * right[:count], float(squares.sum()), kept)


def _parts(work: Tensor) -> list[slice]:
    """Columns by the part."""
    step = max(_PART // max(len(work), 1), 256)
    return [slice(begin, begin + step) for begin in range(0, work.shape[1], step)]


def nearest_factor(size: int, wanted: int) -> int:
    """The smaller of the two sides that LyCORIS divides a size into, by its ``factor``; -1 is for nearly equal ones.

    It is the factor itself, or its counterpart, where that divides the size; else the largest divisor below it.

    >>> nearest_factor(12, -1), nearest_factor(320, 8), nearest_factor(12, 5), nearest_factor(12, 6)
    (3, 8, 3, 2)
    """
    if wanted > 0 and size % wanted == 0:
        return min(wanted, size // wanted)
    most = min(math.isqrt(size), wanted if wanted > 0 else size)
    return max((divisor for divisor in range(1, most + 1) if size % divisor == 0), default=1)
