"""The numbers that the bits of small element types stand for, as tables."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from remelt.core.dtype import DType

Floats = npt.NDArray[np.float32]

E2M1: Floats = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], dtype=np.float32
)
"""The sixteen numbers of a four-bit float: a sign, two bits of exponent, one of mantissa."""


@functools.cache
def float8_table(dtype: DType) -> Floats:
    """What each of the 256 codes of an eight-bit float stands for.

    >>> table = float8_table(DType.F8_E4M3)
    >>> float(table[0x38]), float(table[0x7E]), float(table[0x81])
    (1.0, 448.0, -0.001953125)
    """
    codes = np.arange(256)
    if dtype is DType.F8_E8M0:
        with np.errstate(over="ignore"):
            powers = np.ldexp(np.float64(1.0), codes - 127).astype(np.float32)
        return np.where(codes == 255, np.float32(np.nan), powers)
    bits, bias = (3, 7) if dtype is DType.F8_E4M3 else (2, 15)
    exponent, mantissa = (codes >> bits) & (2 ** (7 - bits) - 1), codes & (2**bits - 1)
    normal = np.ldexp(1.0 + mantissa / 2**bits, exponent - bias)
    values = np.where(exponent == 0, np.ldexp(mantissa / 2**bits, 1 - bias), normal)
    if dtype is DType.F8_E4M3:
        values = np.where(codes & 0x7F == 0x7F, np.nan, values)
    else:
        values = np.where(exponent == 31, np.where(mantissa == 0, np.inf, np.nan), values)
    return np.where(codes >= 128, -values, values).astype(np.float32)


def numbers(data: memoryview, dtype: DType) -> Floats:
    """Stored numbers as float32.

    >>> numbers(memoryview(bytes([0x80, 0x3F])), DType.BF16)
    array([1.], dtype=float32)
    """
    raw = np.frombuffer(data, dtype=np.uint8)
    if dtype in (DType.F8_E4M3, DType.F8_E5M2, DType.F8_E8M0):
        return float8_table(dtype)[raw]
    if dtype is DType.BF16:
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype=_NUMPY[dtype]).astype(np.float32)


def four_bits(data: memoryview, *, high_first: bool = False) -> npt.NDArray[np.uint8]:
    """The two halves of each byte in turn, the low one first.

    >>> four_bits(memoryview(bytes([0x21, 0x43]))).tolist()
    [1, 2, 3, 4]
    """
    packed = np.frombuffer(data, dtype=np.uint8)
    codes = np.empty(2 * len(packed), dtype=np.uint8)
    codes[int(high_first) :: 2], codes[1 - int(high_first) :: 2] = packed & 0x0F, packed >> 4
    return codes


def bytes_of(values: Floats) -> memoryview:
    """Numbers in a row as their bytes."""
    flat: Any = values.reshape(-1).view(np.uint8)
    return memoryview(flat)


_NUMPY = {
    DType.F64: "<f8",
    DType.F32: "<f4",
    DType.F16: "<f2",
    DType.I64: "<i8",
    DType.I32: "<i4",
    DType.I16: "<i2",
    DType.I8: "<i1",
    DType.U8: "<u1",
    DType.U16: "<u2",
    DType.U32: "<u4",
    DType.U64: "<u8",
    DType.BOOL: "<u1",
}
