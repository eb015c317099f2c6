"""Rotations: one model's matrices turned towards another's, wholly or part of the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from remelt.methods.tall import streamed_rotation
from remelt.methods.turning import frames_of, move, planes_between, turns
from remelt.recipe.method import Bindings, Number, Prepared, Same, merge_method

_CHUNK = 2**18
"""Elements that are taken to float64 at a time."""
_OUTSIDE = 1e-13
"""Share of a matrix's squared norm that is outside of a space by round-off."""


def _frames(a: Tensor, b: Tensor, *, centralization: float) -> Mapping[str, Tensor]:
    """Orthonormal directions, as columns, of which each of ``here`` is to be turned to that of ``there``.

    They are those in which the products of the rows are greatest; none where the products are not finite.
    """
    if a.dim() < 2 or not a.numel():
        return {}
    one, other, starts = _matrices(a, b, centralization)
    if len(one) < one.shape[1]:  # wide: a decomposition of the size of the height is enough
        here, one_here = torch.linalg.qr((one.double() - starts[0]).T)
        there, other_there = torch.linalg.qr((other.double() - starts[1]).T)
        products = one_here @ other_there.T
    else:
        products = torch.zeros(one.shape[1], one.shape[1], dtype=torch.float64, device=one.device)
        for rows in _parts(one):
            products.addmm_((one[rows].double() - starts[0]).T, other[rows].double() - starts[1])
    if not bool(products.isfinite().all()):
        return {}
    u, v = frames_of(products)
    if len(one) < one.shape[1]:
        u, v = here @ u, there @ v
    return {"here": u, "there": v}


def _planes(a: Tensor, b: Tensor, *, prepared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The planes in which the nearest proper rotation turns, and by which angles, within ``basis`` if there is one."""
    return planes_between(prepared["here"], prepared["there"])


def _workspace(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """Bytes that it holds: matrices of the rows' width, or of twice their number where that is less."""
    if len(shapes[0]) < 2 or not math.prod(shapes[0]):
        return 0.0
    height, width = _sides(shapes[0])
    turned = min(2 * height, width)
    return 8.0 * (13.0 * turned**2 + 8.0 * min(height, width) * width + 6.0 * max(_CHUNK, width) + 8.0 * width)


def _work(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """Operations, counted as those of one thread that makes ten thousand millions of them a second."""
    shape = shapes[0]
    if len(shape) < 2 or not math.prod(shape):
        return 0.0
    height, width = _sides(shape)
    least, turned = min(height, width), min(2 * height, width)
    decomposed = 16.0 * least**3 + 2.0 * least**2 * width + 0.5 * height * width * least
    alignment, alpha = values.get("alignment", 0.5), values.get("alpha", 0.5)
    if alignment == alpha and alpha in (0.0, 1.0):
        return 0.0
    return decomposed if alignment == 1.0 and not alpha else decomposed + 16.0 * turned**3


@merge_method(
    cut="tensor",
    finer=streamed_rotation,
    prepares=(_frames, _planes),
    work=_work,
    faster="alignment=1 and alpha=0",
    workspace=_workspace,
)
def rotate(
    a: Same,
    b: Same,
    *,
    alignment: Number = 1.0,
    alpha: Number = 0.0,
    centralization: Number = 1.0,
    prepared: Prepared,
) -> Same:
    """Turn ``a`` towards ``b`` by a rotation, which keeps what the rows of ``a`` are to each other.

    Formula: ((1 - alpha) A Q^alignment + alpha B Q^(alignment - 1)) + (1 - alignment) m + alignment n, with m and n the
    means of the rows of ``a`` and ``b`` times ``centralization``, A and B the rows less those, and Q the orthogonal
    matrix that makes |A Q - B| least and moves nothing that it need not.

    Rows are the first dimension; of a convolution with a kernel, the first two. Fractional powers go along the shorter
    arc of every plane; for them Q is a proper rotation: if the nearest is a reflection, the direction that matters
    least is turned back. Tensors of fewer than two dimensions, and such in which the products are not finite, give
    (1 - alpha) a + alpha b.

    Spaces: two weights or two deltas give the same. At ``alignment`` and ``alpha`` 0 the result is ``a``, at 1 ``b``.
    For models that drifted apart by more than a step of fine-tuning. It costs a singular value decomposition of the
    rows' width, or of their number if that is less; a fractional ``alignment`` of wide matrices one of up to twice
    their number: seconds to minutes for a large matrix, in float64. The directions and planes found are kept in a
    cache, and serve other numbers. Matrices four times as high as wide are streamed, and read three times.

    Source: orthogonal Procrustes (Schönemann 1966); sd-mecha, rotate.

    >>> from torch import tensor
    >>> rotate.on(tensor([[1.0, 0.0], [-1.0, 0.0]]), tensor([[0.0, 2.0], [0.0, -2.0]]), alignment=1.0)
    tensor([[ 0.,  1.],
            [ 0., -1.]])
    """
    if alignment == alpha and alpha in (0.0, 1.0):
        return (b if alpha else a).clone()
    if not prepared:
        return torch.lerp(a, b, alpha)
    one, other, starts = _matrices(a, b, centralization)
    middle = torch.lerp(starts[0], starts[1], alignment)
    here, there = prepared["here"], prepared["there"]
    if alignment == 1.0 and alpha == 0.0:
        ahead = _ahead(one, starts[0], middle, here, there)
        if ahead is not None:
            return ahead.reshape(a.shape)
    onwards, back, basis = turns(here, there, prepared, alignment, alpha)
    rotated = torch.empty_like(one)
    for rows in _parts(one):
        moved = (1.0 - alpha) * move(one[rows].double() - starts[0], onwards, basis)
        if back is not None:
            moved += alpha * move(other[rows].double() - starts[1], back, basis)
        rotated[rows] = moved + middle
    return rotated.reshape(a.shape)


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows, and how long they are."""
    height = shape[0] * (shape[1] if len(shape) == 4 and math.prod(shape[2:]) > 1 else 1)
    return height, math.prod(shape) // height


def _matrices(a: Tensor, b: Tensor, centralization: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Both tensors as rows, and what is taken from the rows of each."""
    one, other = (tensor.reshape(_sides(a.shape)) for tensor in (a, b))
    return one, other, [rows.mean(0, dtype=torch.float64) * centralization for rows in (one, other)]


def _ahead(one: Tensor, start: Tensor, middle: Tensor, here: Tensor, there: Tensor) -> Tensor | None:
    """Rows turned from one frame to the other, where they lie within it."""
    turned, within, total = torch.empty_like(one), 0.0, 0.0
    for rows in _parts(one):
        centred = one[rows].double() - start
        coordinates = centred @ here
        turned[rows] = coordinates @ there.T + middle
        within += float(coordinates.square().sum())
        total += float(centred.square().sum())
    return turned if within >= (1.0 - _OUTSIDE) * total else None


def _parts(matrix: Tensor) -> Iterator[slice]:
    """Rows by the part."""
    step = max(_CHUNK // matrix.shape[1], 1)
    return (slice(begin, begin + step) for begin in range(0, len(matrix), step))
