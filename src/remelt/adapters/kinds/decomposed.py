"""DoRA: a weight and its change are brought to a magnitude, of each output or of each input."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from remelt.adapters.change import Change, Parts, Rows
from remelt.adapters.kinds.common import Family, factor, mismatch, needs, option, sides

PART = "dora_scale"
_EPS = float(torch.finfo(torch.float32).eps)
"""What LyCORIS adds to a norm; PEFT adds nothing."""
_CHUNK = 2**20
"""Elements that a pass over all rows holds at a time."""


@dataclass(frozen=True)
class _Way:
    """Of which dimension the magnitudes are, and what is added to the norms."""

    axis: int
    eps: float


def way_of(parts: Parts, shape: tuple[int, ...], *, transposed: bool = False) -> _Way:
    """How a magnitude is meant, told by its shape; `AdapterError` where it is none of the tensor's.

    LyCORIS keeps one for each output as ``[out, 1, ...]``, or one for each input as ``[1, in, ...]``; PEFT one for each
    output as ``[out]``, and for convolutions as ``[1, out, 1, ...]``. The last two of these look alike where a
    convolution has as many inputs as outputs: then it is the former, unless the option ``magnitude_on_output`` is set.
    """
    found = parts.infos[PART].shape
    output = 1 if transposed else 0
    size = parts.infos[PART].numel
    lengths = (shape[0], shape[1]) if len(shape) > 1 else (sides(shape)[0], 0)
    ways = []
    if found == (size,):
        ways.append(_Way(output, 0.0))
    elif found[:1] == (size,):
        ways.append(_Way(output, _EPS))
    if len(found) > 1 and found[1] == size:
        told = bool(option(parts, "magnitude_on_output"))
        ways += [_Way(output, 0.0)] if told else [_Way(1 - output, _EPS)]
        ways += [_Way(output, 0.0)] if len(found) > 2 else []
    for way in ways:
        if size and lengths[way.axis] == size:
            return way
    raise mismatch(parts, PART, f"[{lengths[output]}, 1, ...] or [1, {lengths[1 - output]}, ...]", shape)


def check_magnitude(kind: Family, parts: Parts, shape: tuple[int, ...], *, transposed: bool = False) -> None:
    """Raise `AdapterError` where there is a magnitude that does not fit."""
    if PART in parts.infos:
        needs(kind, parts, PART)
        way_of(parts, shape, transposed=transposed)


def decomposed(
    inner: Change, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, *, transposed: bool = False
) -> Change:
    """A change as it is, or brought to the magnitude if there is one."""
    if PART not in parts.infos:
        return inner
    way = way_of(parts, shape, transposed=transposed)
    return _Decomposed(inner, factor(parts, PART, dtype).flatten(), way, shape)


class _Decomposed(Change):
    """The difference to the sum of weight and change, each row or column of it brought to a magnitude."""

    def __init__(self, inner: Change, magnitude: Tensor, way: _Way, shape: tuple[int, ...]) -> None:
        self._inner, self._magnitude, self._way, self._shape = inner, magnitude, way, shape
        self._lock = threading.Lock()
        self._by_column: Tensor | None = None

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        assert base is not None
        own, delta = self._both(begin, end, base)
        if self._way.axis == 0:
            norms = torch.linalg.vector_norm(own + delta, dim=1, dtype=torch.float64)
            by = self._factors(self._magnitude[begin:end], norms)[:, None]
        else:
            by = self._columns(base)
        return own * (by - 1.0) + delta * by

    def _both(self, begin: int, end: int, base: Rows) -> tuple[Tensor, Tensor]:
        """Rows of the weight, read once, and of its change."""
        own = base(begin, end)
        return own, self._inner.rows(begin, end, lambda first, last: own[first - begin : last - begin])

    def _columns(self, base: Rows) -> Tensor:
        """What every column is multiplied by: it takes one pass over all rows."""
        with self._lock:
            if self._by_column is None:
                rows, columns = sides(self._shape)
                squares = torch.zeros(columns, dtype=torch.float64)
                step = max(_CHUNK // max(columns, 1), 1)
                for begin in range(0, rows, step):
                    end = min(begin + step, rows)
                    own, delta = self._both(begin, end, base)
                    squares += (own + delta).double().square_().sum(0)
                inputs = self._shape[1]
                norms = squares.reshape(inputs, -1).sum(1).sqrt_()
                self._by_column = self._factors(self._magnitude, norms).repeat_interleave(columns // inputs)
        return self._by_column

    def _factors(self, magnitude: Tensor, norms: Tensor) -> Tensor:
        """Magnitudes by norms; a vector of zeros stays one."""
        norms = norms + self._way.eps
        found = torch.where(norms > 0.0, magnitude / norms, 0.0)
        return found.to(magnitude.dtype)
