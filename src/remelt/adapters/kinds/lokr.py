"""LoKr: the Kronecker product of two matrices, each whole or made of factors."""

from __future__ import annotations

import torch
from torch import Tensor

from remelt.adapters.change import Change, Parts, Rows
from remelt.adapters.kinds.common import (
    Family,
    Pair,
    factor,
    kernel,
    made_of,
    matrix,
    must_fit,
    needs,
    pair_of,
    scaling,
)
from remelt.adapters.kinds.decomposed import PART, check_magnitude, decomposed
from remelt.errors import AdapterError

_CORE = "lokr_t2"


class LoKr(Family):
    """``scale * kron(w1, w2)``, where ``w1`` may be ``w1_a @ w1_b``, and ``w2`` may be ``w2_a @ w2_b`` with a core.

    ``scale`` is alpha by the rank of the factors. Where both are whole there is no rank, and alpha does not count: only
    the scale of a configuration does. With the core ``lokr_t2``, ``w2_a`` is stored rank by outputs. With
    ``dora_scale`` it is brought to that magnitude.
    """

    name = "a LoKr"
    telling = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", _CORE})
    names = telling | {"alpha", PART}

    def asks_base(self, parts: Parts) -> bool:
        return PART in parts.infos

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        one, two = self._made(parts, "lokr_w1"), self._made(parts, "lokr_w2")
        if len(one) != 2:
            raise AdapterError(f"{parts.module}: lokr_w1 is a matrix, but it is {list(one)}")
        made = (one[0] * two[0], one[1] * two[1], *two[2:])
        must_fit(parts, [*_used(parts, "lokr_w1"), *_used(parts, "lokr_w2")], made, shape)
        _scale(parts)
        check_magnitude(self, parts, shape)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        one, two = _pair(parts, "lokr_w1", dtype), _pair(parts, "lokr_w2", dtype)
        return decomposed(_Kronecker(one.times(_scale(parts)), two), parts, shape, dtype)

    def _made(self, parts: Parts, name: str) -> tuple[int, ...]:
        """The shape of one of the two matrices."""
        used = _used(parts, name)
        if len(used) == 1:
            needs(self, parts, name)
            shape = matrix(parts, name)
            return (*shape[:2], *kernel(shape))
        needs(self, parts, *used)
        core = _core(parts, name)
        made = made_of(parts, used[0], used[1], core, lying=core is not None)
        if len(parts.infos[used[0]].shape) != 2:
            raise AdapterError(f"{parts.module}: {used[0]} is {list(parts.infos[used[0]].shape)}, which is no matrix")
        return made


class _Kronecker(Change):
    """Rows of a Kronecker product: each is one row of the first matrix against one of the second."""

    def __init__(self, one: Pair, two: Pair) -> None:
        self._one, self._two, self._height = one, two, two.left.shape[0]

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        height, first = self._height, begin // self._height
        outer = self._one.rows(first, (end - 1) // height + 1)
        which = torch.arange(begin, end)
        if end - begin < height:
            inner = Pair(self._two.left[which % height], self._two.right).rows(0, end - begin)
        else:
            inner = self._two.rows(0, height)[which % height]
        return (outer[which // height - first][:, :, None] * inner[:, None, :]).flatten(1)


def _core(parts: Parts, name: str) -> str | None:
    return _CORE if name == "lokr_w2" and _CORE in parts.infos else None


def _used(parts: Parts, name: str) -> tuple[str, ...]:
    """The parts that a matrix is made of, those that are missing too."""
    core = _core(parts, name)
    if name in parts.infos:
        more = [part for part in (f"{name}_a", f"{name}_b", core) if part in parts.infos]
        if more:
            raise AdapterError(
                f"{parts.module}: {name} is there whole, and in factors too: {', '.join(map(str, more))}"
            )
        return (name,)
    factored = core is not None or f"{name}_a" in parts.infos or f"{name}_b" in parts.infos
    return (f"{name}_a", f"{name}_b", *([core] if core else [])) if factored else (name,)


def _scale(parts: Parts) -> float:
    """As trained: the rank is the first dimension of a second factor, with a core too."""
    for name in ("lokr_w2_b", "lokr_w1_b"):
        if name in parts.infos:
            return scaling(parts, parts.infos[name].shape[0])
    return 1.0 if parts.scale is None else scaling(parts, 1)


def _pair(parts: Parts, name: str, dtype: torch.dtype) -> Pair:
    used = _used(parts, name)
    if len(used) == 1:
        return Pair(factor(parts, name, dtype).flatten(1))
    core = _core(parts, name)
    return pair_of(parts, used[0], used[1], core, dtype, lying=core is not None)
