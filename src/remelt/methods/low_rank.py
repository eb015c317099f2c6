"""Low rank: a difference replaced by the nearest one that few numbers describe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remelt.core.random import Random
from remelt.methods.tall import columns_of, rank_of, sides, streamed_range, streamed_truncation, work_by_products
from remelt.recipe.method import Bindings, Delta, Integer, Number, Prepared, Text, merge_method

_RANK: dict[str, Any] = {"rank": (0.0, math.inf), "share": (0.0, math.inf)}
_CHUNK = 2**20
"""Elements that are taken to float64 at a time."""
_LEAST = 256
"""Columns of such a part, at least: products of fewer are slow."""


def _directions(delta: Tensor, *, method: str) -> Mapping[str, Tensor]:
    """The directions of the smaller side, those of the largest singular values last; none where there is no matrix."""
    if delta.dim() < 2 or not delta.numel():
        return {}
    work = _lying(delta.flatten(1))
    if method == "gram":
        vectors = _leading(work)
    else:
        finite = bool(work.isfinite().all())
        vectors = torch.linalg.svd(work.double(), full_matrices=False).U.flip(1) if finite else None
    return {} if vectors is None else {"vectors": vectors}


def _work(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """Operations, counted as those of one thread that makes ten thousand millions of them a second."""
    least, most = sides(shapes[0])
    rank, share = values.get("rank"), values.get("share")
    if share == 0.0 and isinstance(rank, int) and not 0 < rank < least:
        return 0.0
    if values.get("method", "gram") == "svd":
        return 20.0 * least**3 + 4.0 * least**2 * most
    return work_by_products(shapes, values)


def _workspace(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """Bytes that it holds: matrices of the smaller side, and parts of the whole one."""
    least, most = sides(shapes[0])
    if values.get("method", "gram") == "svd":
        return 8.0 * (4.0 * least * most + 8.0 * least**2)
    return 8.0 * (5.0 * least**2 + 4.0 * max(_CHUNK, _LEAST * least))


@merge_method(
    cut="tensor",
    finer=streamed_truncation,
    prepares=_directions,
    limits=_RANK | {"method": ("gram", "svd")},
    work=_work,
    faster="truncate_rank_randomised",
    workspace=_workspace,
)
def truncate_rank(
    delta: Delta, *, rank: Integer = 8, share: Number = 0.0, method: Text = "gram", prepared: Prepared
) -> Delta:
    """The nearest difference of a given rank, as a LoRA of that rank would hold it.

    Formula: U S V^T of the ``rank`` largest singular values, with rows the first dimension and columns all others. A
    ``share`` above 0 asks for that share of the full rank instead, rounded.

    Tensors of fewer than two dimensions, of no more than that rank, or with elements that are not finite stay as they
    are; at rank 0 the result is zero.

    With ``method`` "gram" the directions come from the products of the rows (or of the columns, if they are fewer) in
    float64: several times faster than a singular value decomposition, and as exact, unless the last singular value kept
    is below 1e-8 of the first. "svd" decomposes the matrix itself, in float64. `truncate_rank_randomised` is faster
    than both for ranks that are a small share. The directions found are kept in a cache, and serve other ranks. Tensors
    four times as high as wide are streamed by "gram", and read twice.

    Spaces: a delta gives a delta.

    Source: Eckart and Young 1936; sd-mecha, truncate_rank without its approximate basis, get_rank_from_ratio.

    >>> from torch import tensor
    >>> truncate_rank.on(tensor([[3.0, 0.0], [0.0, 1.0]]), rank=1)
    tensor([[3., 0.],
            [0., 0.]])
    """
    kept = _kept(delta, rank, share)
    if kept is None or not prepared:
        return delta
    return _projected(delta.flatten(1), prepared["vectors"], kept).reshape(delta.shape)


def _randomised_work(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """As above: products with that many columns, and orthonormal bases of them."""
    (least, most), columns = sides(shapes[0]), columns_of(shapes[0], values)
    if not columns:
        return _work(shapes, {**values, "method": "gram"})
    passes = 2.0 + 2.0 * float(values.get("iterations", 4))
    return passes * 0.5 * least * most * columns + 8.0 * most * columns**2


def _randomised_workspace(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """Bytes that it holds: some matrices of that many columns."""
    least, most = sides(shapes[0])
    known = {"rank", "share", "oversampling"} <= values.keys()
    columns = columns_of(shapes[0], values) if known else least // 2
    of_range = 8.0 * 6.0 * (least + most) * columns
    return of_range if known and columns else max(of_range, _workspace(shapes, {}))


def _range(
    delta: Tensor, *, rank: int, share: float, iterations: int, oversampling: int, seed: int
) -> Mapping[str, Tensor]:
    """The two factors of the nearest matrix within a range found at random; none where that way is not taken."""
    kept = _kept(delta, rank, share)
    columns = columns_of(delta.shape, {"rank": rank, "share": share, "oversampling": oversampling})
    if kept is None or not columns:
        return {}
    work = _lying(delta.flatten(1))
    width = work.shape[1]
    # the same numbers serve all keys of a size: that they are random within one is enough
    drawn = Random(seed, "truncate_rank_randomised", "", 0, width * columns).uniform() - 0.5
    basis = _orthonormal(work @ torch.from_numpy(drawn).to(delta).reshape(width, columns))
    for _ in range(iterations):
        basis = _orthonormal(work @ _orthonormal(work.T @ basis))
    image = basis.T @ work
    products = image.double() @ image.double().T
    if not bool(products.isfinite().all()):
        return {"image": image[:0]}
    best = torch.linalg.eigh(products).eigenvectors[:, -kept:].to(delta.dtype) if kept else basis[:0].T
    return {"basis": basis @ best, "image": best.T @ image}


@merge_method(
    cut="tensor",
    finer=streamed_range,
    prepares=_range,
    limits=_RANK | {"iterations": (0.0, math.inf), "oversampling": (0.0, math.inf)},
    work=_randomised_work,
    faster="a lower rank",
    workspace=_randomised_workspace,
)
def truncate_rank_randomised(
    delta: Delta,
    *,
    rank: Integer = 8,
    share: Number = 0.0,
    iterations: Integer = 4,
    oversampling: Integer = 8,
    seed: Integer = 0,
    prepared: Prepared,
) -> Delta:
    """Nearly the nearest difference of a given rank, in a fraction of the time.

    Formula: W W^T D, with W the ``rank`` best directions within the range of (D D^T)^iterations D R, for random numbers
    R with ``oversampling`` columns more than the rank.

    Its error is above the least by less than 1 % for ranks of up to an eighth of the full one, and less with more
    ``iterations``. Tensors that `truncate_rank` leaves as they are stay so here; where that many columns are half of
    the full rank or more, the result is that of `truncate_rank`, which is faster then. The factors are kept in a cache.
    Tensors four times as high as wide are streamed, and read 3 + iterations times.

    Spaces: a delta gives a delta. For large matrices and small ranks: it costs 2 + 2 iterations products of the matrix
    with one of that many columns.

    Source: Halko, Martinsson and Tropp 2011 (arXiv 0909.4061); sd-mecha, truncate_rank.

    >>> from torch import tensor
    >>> truncate_rank_randomised.on(tensor([[4.0, 2.0], [2.0, 4.0]]), rank=1).round(decimals=3)
    tensor([[3., 3.],
            [3., 3.]])
    """
    kept = _kept(delta, rank, share)
    if kept is None:
        return delta
    if not prepared:
        return _nearest(delta.flatten(1), kept).reshape(delta.shape)
    if "basis" not in prepared:
        return delta
    nearest: Tensor = prepared["basis"] @ prepared["image"]
    return (nearest if delta.shape[0] <= math.prod(delta.shape[1:]) else nearest.T).reshape(delta.shape)


def _kronecker_work(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """As above, for the matrix that the tensor is arranged to."""
    least, _ = sides(shapes[0])
    if not least:
        return 0.0
    rows, _, columns, _ = _factors(shapes[0], values.get("ratio", 0.5))
    return _work([(rows * columns, math.prod(shapes[0]) // (rows * columns))], {})


def _kronecker_workspace(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """Bytes that it holds: the tensor in another arrangement twice, and what its decomposition takes."""
    if not sides(shapes[0])[0]:
        return 0.0
    rows, _, columns, _ = _factors(shapes[0], values.get("ratio", 0.5))
    outer = rows * columns
    return 8.0 * 2.0 * math.prod(shapes[0]) + _workspace([(outer, math.prod(shapes[0]) // outer)], {})


def _arranged(delta: Tensor, *, ratio: float) -> Mapping[str, Tensor]:
    """The directions of the smaller factor, those of the largest singular values last; none where all stays."""
    if delta.dim() < 2 or not delta.numel():
        return {}
    arranged = _split(delta, ratio).flatten(2).flatten(0, 1)
    vectors = _leading(_lying(arranged)) if min(arranged.shape) > 1 else None
    return {} if vectors is None else {"vectors": vectors[:, -1:].clone()}


def _split(delta: Tensor, ratio: float) -> Tensor:
    """The tensor with the dimensions of the outer factor first: rows and columns of it, then those of the inner one."""
    outer_rows, inner_rows, outer_columns, _ = _factors(tuple(delta.shape), ratio)
    return delta.reshape(outer_rows, inner_rows, outer_columns, -1).transpose(1, 2)


@merge_method(
    cut="tensor",
    prepares=_arranged,
    limits={"ratio": (0.0, 1.0)},
    work=_kronecker_work,
    faster="a ratio nearer to 0 or 1",
    workspace=_kronecker_workspace,
)
def truncate_kronecker(delta: Delta, *, ratio: Number = 0.5, prepared: Prepared) -> Delta:
    """The nearest difference that is a Kronecker product of two matrices, as a LoKr holds it.

    Formula: X (x) Y with the least distance to ``delta``; X has the share ``ratio`` of its elements, counted in
    logarithms, or as near to that as the divisors of the shape allow: at 0 it is one number, at 1 it is all but the
    kernel of a convolution, at 0.5 both are alike.

    Tensors of fewer than two dimensions, or with elements that are not finite, stay as they are.

    Spaces: a delta gives a delta. For differences that are to be small files, or show what repeats in them. It costs a
    decomposition of the size of the smaller of X and Y, which is kept in a cache.

    Source: Van Loan and Pitsianis 1993; sd-mecha, truncate_kronecker without its approximate basis.

    >>> from torch import tensor
    >>> truncate_kronecker.on(tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]]), ratio=0.3)
    tensor([[1., 2., 0., 0.],
            [3., 4., 0., 0.]])
    """
    if not prepared:
        return delta
    split = _split(delta, ratio)
    nearest = _projected(split.flatten(2).flatten(0, 1), prepared["vectors"], 1).reshape(split.shape)
    return nearest.transpose(1, 2).reshape(delta.shape)


def _kept(delta: Tensor, rank: int, share: float) -> int | None:
    """The rank to be kept; None where the tensor stays as it is."""
    if delta.dim() < 2 or not delta.numel():
        return None
    full = min(delta.shape[0], math.prod(delta.shape[1:]))
    kept = rank_of(full, rank, share)
    return kept if kept < full else None


def _lying(rows: Tensor) -> Tensor:
    """A matrix as it is or transposed, so that it is wider than high."""
    return rows if rows.shape[0] <= rows.shape[1] else rows.T


def _leading(work: Tensor) -> Tensor | None:
    """Orthonormal directions of the height, by ascending weight, from the products of the rows, if these are finite."""
    products = torch.zeros(len(work), len(work), dtype=torch.float64, device=work.device)
    for part in _parts(work):
        columns = work[:, part].double()
        products.addmm_(columns, columns.T)
    if not bool(products.isfinite().all()):
        return None
    vectors: Tensor = torch.linalg.eigh(products).eigenvectors
    return vectors


def _projected(rows: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """The matrix within the last directions of its smaller side."""
    chosen = vectors[:, vectors.shape[1] - rank :]
    work, nearest = _lying(rows), torch.empty_like(rows)
    written = _lying(nearest)
    for part in _parts(work):
        written[:, part] = (chosen @ (chosen.T @ work[:, part].double())).to(rows.dtype)
    return nearest


def _nearest(rows: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank; itself if its products are not finite."""
    vectors = _leading(_lying(rows))
    return rows if vectors is None else _projected(rows, vectors, rank)


