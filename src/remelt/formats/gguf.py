"""GGUF files, as llama.cpp and ComfyUI read them: quantised tensors as numbers, by the package ``gguf``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.gguf_header import StoredTensor, read_gguf_header
from remelt.formats.mapped import MappedFile
from remelt.formats.quantised.codes import Floats
from remelt.formats.quantised.schemes import Quantised, Read
from remelt.formats.tensor_names import shown

PLAIN = {
    0: DType.F32,
    1: DType.F16,
    24: DType.I8,
    25: DType.I16,
    26: DType.I32,
    27: DType.I64,
    28: DType.F64,
    30: DType.BF16,
}
"""Types that are no quantisation, by their numbers in the format."""
Q8_0 = 8
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""What ComfyUI's files put before the key of a tensor that has another shape there."""


@dataclass(frozen=True)
class Blocks(Quantised):
    """Blocks of bytes, each of which stands for some numbers of a row.

    Source: ggml; the formulas are those of the package ``gguf``.
    """

    kind: int = 0
    block: int = 1
    size: int = 1

    name = "gguf"

    @property
    def grain(self) -> int:
        """A block: rows begin with one."""
        return self.block

    def elements(self, read: Read, begin: int, end: int) -> Floats:
        """Elements of some blocks."""
        data = read(self.parts["weight"], begin // self.block * self.size, end // self.block * self.size)
        library = gguf_library("quantised tensors")
        raw = np.frombuffer(data, dtype=np.uint8).reshape(1, -1)
        found: Floats = library.quants.dequantize(raw, library.GGMLQuantizationType(self.kind))
        return found.reshape(-1)

    @property
    def described(self) -> str:
        """The name of the type."""
        return str(gguf_library("types").GGMLQuantizationType(self.kind).name)


class GgufCheckpoint(Checkpoint):
    """One GGUF file, mapped into memory; tensors that it has ``quantised`` are bytes.

    Raises `FormatError` for files that are damaged, and for quantised ones where the package ``gguf`` is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.format = "gguf"
        self.quantised: dict[str, Blocks] = {}
        try:
            with open(path, "rb") as file:
                self._mapped = MappedFile(file, path)
        except OSError as error:
            raise FormatError(f"{path.name} cannot be read: {error.strerror}") from error
        try:
            self.header = read_gguf_header(self._mapped.view, path.name)
            self.tensors: Mapping[str, TensorInfo] = {
                key: self._info(key, stored)
                for key, stored in sorted(self.header.tensors.items(), key=lambda pair: pair[1].offset)
            }
        except BaseException:
            self._mapped.close()
            raise
        texts = {key: value for key, value in self.header.values.items() if isinstance(value, (str, int, float))}
        self.metadata: Mapping[str, str] = {key: str(value) for key, value in texts.items()}

    def _info(self, key: str, stored: StoredTensor) -> TensorInfo:
        name = self.path.name if self.path is not None else ""
        block, size = block_sizes(stored.kind, f"{name}: tensor {shown(key)}")
        shape, count = self._shape(key, stored), math.prod(stored.shape)
        if count % block or (block > 1 and stored.shape and stored.shape[-1] % block):
            what = f"tensor {shown(key)} of shape {list(stored.shape)}"
            raise FormatError(f"{name}: {what} is not made of blocks of {block}")
        if self.header.data + stored.offset + count // block * size > len(self._mapped.view):
            raise FormatError(
                f"{name} ends before tensor {shown(key)} does", hint="the file is cut off: download or copy it again"
            )
        if stored.kind in PLAIN:
            return TensorInfo(PLAIN[stored.kind], shape)
        info = TensorInfo(DType.U8, (*stored.shape[:-1], stored.shape[-1] // block * size))
        self.quantised[key] = Blocks(shape, {"weight": key}, {"weight": info}, stored.kind, block, size)
        return info

    def _shape(self, key: str, stored: StoredTensor) -> tuple[int, ...]:
        told = self.header.values.get(ORIGINAL_SHAPE + key)
        if not isinstance(told, list):
            return stored.shape
        if math.prod(told) != math.prod(stored.shape) or any(side < 0 for side in told):
            name = self.path.name if self.path is not None else ""
            raise FormatError(f"{name}: {shown(key)} is said to be {told}, but is stored as {list(stored.shape)}")
        return tuple(told)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes of a tensor as it is stored."""
        begin = self.header.data + self.header.tensors[key].offset
        end = self.tensors[key].nbytes if stop is None else stop
        return self._mapped.view[begin + start : begin + end]

    @property
    def raw(self) -> memoryview:
        """All bytes of the file."""
        return self._mapped.view

    def is_view(self, key: str) -> bool:
        """Always: the file is mapped."""
        return True

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """The tensor's bytes in the file."""
        return self._mapped.part(self.header.data + self.header.tensors[key].offset + start, stop - start)

    def position(self, key: str) -> tuple[int, int]:
        """The tensor's offset in the file."""
        return 0, self.header.data + self.header.tensors[key].offset

    def files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self.path,) if self.path is not None else ()

    def close(self) -> None:
        """Unmap the file."""
        self._mapped.close()


def block_sizes(kind: int, what: str) -> tuple[int, int]:
    """Elements of a block of a type, and its bytes; `FormatError` for a type that is not known."""
    if kind in PLAIN:
        return 1, PLAIN[kind].itemsize
    library = gguf_library(what)
    try:
        block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise FormatError(
            f"{what} is of the type {kind}, which gguf {_version()} does not know", hint="pip install --upgrade gguf"
        ) from None
    return int(block), int(size)


def gguf_library(what: str) -> Any:
    """The package ``gguf``; `FormatError` with the extra to install where it is missing."""
    try:
        library = importlib.import_module("gguf")
        importlib.import_module("gguf.quants")
    except ImportError:
        raise FormatError(f"{what} of a GGUF file need the package gguf", hint='pip install "remelt[gguf]"') from None
    return library


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")
