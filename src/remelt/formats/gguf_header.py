"""The header of a GGUF file: what it says of itself, and where each tensor lies; read within the file's bounds.

Source: the specification of the format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from remelt.errors import FormatError
from remelt.formats.tensor_names import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_MOST_AXES = 8
_LONGEST_NAME = 2**16
_KEPT = 64
"""Numbers of an array that are kept: tokens are many, shapes are few."""
_LARGEST = 2**62


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file: its shape with the slowest axis first, the number of its type, and its offset."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file tells before its tensors' bytes."""

    version: int
    values: Mapping[str, object]
    """Numbers, texts and short arrays of numbers by name; the longer arrays are None."""
    spans: Mapping[str, tuple[int, int]]
    """Where each of them stands in the file, its name and type included."""
    tensors: Mapping[str, StoredTensor]
    data: int
    """Where the tensors' bytes begin."""
    alignment: int = 32


@dataclass
class _Cursor:
    view: memoryview
    name: str
    place: int = 0
    last: dict[str, int] = field(default_factory=dict)

    def take(self, size: int) -> memoryview:
        if size > len(self.view) - self.place:
            raise FormatError(
                f"{self.name}: its header needs {size} bytes at {self.place}, but the file has {len(self.view)}",
                hint="the file is damaged or cut off: download or copy it again",
            )
        found = self.view[self.place : self.place + size]
        self.place += size
        return found

    def number(self, code: str) -> int:
        (found,) = struct.unpack(code, self.take(struct.calcsize(code)))
        return found  # type: ignore[no-any-return]

    def text(self, longest: int = _LARGEST) -> str:
        size = self.number("<Q")
        if size > longest:
            raise FormatError(f"{self.name}: a name in its header is {size} bytes long")
        try:
            return bytes(self.take(size)).decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.name}: a text in its header is not UTF-8") from None

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise FormatError(f"{self.name}: a value in its header is of the unknown type {kind}")
        number = self.number(_SCALARS[kind])
        return bool(number) if kind == _BOOL else number

    def array(self) -> object:
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            data = self.take(count * size)
            return [one for (one,) in struct.iter_unpack(_SCALARS[kind], data)] if count <= _KEPT else None
        if kind != _STRING:
            raise FormatError(f"{self.name}: an array in its header is of the type {kind}, which is not supported")
        for _ in range(count):
            self.take(self.number("<Q"))
        return None


def read_gguf_header(view: memoryview, name: str) -> GgufHeader:
    """The header of a mapped file; `FormatError` where it is cut off, contradicts itself, or is of another version."""
    cursor = _Cursor(view, name, 4)
    version = cursor.number("<I")
    if version not in VERSIONS:
        other = "is of another byte order" if version % 2**16 == 0 else f"is GGUF version {version}"
        raise FormatError(f"{name} {other}, and versions 2 and 3 in little-endian order are read")
    count, pairs = cursor.number("<Q"), cursor.number("<Q")
    values: dict[str, object] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(pairs):
        begin = cursor.place
        key = cursor.text(_LONGEST_NAME)
        if key in values:
            raise FormatError(f"{name}: its header has {shown(key)} twice")
        values[key] = cursor.value(cursor.number("<I"))
        spans[key] = begin, cursor.place
    alignment = values.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise FormatError(f"{name}: {ALIGNMENT} is {alignment!r}, and a power of two is due")
    tensors = {}
    for _ in range(count):
        key, found = _tensor(cursor)
        if key in tensors:
            raise FormatError(f"{name}: tensor {shown(key)} is there twice")
        tensors[key] = found
    return GgufHeader(version, values, spans, tensors, -(-cursor.place // alignment) * alignment, alignment)


def _tensor(cursor: _Cursor) -> tuple[str, StoredTensor]:
    key, axes = cursor.text(_LONGEST_NAME), cursor.number("<I")
    if axes > _MOST_AXES:
        raise FormatError(f"{cursor.name}: tensor {shown(key)} has {axes} axes, and at most {_MOST_AXES} are allowed")
    shape = tuple(reversed([cursor.number("<Q") for _ in range(axes)]))
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if math.prod(shape) > _LARGEST or offset > _LARGEST:
        raise FormatError(f"{cursor.name}: tensor {shown(key)} of shape {list(shape)} is larger than any file")
    return key, StoredTensor(shape, kind, offset)


def encoded(value: object) -> bytes:
    """A value of a header with its type: texts, whole numbers, and lists of whole numbers.

    >>> encoded(7).hex(), encoded("a").hex()
    ('0400000007000000', '08000000010000000000000061')
    """
    if isinstance(value, str):
        data = value.encode()
        return struct.pack("<IQ", _STRING, len(data)) + data
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    assert isinstance(value, list)
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, 5, len(value), *value)
