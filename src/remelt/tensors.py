"""Between bytes and torch: element types and views that copy nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OptionError

warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writ", category=UserWarning)

TORCH: dict[DType, torch.dtype] = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E5M2: torch.float8_e5m2,
    DType.F8_E8M0: getattr(torch, "float8_e8m0fnu", torch.uint8),  # of torch 2.7 and later
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I16: torch.int16,
    DType.I8: torch.int8,
    DType.U64: torch.uint64,
    DType.U32: torch.uint32,
    DType.U16: torch.uint16,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
}
FROM_TORCH = {dtype: ours for ours, dtype in TORCH.items()}


def tensor_over(data: memoryview, dtype: DType) -> torch.Tensor:
    """The bytes as a flat tensor, without a copy where they are aligned."""
    if len(data) == 0:
        return torch.empty(0, dtype=TORCH[dtype])
    raw = np.frombuffer(data, dtype=np.uint8)
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    return torch.from_numpy(raw).view(TORCH[dtype])


def aligned_view(data: memoryview, dtype: DType) -> torch.Tensor | None:
    """The bytes as a flat tensor that looks at them where they lie; None where they are not aligned for that."""
    raw = np.frombuffer(data, dtype=np.uint8)
    if len(raw) == 0 or raw.ctypes.data % dtype.itemsize:
        return None
    return torch.from_numpy(raw).view(TORCH[dtype])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's bytes, without a copy."""
    flat = tensor.contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(bytearray())
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def describe_tensors(tensors: Mapping[str, Any], name: str) -> dict[str, tuple[TensorInfo, memoryview]]:
    """Tensors in memory as bytes with their types and shapes, for a checkpoint in memory.

    Raises `OptionError` for what is no tensor, of a type that no checkpoint holds, or without values.
    """
    described = {}
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise OptionError(
                f"{name}: a model in memory maps names to tensors, but {key!r} is {type(tensor).__name__}"
            )
        if tensor.dtype not in FROM_TORCH or tensor.layout != torch.strided:
            raise OptionError(f"{name}: {key} is {tensor.dtype} {tensor.layout}, which no checkpoint holds")
        if tensor.is_meta:
            raise OptionError(
                f"{name}: {key} is on the device meta, where tensors have no values",
                hint="load the model's weights first, or name its file",
            )
        held = tensor.detach().cpu().contiguous()
        described[key] = TensorInfo(FROM_TORCH[held.dtype], tuple(held.shape)), bytes_of(held)
    return described


def byte_range(info: TensorInfo, start: int, stop: int | None) -> tuple[int, int]:
    """The bytes of a tensor that some of its elements take; to its end without ``stop``."""
    width = info.dtype.itemsize
    return start * width, info.nbytes if stop is None else stop * width
