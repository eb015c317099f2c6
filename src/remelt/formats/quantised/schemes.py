"""The ways to store a tensor in few bits: each gives some of its elements as float32, from the tensors that hold it.

Every formula is that of the tool that writes such files; results agree with its own bit for bit, in float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from remelt.core.tensor_info import TensorInfo
from remelt.formats.quantised.codes import E2M1, Floats, four_bits, numbers

Read = Callable[[str, int, int], memoryview]
"""Bytes of a stored tensor, from one to another."""


@dataclass(frozen=True)
class Quantised(ABC):
    """A tensor that others hold: its shape, and the keys of those by what they are to it."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    infos: Mapping[str, TensorInfo]
    """Types and shapes of the parts, by what they are."""

    name: ClassVar[str] = ""
    """What users call it."""

    @property
    def grain(self) -> int:
        """Elements at multiples of which it can be taken."""
        return max(self.shape[-1], 1)

    @abstractmethod
    def elements(self, read: Read, begin: int, end: int) -> Floats:
        """Elements from a multiple of the grain to another, or to the end."""

    def whole(self, read: Read, part: str) -> Floats:
        """All numbers of a part."""
        info = self.infos[part]
        return numbers(read(self.parts[part], 0, info.nbytes), info.dtype)

    def some(self, read: Read, part: str, begin: int, end: int) -> Floats:
        """Some numbers of a part."""
        info = self.infos[part]
        width = info.dtype.itemsize
        return numbers(read(self.parts[part], begin * width, end * width), info.dtype)

    @property
    def described(self) -> str:
        """In a word or two: what the parts are."""
        return self.name