def _parts(work: Tensor) -> Iterator[slice]:
    """Columns by the part."""
    step = max(_CHUNK // len(work), _LEAST)
    return (slice(begin, begin + step) for begin in range(0, work.shape[1], step))


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _factors(shape: tuple[int, ...], ratio: float) -> tuple[int, int, int, int]:
    """Rows of the outer and inner factor, columns of the outer and inner one.

    Of all ways to divide the two sides, that in which the outer one's size is nearest to the share asked for; of those,
    the one whose sides are divided most evenly.
    """
    half = 0.5 * math.log(math.prod(shape))
    sizes = [math.log(x * y) - half for x, y in itertools.product(_divisors(shape[0]), _divisors(shape[1]))]
    wanted = (2.0 * ratio - 1.0) * max(abs(size) for size in sizes)

    def distance(divided: tuple[int, int]) -> tuple[float, float]:
        uneven = sum(abs(math.log(part * part / side)) for part, side in zip(divided, shape, strict=False))
        return abs(math.log(math.prod(divided)) - half - wanted), uneven

    rows, columns = min(itertools.product(_divisors(shape[0]), _divisors(shape[1])), key=distance)
    return rows, shape[0] // rows, columns, shape[1] // columns


def _divisors(number: int) -> list[int]:
    """In order.

    >>> _divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return low + [number // divisor for divisor in reversed(low) if divisor * divisor != number]
