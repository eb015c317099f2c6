"""What tests of archs share: models of random numbers, and what a file was recognised as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from remelt.archs.detect import Detection
from remelt.core.dtype import DType
from remelt.core.pieces import Converted
from remelt.core.tensor_info import TensorInfo

_TYPES = {DType.I64: torch.int64, DType.I32: torch.int32}


def infos(shapes: Mapping[str, tuple[int, ...]] | Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Shapes as the headers of a file in BF16."""
    return {key: TensorInfo(DType.BF16, shape) for key, shape in dict(shapes).items()}


def drawn(shapes: Mapping[str, TensorInfo], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors, half as precise as floats, so that none is equal to another."""
    source = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(info.shape, generator=source).to(_TYPES.get(info.dtype, torch.bfloat16))
        for key, info in shapes.items()
    }


def unlike(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """The keys that one of them lacks, or whose tensors differ in shape or in a bit."""
    return [
        key
        for key in dict.fromkeys((*ours, *theirs))
        if key not in ours or key not in theirs or not torch.equal(ours[key], theirs[key])
    ]


def pieced(made: Mapping[str, Converted], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors put together of rows, by torch."""
    return {
        key: torch.cat([tensors[piece.key][piece.start : piece.stop] for piece in one.pieces])
        for key, one in made.items()
    }


def name_of(found: Detection) -> str | None:
    """The name of the arch that was recognised."""
    return None if found.arch is None else found.arch.name


def variants_of(found: Detection) -> list[str]:
    """The names of the ways in which it is special."""
    return [variant.name for variant in found.variants]
