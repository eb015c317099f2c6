"""BOFT: rotations one after another, each of other groups of the outputs or of the inputs, in a butterfly's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from remelt.adapters.change import Change, Parts, Rows
from remelt.adapters.kinds.common import Family, factor, mismatch, needs, sides, told
from remelt.adapters.kinds.oft import check_blocks, check_rescale, refuse_turned
from remelt.adapters.kinds.rotation import cayley, limited
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError

_BLOCKS, _RESCALE, _R, _S = "oft_blocks", "rescale", "boft_R", "boft_s"
_LEAST = 64
"""Rows of the base that are read at a time, at least."""


class BOFT(Family):
    """LyCORIS' BOFT: the rows are rotated by ``oft_blocks[0]``, then by ``[1]`` and so on, each in other groups.

    In stage i a group has half as many rows as a block from each half of ``2**i`` blocks' rows. Alpha by the number of
    outputs limits how far all turn together. ``rescale`` multiplies each row after that.
    """

    name = "a BOFT"
    telling = frozenset({_BLOCKS})
    names = frozenset({_BLOCKS, _RESCALE, "alpha"})

    def is_of(self, parts: Mapping[str, TensorInfo]) -> bool:
        return _BLOCKS in parts and len(parts[_BLOCKS].shape) == 4

    def asks_base(self, parts: Parts) -> bool:
        return True

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        check_blocks(self, parts, shape, 4)
        _check_stages(parts, _BLOCKS, sides(shape)[0], "outputs", shape, odd=False)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        turned = limited(parts, _BLOCKS, sides(shape)[0], dtype)
        rescale = factor(parts, _RESCALE, dtype).flatten() if _RESCALE in parts.infos else None
        return _Outputs(turned, rescale)


class PeftBOFT(Family):
    """PEFT's BOFT: the columns are rotated by ``boft_R[0]``, then by ``[1]`` and so on, and ``boft_s`` multiplies rows.

    PEFT made its rotations turn the other way than LyCORIS', by half as much, and orders a group by halves.
    """

    name = "a BOFT"
    telling = frozenset({_R, _S})
    names = telling

    def asks_base(self, parts: Parts) -> bool:
        return True

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        needs(self, parts, _R, _S)
        refuse_turned(parts, shape)
        found = parts.infos[_R]
        if len(found.shape) != 4 or found.shape[2] != found.shape[3] or not found.numel:
            raise AdapterError(f"{parts.module}: {told(parts, _R)} must be square blocks in 4 dimensions")
        _check_stages(parts, _R, sides(shape)[1], "inputs", shape, odd=found.shape[0] == 1)
        check_rescale(parts, _S, shape)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        blocks = factor(parts, _R, dtype)
        turned = cayley((blocks.mT - blocks) * 0.5)
        orders = []
        for stage in range(len(turned)):
            places = torch.arange(sides(shape)[1])
            if len(turned) > 1:
                places = places.view(-1, 2, 2**stage, turned.shape[-1] // 2).transpose(1, 2).flatten()
            orders.append(places)
        return _Inputs(turned, orders, factor(parts, _S, dtype).flatten())


class _Outputs(Change):
    """Rows of the whole rotation, times the rows of the base that they mix: those of some blocks that stay together."""

    def __init__(self, turned: Tensor, rescale: Tensor | None) -> None:
        stages, _, side, _ = turned.shape
        self._turned, self._rescale = turned, rescale
        self._span = 2 ** (stages - 1) * side
        self._orders = [
            torch.arange(self._span).view(-1, 2, 2**stage * side // 2).transpose(1, 2).flatten()
            for stage in range(stages)
        ]

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        assert base is not None
        parts = []
        for start in range(begin // self._span * self._span, end, self._span):
            low, high = max(begin, start), min(end, start + self._span)
            mixed = self._mixed(start, low, high)
            step, found = max(end - begin, _LEAST), None
            for first in range(0, self._span, step):
                last = min(first + step, self._span)
                part = mixed[:, first:last] @ base(start + first, start + last)
                found = part if found is None else found.add_(part)
            assert found is not None
            parts.append(found)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _mixed(self, start: int, low: int, high: int) -> Tensor:
        """How much of each row from ``start`` on goes into the rows asked for, less the row itself."""
        side = self._turned.shape[-1]
        own = torch.arange(high - low)
        rows = self._turned.new_zeros(high - low, self._span)
        rows[own, own + low - start] = 1.0
        blocks = slice(start // side, (start + self._span) // side)
        for stage in reversed(range(len(self._turned))):
            rows = _stage(rows, self._turned[stage, blocks], self._orders[stage])
        if self._rescale is not None:
            rows = rows * self._rescale[low:high, None]
        rows[own, own + low - start] -= 1.0
        return rows


class _Inputs(Change):
    """Rows whose columns are rotated, times their own numbers."""

    def __init__(self, turned: Tensor, orders: Sequence[Tensor], rescale: Tensor) -> None:
        self._turned, self._orders, self._rescale = turned.mT.contiguous(), orders, rescale

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        assert base is not None
        own = base(begin, end)
        rows = own
        for blocks, order in zip(self._turned, self._orders, strict=True):
            rows = _stage(rows, blocks, order)
        return rows * self._rescale[begin:end, None] - own


def _stage(rows: Tensor, blocks: Tensor, order: Tensor) -> Tensor:
    """Columns in groups of that order, each group multiplied by its block from the right; back in their own order."""
    groups = rows[:, order].view(len(rows), len(blocks), -1).transpose(0, 1)
    found = torch.empty_like(rows)
    found[:, order] = torch.bmm(groups, blocks).transpose(0, 1).flatten(1)
    return found


def _check_stages(parts: Parts, name: str, size: int, what: str, shape: tuple[int, ...], *, odd: bool) -> None:
    """Raise `AdapterError` where the blocks are not of all outputs or inputs, or cannot be put in a butterfly's order.

    With ``odd``, a block's side need not be even.
    """
    stages, count, side, _ = parts.infos[name].shape
    if count * side != size:
        raise mismatch(parts, name, f"of {size} {what} in all, not {count * side}", shape)
    if stages > 1 + count.bit_length() or count % 2 ** (stages - 1) or (side % 2 and not odd):
        raise AdapterError(
            f"{parts.module}: {told(parts, name)} make no butterfly: blocks have an even side, and {stages} stages "
            f"ask for a multiple of {2 ** min(stages - 1, 64)} blocks",
            hint="the file is not whole: take it again from where it came from",
        )
