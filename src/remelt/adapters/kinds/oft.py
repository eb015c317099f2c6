"""OFT: groups of a weight's outputs, or of its inputs, are rotated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from remelt.adapters.change import Change, Kind, Parts, Rows
from remelt.adapters.kinds.common import Family, factor, mismatch, needs, option, scalar, sides, told
from remelt.adapters.kinds.rotation import limited, of_peft, side_of
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError

_BLOCKS, _RESCALE, _R = "oft_blocks", "rescale", "oft_R"


class OFT(Family):
    """LyCORIS' and kohya's OFT: each group of rows becomes ``R.T @ rows``, with R made of one of ``oft_blocks``.

    Alpha by the number of outputs limits how far it turns. ``rescale`` multiplies each row after that.
    """

    name = "an OFT"
    telling = frozenset({_BLOCKS})
    names = frozenset({_BLOCKS, _RESCALE, "alpha"})

    def is_of(self, parts: Mapping[str, TensorInfo]) -> bool:
        return _BLOCKS in parts and len(parts[_BLOCKS].shape) != 4

    def asks_base(self, parts: Parts) -> bool:
        return True

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        check_blocks(self, parts, shape, 3)
        found = parts.infos[_BLOCKS].shape
        if found[0] * found[1] != sides(shape)[0]:
            raise mismatch(parts, _BLOCKS, f"of {sides(shape)[0]} outputs in all, not {found[0] * found[1]}", shape)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        turned = limited(parts, _BLOCKS, sides(shape)[0], dtype).mT.contiguous()
        if _RESCALE in parts.infos:
            turned *= factor(parts, _RESCALE, dtype).reshape(*turned.shape[:2], 1)
        return _Outputs(less_one(turned))


class PeftOFT(Family):
    """PEFT's OFT: each group of columns becomes ``columns @ R.T``, with R made of one row of ``oft_R``, or of the only
    one. For an embedding (option ``transposed``) it is ``columns @ R``.
    """

    name = "an OFT"
    telling = frozenset({_R})
    names = telling

    def asks_base(self, parts: Parts) -> bool:
        return True

    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        needs(self, parts, _R)
        refuse_turned(parts, shape)
        side, columns = side_of(parts, _R), sides(shape)[1]
        count = parts.infos[_R].shape[0]
        if count * side != columns and (count > 1 or columns % side):
            raise mismatch(parts, _R, f"of {columns} inputs in all, not {count * side}", shape)

    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        turned = less_one(of_peft(parts, _R, dtype))
        return _Inputs(turned if option(parts, "transposed") else turned.mT.contiguous())


class _Outputs(Change):
    """Groups of rows, each multiplied by its matrix from the left."""

    def __init__(self, turned: Tensor) -> None:
        self._turned = turned

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        assert base is not None
        side = self._turned.shape[1]
        first, last = begin // side, (end - 1) // side + 1
        own = base(first * side, last * side)
        if last - first == 1:
            return self._turned[first, begin - first * side : end - first * side] @ own
        found = torch.bmm(self._turned[first:last], own.reshape(last - first, side, -1)).flatten(0, 1)
        return found[begin - first * side : end - first * side]


class _Inputs(Change):
    """Groups of columns, each multiplied by its matrix from the right, or all by the only one."""

    def __init__(self, turned: Tensor) -> None:
        self._turned = turned

    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        assert base is not None
        own = base(begin, end)
        groups = own.reshape(len(own), -1, self._turned.shape[1])
        if len(self._turned) == 1:
            return (groups @ self._turned[0]).flatten(1)
        return torch.bmm(groups.transpose(0, 1), self._turned).transpose(0, 1).flatten(1)


def less_one(turned: Tensor) -> Tensor:
    """Square matrices less the identity."""
    return turned - torch.eye(turned.shape[-1], dtype=turned.dtype)


def check_blocks(kind: Kind, parts: Parts, shape: tuple[int, ...], dimensions: int) -> None:
    """Raise `AdapterError` where ``oft_blocks`` are no squares, or what comes with them does not fit."""
    needs(kind, parts, _BLOCKS, *([_RESCALE] if _RESCALE in parts.infos else []))
    found = parts.infos[_BLOCKS]
    if len(found.shape) != dimensions or found.shape[-1] != found.shape[-2] or not found.numel:
        raise AdapterError(
            f"{parts.module}: {told(parts, _BLOCKS)} must be square blocks in {dimensions} dimensions",
            hint="the file is not whole: take it again from where it came from",
        )
    if "alpha" in parts.infos:
        scalar(parts, "alpha")
    check_rescale(parts, _RESCALE, shape)


def check_rescale(parts: Parts, name: str, shape: tuple[int, ...]) -> None:
    """Raise `AdapterError` where there is a factor of the outputs that is not one number for each."""
    if name in parts.infos:
        found, outputs = parts.infos[name], sides(shape)[0]
        if found.numel != outputs or outputs not in found.shape:
            raise mismatch(parts, name, f"one number for each of {outputs} outputs", shape)


def refuse_turned(parts: Parts, shape: tuple[int, ...]) -> None:
    """Raise `AdapterError` for layers that keep inputs by outputs: PEFT itself cannot merge rotations into them."""
    if option(parts, "fan_in_fan_out") and len(shape) == 2:
        raise AdapterError(
            f"{parts.module}: a rotation of the inputs is not defined for weights that are stored inputs by outputs",
            hint="PEFT cannot merge it either",
        )
