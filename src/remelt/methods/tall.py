"""Tall matrices, streamed by rows: what is found of them are sums of products over their rows.

The methods here make the calls of those of the same names where an operand is far higher than wide, as embeddings are:
then it need not be held whole. They are not registered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remelt.core.random import Random
from remelt.core.tensor_info import batch_of_rows, width_of_rows
from remelt.methods.turning import frames_of, move, planes_between, turns
from remelt.recipe.method import (
    Bindings,
    Delta,
    Integer,
    Method,
    Number,
    Prepared,
    Reduction,
    Same,
    Sums,
    Text,
    merge_method,
)

_TALL = 4
"""How many times higher than wide a matrix is that is streamed: the products are small beside it then."""


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """The smaller and the greater side of a tensor's matrix; none if it has none.

    >>> sides((320, 4, 3, 3)), sides((7,))
    ((36, 320), (0, 0))
    """
    if len(shape) < 2 or not math.prod(shape):
        return 0, 0
    both = (shape[0], math.prod(shape[1:]))
    return min(both), max(both)


def rank_of(full: int, rank: int, share: float) -> int:
    """The rank that is asked for, of a matrix whose full one is given: a number, or a share of that.

    >>> rank_of(100, 8, 0.0), rank_of(100, 8, 0.25)
    (8, 25)
    """
    return max(round(full * share) if share > 0.0 else rank, 0)


def columns_of(shape: Sequence[int], values: Bindings) -> int:
    """Columns of the random numbers: as many as the rank, and some more; 0 where another way is taken."""
    least, _ = sides(shape)
    rank, share, more = (values.get(name, 0) for name in ("rank", "share", "oversampling"))
    columns = rank_of(least, rank, share) + max(int(more), 0)
    return 0 if 2 * columns >= least else columns


def _is_tall(shape: Sequence[int], vectors: str = "row") -> bool:
    width = width_of_rows(shape, vectors)
    return len(shape) > 1 and width > 1 and math.prod(shape) >= _TALL * width * width


def _batch_bytes(width: int, copies: int) -> float:
    """What copies of a batch of rows take in float64."""
    return 8.0 * copies * width * batch_of_rows(width)


def _products_of_rows(delta: Tensor) -> Mapping[str, Tensor]:
    rows = delta.double()
    return {"products": rows.T @ rows}


def _directions(sums: Mapping[str, Any]) -> Mapping[str, Any]:
    """The directions of the width, those of the largest singular values last; none where products are not finite."""
    products = sums["products"]
    return {"vectors": torch.linalg.eigh(products).eigenvectors} if bool(products.isfinite().all()) else {}


def _within(delta: Tensor, basis: Tensor) -> Tensor:
    """Rows within the directions of an orthonormal basis, its columns."""
    here = basis.to(delta.device)
    within: Tensor = (delta.double() @ here @ here.T).to(delta.dtype)
    return within


def _nearest(delta: Tensor, rank: int, share: float, sums: Mapping[str, Any]) -> Tensor:
    full = delta.shape[1]
    kept = rank_of(full, rank, share)
    return delta if kept >= full or "vectors" not in sums else _within(delta, sums["vectors"][:, full - kept :])


def _squares(shape: tuple[int, ...]) -> int:
    return 8 * width_of_rows(shape) ** 2


def _truncation_bytes(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    width = width_of_rows(shapes[0])
    return 8.0 * 5.0 * width**2 + _batch_bytes(width, 3)


def work_by_products(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """Operations of truncating by the products of the smaller side, as those of one thread that makes 10^10 a second.

    >>> work_by_products([(10, 100)], {})
    6500.0
    """
    least, most = sides(shapes[0])
    return 2.5 * least**3 + 0.4 * least**2 * most


_BY_PRODUCTS: dict[str, Any] = {
    "cut": "row",
    "batched": True,
    "reductions": (_products_of_rows,),
    "conclusion": _directions,
    "held": _squares,
    "workspace": _truncation_bytes,
    "work": work_by_products,
}


@merge_method(**_BY_PRODUCTS, name="truncate_rank", faster="truncate_rank_randomised")
def _truncate_tall(delta: Delta, *, rank: Integer = 8, share: Number = 0.0, method: Text = "gram", sums: Sums) -> Delta:
    """Rows within the directions of the largest singular values. Formula: D V V^T, with V of the sum of d^T d."""
    return _nearest(delta, rank, share, sums)


@merge_method(**_BY_PRODUCTS, name="truncate_rank_randomised", faster="a lower rank")
def _truncate_tall_exactly(
    delta: Delta,
    *,
    rank: Integer = 8,
    share: Number = 0.0,
    iterations: Integer = 4,
    oversampling: Integer = 8,
    seed: Integer = 0,
    sums: Sums,
) -> Delta:
    """The same, where the rank is too large a share of the full one for random numbers to help. Formula: D V V^T."""
    return _nearest(delta, rank, share, sums)


def streamed_truncation(shapes: Sequence[tuple[int, ...]], values: Bindings) -> Method[..., Any] | None:
    """What truncates a tall matrix by rows, unless the rank leaves nothing to be found or another way is asked for."""
    if not _is_tall(shapes[0]) or values.get("method") != "gram" or _is_plain(shapes[0], values):
        return None
    return _truncate_tall


def _is_plain(shape: Sequence[int], values: Bindings) -> bool:
    """Whether the rank is known to be none, or the full one."""
    least, _ = sides(shape)
    known = {"rank", "share"} <= values.keys()
    return known and not 0 < rank_of(least, values["rank"], values["share"]) < least


@functools.lru_cache(maxsize=4)
def _drawn(seed: int, width: int, columns: int) -> Tensor:
    """Random directions: the same numbers serve all keys of a size."""
    numbers = Random(seed, "truncate_rank_randomised", "", 0, width * columns).uniform() - 0.5
    return torch.from_numpy(numbers).double().reshape(width, columns)


def _image(
    delta: Tensor, *, rank: int, share: float, oversampling: int, seed: int, sums: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """What rows add to the products of the matrix with its own products with a basis."""
    width = delta.shape[1]
    columns = min(rank_of(width, rank, share) + max(oversampling, 0), width)
    basis = (sums["basis"] if "basis" in sums else _drawn(seed, width, columns)).to(delta.device)
    rows = delta.double()
    return {"image": rows.T @ (rows @ basis)}


def _products_within(delta: Tensor, *, sums: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """What rows add to the products within the basis that was found."""
    within = delta.double() @ sums["basis"].to(delta.device)
    return {"products": within.T @ within}


def _basis(sums: Mapping[str, Any], *, rank: int, share: float) -> Mapping[str, Any]:
    """An orthonormal basis of the last image; once the products within it are known, of its best directions."""
    image = sums["image"]
    if not bool(image.isfinite().all()):
        return {"basis": torch.zeros_like(image), "finite": 0.0}
    basis = torch.linalg.qr(image).Q
    if "products" not in sums:
        return {"basis": basis, "finite": 1.0}
    kept = rank_of(len(image), rank, share)
    best = torch.linalg.eigh(torch.as_tensor(sums["products"]).reshape(basis.shape[1], -1)).eigenvectors
    return {"basis": basis @ best[:, basis.shape[1] - kept :], "finite": 1.0}


def _rounds(values: Bindings) -> Sequence[Reduction]:
    return (*[Reduction(_image)] * (int(values["iterations"]) + 1), Reduction(_products_within))


def _columns_bytes(shape: tuple[int, ...]) -> int:
    return 8 * width_of_rows(shape) * (width_of_rows(shape) // 2)


def _range_bytes(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    width = width_of_rows(shapes[0])
    known = {"rank", "share", "oversampling"} <= values.keys()
    columns = columns_of(shapes[0], values) if known else width // 2
    return 8.0 * 6.0 * width * columns + _batch_bytes(width, 3)


def _range_work(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    least, most = sides(shapes[0])
    columns = columns_of(shapes[0], values) or least // 2
    return (4.0 + 2.0 * float(values.get("iterations", 4))) * 0.5 * least * most * columns + 8.0 * least * columns**2


@merge_method(
    cut="row",
    batched=True,
    name="truncate_rank_randomised",
    reductions=(_image, _products_within),
    reduces=_rounds,
    conclusion=_basis,
    held=_columns_bytes,
    work=_range_work,
    faster="a lower rank",
    workspace=_range_bytes,
)
def _truncate_tall_randomised(
    delta: Delta,
    *,
    rank: Integer = 8,
    share: Number = 0.0,
    iterations: Integer = 4,
    oversampling: Integer = 8,
    seed: Integer = 0,
    sums: Sums,
) -> Delta:
    """Rows within a basis found at random. Formula: D Q Q^T, with Q the best of (D^T D)^(iterations + 1) R."""
    return _within(delta, sums["basis"]) if sums["finite"] else delta


def streamed_range(shapes: Sequence[tuple[int, ...]], values: Bindings) -> Method[..., Any] | None:
    """What truncates a tall matrix by rows with random numbers, where the rank is known to be a small share."""
    if not _is_tall(shapes[0]) or not {"rank", "share"} <= values.keys() or _is_plain(shapes[0], values):
        return None
    return _truncate_tall_randomised if columns_of(shapes[0], values) else _truncate_tall_exactly


def _sums_of_rows(a: Tensor, b: Tensor) -> Mapping[str, Tensor]:
    return {"sum_a": a.sum(0, dtype=torch.float64), "sum_b": b.sum(0, dtype=torch.float64)}


def _products_of_both(a: Tensor, b: Tensor, *, centralization: float, sums: Mapping[str, Any]) -> Mapping[str, Tensor]:
    one, other = a.double(), b.double()
    if centralization:
        one, other = one - sums["start_a"].to(a.device), other - sums["start_b"].to(a.device)
    return {"products": one.T @ other}


def _frames(sums: Mapping[str, Any], *, centralization: float) -> Mapping[str, Any]:
    """What is taken from the rows of each matrix, and the frames between which they turn, unless not finite."""
    found: dict[str, Any] = {}
    if centralization:
        share = centralization * len(sums["sum_a"]) / sums["elements"]
        found = {"start_a": sums["sum_a"] * share, "start_b": sums["sum_b"] * share}
    products = sums.get("products")
    if products is None or not bool(products.isfinite().all()):
        return found
    if not centralization:
        found = {"start_a": torch.zeros(len(products)).to(products), "start_b": torch.zeros(len(products)).to(products)}
    here, there = frames_of(products)
    return {**found, "here": here, "there": there}


def _rounds_of_rotation(values: Bindings) -> Sequence[Reduction]:
    means = () if values.get("centralization") == 0.0 else (Reduction(_sums_of_rows),)
    return (*means, Reduction(_products_of_both))


def _planes(*, sums: Mapping[str, Any]) -> Mapping[str, Tensor]:
    return planes_between(sums["here"], sums["there"]) if "here" in sums else {}


def _turns(
    *, sums: Mapping[str, Any], prepared: Mapping[str, Tensor], alignment: float, alpha: float
) -> Mapping[str, Tensor]:
    """How rows of both matrices move."""
    if "here" not in sums:
        return {}
    onwards, back, basis = turns(sums["here"], sums["there"], prepared, alignment, alpha)
    found = {"onwards": onwards, "back": back, "within": basis}
    return {name: one for name, one in found.items() if one is not None}


def _both_squares(shape: tuple[int, ...]) -> int:
    """What the sums take for each of two operands."""
    width = width_of_rows(shape, "kernel")
    return 8 * width**2 // 2 + 8 * width


def _rotation_bytes(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    width = width_of_rows(shapes[0], "kernel")
    return 8.0 * (16.0 * width**2 + 8.0 * width) + _batch_bytes(width, 5)


def _rotation_work(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    width = width_of_rows(shapes[0], "kernel")
    fractional = values.get("alignment", 0.5) != round(values.get("alignment", 0.5))
    return (32.0 if fractional else 16.0) * width**3 + 1.0 * math.prod(shapes[0]) * width


_BY_FRAMES: dict[str, Any] = {
    "cut": "row",
    "vectors": "kernel",
    "batched": True,
    "name": "rotate",
    "reductions": (_sums_of_rows, _products_of_both),
    "reduces": _rounds_of_rotation,
    "conclusion": _frames,
    "held": _both_squares,
    "work": _rotation_work,
    "faster": "alignment=1 and alpha=0",
    "workspace": _rotation_bytes,
}


def _turned(
    a: Same,
    b: Same,
    *,
    alignment: Number = 1.0,
    alpha: Number = 0.0,
    centralization: Number = 1.0,
    sums: Sums,
    prepared: Prepared,
) -> Same:
    """Rows turned by a power of a rotation. Formula: that of `rotate`."""
    if alignment == alpha and alpha in (0.0, 1.0):
        return (b if alpha else a).clone()
    if "here" not in sums:
        return torch.lerp(a, b, alpha)
    start_a, start_b = (sums[name].to(a.device) for name in ("start_a", "start_b"))
    onwards, basis = prepared["onwards"].to(a.device), prepared.get("within")
    basis = None if basis is None else basis.to(a.device)
    moved = (1.0 - alpha) * move(a.double() - start_a, onwards, basis)
    if alpha:
        moved += alpha * move(b.double() - start_b, prepared["back"].to(a.device), basis)
    turned: Tensor = (moved + torch.lerp(start_a, start_b, alignment)).to(a.dtype)
    return turned


_rotate_tall = merge_method(**_BY_FRAMES, prepares=(_turns,))(_turned)
_rotate_tall_in_part = merge_method(**_BY_FRAMES, prepares=(_planes, _turns))(_turned)
"""For fractional powers, which turn within planes."""


def streamed_rotation(shapes: Sequence[tuple[int, ...]], values: Bindings) -> Method[..., Any] | None:
    """What turns a tall matrix by rows, unless the numbers say that nothing is turned."""
    alignment, alpha = values.get("alignment"), values.get("alpha")
    if not _is_tall(shapes[0], "kernel") or (alignment == alpha and alpha in (0.0, 1.0)):
        return None
    whole = isinstance(alignment, (int, float)) and alignment == round(alignment)
    return _rotate_tall if whole else _rotate_tall_in_part
