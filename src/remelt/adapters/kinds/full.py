"""Whole tensors: differences of weights, norms and biases, and values that take a tensor's place."""

from __future__ import annotations

import torch
from torch import Tensor

from remelt.adapters.change import Change, Parts, Rows
from remelt.adapters.kinds.common import Family, kernel, mismatch, needs, not_finite, sides

_CHUNK = 2**20
"""Elements that are converted at a time to see whether they are finite."""


class Whole(Family):
    """A part of the shape of the tensor: its difference, or with ``replaces`` what it becomes.

    An alpha beside it does not count, as for all programs that read such files.
    """

    def __init__(self, name: str, part: str, target: str = "weight", *, replaces: bool = False) -> None:
        self.name, self.target, self._part, self._replaces = name, target, part, replaces
        self.telling = frozenset({part})
        self.names = self.telling | {"alpha"}

    def asks_base(self, parts: Parts) -> bool:
        return self._replaces

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        needs(self, parts, self._part)
        found = parts.infos[self._part].shape
        if (*found[:2], *kernel(found)) != (*shape[:2], *kernel(shape)):
            raise mismatch(parts, self._part, f"{list(shape)}", shape)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        stored = parts.read(self._part).reshape(sides(shape))
        step = max(_CHUNK // max(stored.shape[1], 1), 1)
        for begin in range(0, stored.shape[0], step):
            if not bool(stored[begin : begin + step].to(dtype).isfinite().all()):
                raise not_finite(parts, self._part)
        return _Replaced(stored, dtype) if self._replaces else _Stored(stored, dtype)


class _Stored(Change):
    """A difference that is kept as stored, since it may be as large as the tensor."""

    def __init__(self, stored: Tensor, dtype: torch.dtype) -> None:
        self._stored, self._dtype = stored, dtype

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        # a copy even where the type is the same: the caller may write to what it gets
        return self._stored[begin:end].to(self._dtype, copy=True)


class _Replaced(_Stored):
    """What leads from the tensor to another one."""

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        assert base is not None
        return super().rows(begin, end, base).sub_(base(begin, end))