@dataclass(frozen=True)
class Scaled(Quantised):
    """Small numbers times a scale: one for all, one for each row, or one for each block.

    Formula: weight * scale, with the scale of the element's block; ``[1, 1]`` blocks divide the shape evenly, or are of
    ``block`` rows and columns, the last ones smaller.

    Source: ComfyUI (``scale_weight``), compressed-tensors (``weight_scale``), DeepSeek-V3 (``weight_scale_inv``, which
    is a scale for all its name), bitsandbytes (``SCB``, of int8: the largest element of a row, of 127 steps).
    """

    grid: tuple[int, int] = (1, 1)
    """Scales down and across."""
    block: tuple[int, int] = (0, 0)
    """Rows and columns of a block; (0, 0) where the grid divides the shape."""
    divisor: float = 1.0

    name = "scaled"

    @property
    def grain(self) -> int:
        """Any element where there is one scale, else rows."""
        return 1 if self.infos["scale"].numel == 1 else max(self.shape[-1], 1)

    def elements(self, read: Read, begin: int, end: int) -> Floats:
        """Elements of some rows."""
        values = self.some(read, "weight", begin, end)
        scales = self.whole(read, "scale")
        if self.divisor != 1.0:
            scales = scales / np.float32(self.divisor)
        if self.grain == 1:
            alike: Floats = values * scales.reshape(-1)[0]
            return alike
        width = self.shape[-1]
        height = self.shape[-2] if len(self.shape) > 1 else 1
        down, across = self.grid
        tall, wide = self.block if self.block != (0, 0) else (-(-height // down), -(-width // across))
        rows = np.arange(begin // width, end // width)
        table = scales.reshape(-1, down, across)
        chosen = table[rows // height if len(table) > 1 else 0, (rows % height) // tall]
        found: Floats = (values.reshape(-1, width) * np.repeat(chosen, wide, axis=1)[:, :width]).reshape(-1)
        return found

    @property
    def described(self) -> str:
        """The type, and how many scales there are."""
        kind = str(self.infos["weight"].dtype)
        if self.grain == 1:
            return f"{kind} with a scale"
        return f"{kind} with a scale a row" if self.grid[1] == 1 else f"{kind} with a scale a block"


@dataclass(frozen=True)
class Packed(Quantised):
    """Two four-bit floats a byte, with a scale of powers of two for every 32 of them.

    Formula: value * 2^(scale - 127), the first of two in the low half of a byte.

    Source: Open Compute Project, microscaling formats (MXFP4); ``gpt-oss``, whose tensors are ``turned``: transposed.
    """

    turned: bool = False

    name = "mxfp4"

    @property
    def grain(self) -> int:
        """A row, or a matrix where rows are columns of what is stored."""
        return max(self.shape[-2] * self.shape[-1], 1) if self.turned else max(self.shape[-1], 1)

    def elements(self, read: Read, begin: int, end: int) -> Floats:
        """Elements of some rows or matrices."""
        group = 2 * self.infos["weight"].shape[-1] if self.turned else self.group
        codes = four_bits(read(self.parts["weight"], begin // 2, end // 2))
        exponents = np.frombuffer(read(self.parts["scale"], begin // group, end // group), dtype=np.uint8)
        with np.errstate(over="ignore"):
            values = np.ldexp(E2M1[codes].reshape(-1, group), exponents.astype(np.int32)[:, None] - 127)
        if not self.turned:
            return values.reshape(-1)
        down, across = self.shape[-2:]
        return values.reshape(-1, across, down).transpose(0, 2, 1).reshape(-1)

    @property
    def group(self) -> int:
        """Elements that share a scale."""
        return math.prod(self.shape) // max(math.prod(self.infos["scale"].shape), 1)


@dataclass(frozen=True)
class NvPacked(Quantised):
    """Two four-bit floats a byte, with an eight-bit scale for every 16 of them, and one for all.

    Formula: value * scale * scale of all, the first of two in the low half of a byte.

    Source: NVIDIA's NVFP4, as compressed-tensors and ModelOpt write it: ``weight_scale`` and ``weight_scale_2``.
    """

    name = "nvfp4"

    def elements(self, read: Read, begin: int, end: int) -> Floats:
        """Elements of some rows."""
        group = math.prod(self.shape) // max(math.prod(self.infos["scale"].shape), 1)
        codes = four_bits(read(self.parts["weight"], begin // 2, end // 2))
        scales = self.some(read, "scale", begin // group, end // group) * self.whole(read, "whole").reshape(-1)[0]
        found: Floats = (E2M1[codes].reshape(-1, group) * scales[:, None]).reshape(-1)
        return found


@dataclass(frozen=True)
class Mapped(Quantised):
    """Two codes a byte, each the place of a number in a table of sixteen, times the largest element of its block.

    Formula: table[code] * absmax[block], the first of two in the high half of a byte. Where the largest elements are
    quantised themselves (``nested``): absmax = nested_table[code] * nested_absmax[block of 256] + offset.

    Source: bitsandbytes, NF4 and FP4 (QLoRA, arXiv 2305.14314).
    """

    block: int = 64
    nested_block: int = 256
    offset: float = 0.0
    kind: str = "nf4"

    name = "nf4"

    @property
    def grain(self) -> int:
        """A block: rows need not begin with one."""
        return self.block

    def elements(self, read: Read, begin: int, end: int) -> Floats:
        """Elements of some blocks."""
        codes = four_bits(read(self.parts["weight"], begin // 2, -(-end // 2)), high_first=True)
        first, last = begin // self.block, -(-end // self.block)
        if "nested_absmax" in self.parts:
            places = np.frombuffer(read(self.parts["absmax"], first, last), dtype=np.uint8)
            above = self.whole(read, "nested_absmax")[np.arange(first, last) // self.nested_block]
            largest = self.whole(read, "nested_quant_map")[places] * above + np.float32(self.offset)
        else:
            largest = self.some(read, "absmax", first, last)
        values = self.whole(read, "quant_map")[codes[: end - begin]]
        values *= np.repeat(largest, self.block)[: end - begin]
        return values

    @property
    def described(self) -> str:
        """The table's name."""
        return self.kind


def scale_grid(
    shape: tuple[int, ...], scale: TensorInfo, block: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """How many scales there are down and across, and the blocks they are of; None where they fit no way.

    >>> from remelt.core.dtype import DType
    >>> scale_grid((256, 300), TensorInfo(DType.F32, (2, 3)), (128, 128))
    ((2, 3), (128, 128))
    >>> scale_grid((256, 300), TensorInfo(DType.F32, (256, 1)), None)
    ((256, 1), (0, 0))
    """
    count = math.prod(scale.shape)
    if count == 1:
        return (1, 1), (0, 0)
    if len(shape) < 2:
        return None
    height, width = shape[-2:]
    matrices = math.prod(shape[:-2])
    if len(scale.shape) == 1 and count == height and matrices == 1:
        return (height, 1), (0, 0)
    if len(scale.shape) != len(shape) or scale.shape[:-2] != shape[:-2]:
        return ((1, 1), (0, 0)) if count == matrices and len(shape) > 2 else None
    down, across = scale.shape[-2:]
    if block is not None and (down, across) == (-(-height // block[0]), -(-width // block[1])):
        return (down, across), block
    usual = (128, 128)
    if (down, across) == (-(-height // usual[0]), -(-width // usual[1])):
        return (down, across), usual
    if down and across and height % down == 0 and width % across == 0:
        return (down, across), (0, 0)
    return None
