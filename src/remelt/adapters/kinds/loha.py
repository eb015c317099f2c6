"""LoHa: two products of two factors each, multiplied by element."""

from __future__ import annotations

import torch
from torch import Tensor

from remelt.adapters.change import Change, Parts, Rows
from remelt.adapters.kinds.common import Family, Pair, made_of, must_fit, needs, pair_of, scaling
from remelt.adapters.kinds.decomposed import PART, check_magnitude, decomposed
from remelt.errors import AdapterError

_HALVES = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


class LoHa(Family):
    """``scale * (w1_a @ w1_b) * (w2_a @ w2_b)``, each product with a core ``t1``, ``t2`` if there are any.

    ``scale`` is alpha by rank. Without cores, the columns of ``w1_b`` and ``w2_b`` hold the kernel of a convolution;
    with them, ``w1_a`` and ``w2_a`` are stored rank by outputs. With ``dora_scale`` it is brought to that magnitude.
    """

    name = "a LoHa"
    telling = frozenset(name for half in _HALVES for name in half)
    names = telling | {"alpha", PART}

    def asks_base(self, parts: Parts) -> bool:
        return PART in parts.infos

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        cores = [core for _, _, core in _HALVES if core in parts.infos]
        needs(self, parts, *(name for one, two, core in _HALVES for name in (one, two, *([core] if cores else []))))
        for one, two, core in _HALVES:
            used = (one, two, *([core] if cores else []))
            made = made_of(parts, one, two, core if cores else None, lying=bool(cores))
            _flat(parts, one)
            must_fit(parts, used, made, shape)
        scaling(parts, parts.infos["hada_w1_b"].shape[0])
        check_magnitude(self, parts, shape)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        lying = "hada_t1" in parts.infos
        one, two = (pair_of(parts, a, b, core if lying else None, dtype, lying=lying) for a, b, core in _HALVES)
        scale = scaling(parts, parts.infos["hada_w1_b"].shape[0])
        return decomposed(_Hadamard(one.times(scale), two), parts, shape, dtype)


class _Hadamard(Change):
    def __init__(self, one: Pair, two: Pair) -> None:
        self._one, self._two = one, two

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        return self._one.rows(begin, end).mul_(self._two.rows(begin, end))


def _flat(parts: Parts, name: str) -> None:
    if len(parts.infos[name].shape) != 2:
        raise AdapterError(f"{parts.module}: {name} is {list(parts.infos[name].shape)}, which is no matrix")
