"""GLoRA: a product of two factors, and one of the weight itself with two others."""

from __future__ import annotations

import torch
from torch import Tensor

from remelt.adapters.change import Change, Parts, Rows
from remelt.adapters.kinds.common import (
    Family,
    Pair,
    kernel,
    made_of,
    matrix,
    must_fit,
    needs,
    pair_of,
    scaling,
    told,
)
from remelt.adapters.kinds.decomposed import PART, check_magnitude, decomposed
from remelt.errors import AdapterError

_A1, _A2, _B1, _B2, _CORE = "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"


class GLoRA(Family):
    """``scale * (weight @ a1 @ a2 + b1 @ b2)``, where ``b1`` and ``b2`` may have a core ``bm.weight``.

    ``scale`` is alpha by rank; ``a1`` and ``a2`` act on the inputs, each position of a kernel alike. LyCORIS once saved
    each two factors the other way round: that is told by the shapes.
    """

    name = "a GLoRA"
    telling = frozenset({_A1, _A2, _B1, _B2, _CORE})
    names = telling | {"alpha", PART}

    def asks_base(self, parts: Parts) -> bool:
        return True

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        core = _core(parts)
        needs(self, parts, _A1, _A2, _B1, _B2, *([core] if core else []))
        for name in (_A1, _A2, _B1):
            matrix(parts, name)
        a1, a2, b1, b2 = _ordered(parts, shape)
        made = made_of(parts, b1, b2, core)
        if kernel(parts.infos[b1].shape):
            raise AdapterError(f"{parts.module}: {told(parts, b1)} is of outputs by rank, without a kernel")
        must_fit(parts, (b1, b2, *([core] if core else [])), made, shape)
        inner = made_of(parts, a1, a2)
        inputs = shape[1] if len(shape) > 1 else 1
        if inner != (inputs, inputs):
            raise AdapterError(
                f"{parts.module}: {told(parts, a1, a2)} make {list(inner)}, but the model's tensor is {list(shape)}, "
                f"of {inputs} inputs",
                hint="the adapter is of another model",
            )
        if parts.infos[a2].shape[0] != parts.infos[b2].shape[0]:
            raise AdapterError(f"{parts.module}: these are not of one rank: {told(parts, a1, a2, b1, b2)}")
        scaling(parts, parts.infos[a2].shape[0])
        check_magnitude(self, parts, shape)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        a1, a2, b1, b2 = _ordered(parts, shape)
        scale = scaling(parts, parts.infos[a2].shape[0])
        inner = pair_of(parts, a1, a2, None, dtype).times(scale)
        return decomposed(
            _General(inner, pair_of(parts, b1, b2, _core(parts), dtype).times(scale)), parts, shape, dtype
        )


class _General(Change):
    def __init__(self, inner: Pair, outer: Pair) -> None:
        self._inner, self._outer = inner, outer

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        assert base is not None
        left, right = self._inner.left, self._inner.right
        assert right is not None
        own = base(begin, end).reshape(end - begin, left.shape[0], -1)
        turned = torch.einsum("omk,mi->oik", torch.einsum("oik,im->omk", own, left), right)
        return self._outer.rows(begin, end).add_(turned.flatten(1))


def _core(parts: Parts) -> str | None:
    return _CORE if _CORE in parts.infos else None


def _ordered(parts: Parts, shape: tuple[int, ...]) -> tuple[str, str, str, str]:
    """The four factors as they are multiplied: as named, or as LyCORIS named them once."""
    outputs, inputs = shape[0] if shape else 1, shape[1] if len(shape) > 1 else 1
    a1, a2, b1, b2 = (parts.infos[name].shape[:2] for name in (_A1, _A2, _B1, _B2))
    rank = a1[0]
    as_named = a1[0] == inputs and a2[1] == inputs and b1[0] == outputs
    other_way = (a1, a2, b1, b2) == ((rank, inputs), (inputs, rank), (rank, inputs), (outputs, rank))
    return (_A2, _A1, _B2, _B1) if other_way and not as_named else (_A1, _A2, _B1, _B2)
