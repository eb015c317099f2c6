"""The safetensors format: an 8-byte length, a JSON header, then the tensors' bytes without gaps.

Headers are held to the rules of the safetensors library before anything is allocated, so that what is opened here is
what every other tool opens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.mapped import MappedFile
from remelt.formats.plain_header import DTYPES, LARGEST, MOST_AXES, Entries, read_plain
from remelt.formats.tensor_names import is_text, shown

HEADER_CAP = 100_000_000
"""Bytes of a header at most: the safetensors library's own limit."""
DEPTH_CAP = 16
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Header:
    """A parsed header: tensors in storage order, their absolute offsets, and the metadata."""

    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    metadata: dict[str, str]
    shared: Entries | None = None
    """What files with the same tensors have in common while one of them is open."""


class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.format = "safetensors"
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                header = read_header(file, size, path.name)
                self._mapped = MappedFile(file, path)
        except OSError as error:
            raise FormatError(f"{path.name} cannot be read: {error.strerror}") from error
        self.tensors: Mapping[str, TensorInfo] = header.tensors
        self.metadata: Mapping[str, str] = header.metadata
        self._header, self._offsets = header, header.offsets

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes of a tensor, as a view into the mapped file."""
        begin = self._offsets[key]
        end = self.tensors[key].nbytes if stop is None else stop
        return self._mapped.view[begin + start : begin + end]

    def is_view(self, key: str) -> bool:
        """Always: the file is mapped."""
        return True

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """The tensor's bytes in the file."""
        return self._mapped.part(self._offsets[key] + start, stop - start)

    def position(self, key: str) -> tuple[int, int]:
        """The tensor's offset in the file."""
        return 0, self._offsets[key]

    def files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self.path,) if self.path is not None else ()

    def close(self) -> None:
        """Unmap the file, unless views of it are still held: then it goes with the last of them."""
        self._mapped.close()


def read_header(file: Any, size: int, name: str) -> Header:
    """The header of an open file of ``size`` bytes; nothing is allocated beyond what the file can hold."""
    start = file.read(8)
    if len(start) < 8:
        raise FormatError(f"{name} is not a safetensors file: it has {size} bytes, and the header's length takes 8")
    length = int.from_bytes(start, "little")
    if length > HEADER_CAP:
        raise FormatError(
            f"{name} is not a safetensors file: it states a header of {length} bytes, of {HEADER_CAP} allowed",
            hint="a .ckpt or .pt file opens under its own suffix or any other; a text file is no model",
        )
    if length > size - 8:
        raise FormatError(
            f"{name}: its header needs {length} bytes, but the file has {size - 8} after the length",
            hint="the file is cut off: download or copy it again",
        )
    return parse_header(file.read(length), size, name)


def parse_header(data: bytes, file_size: int, name: str) -> Header:
    """The header's JSON, held to the library's rules. ``file_size`` is that of the whole file."""
    if not data.startswith(b"{"):
        raise FormatError(f"{name}: a safetensors header begins with '{{', but this one with {data[:1]!r}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{name}: its header is not UTF-8 at byte {error.start}") from None
    begin = 8 + len(data)
    plain = read_plain(text)
    if plain is not None and begin + plain[0].size == file_size:
        entries, metadata = plain
        offsets = {key: begin + start for key, start in entries.starts.items()}
        return Header(entries.tensors, offsets, metadata, entries)
    return _parse_json(text, begin, file_size, name)


def _parse_json(text: str, begin: int, file_size: int, name: str) -> Header:
    """The header's JSON however it is written; ``begin`` is where the tensors' bytes do."""
    refuse_deep_json(text, name)
    try:
        parsed = json.loads(text, object_pairs_hook=without_duplicates)
    except Duplicate as error:
        raise FormatError(f"{name}: its header has {shown(error.args[0])} twice") from None
    except ValueError as error:
        raise FormatError(f"{name}: its header is not JSON: {error}") from None
    if "\\u" in text:
        _refuse_half_characters(parsed, name)
    metadata = _metadata(parsed, name)
    rows = sorted(((_entry(key, entry, name), key) for key, entry in parsed.items()), key=lambda pair: pair[0][1:])
    expected = 0
    tensors, offsets = {}, {}
    for (info, start, end), key in rows:
        if start != expected:
            kind = "overlaps the tensor before it" if start < expected else "leaves a gap after the tensor before it"
            raise FormatError(f"{name}: tensor {shown(key)} {kind}: it starts at {start}, and {expected} is due")
        tensors[key], offsets[key], expected = info, begin + start, end
    if begin + expected != file_size:
        short = begin + expected - file_size
        what = f"is {short} bytes short" if short > 0 else f"has {-short} bytes after its last tensor"
        raise FormatError(f"{name} {what}", hint="the file is damaged or cut off: download or copy it again")
    return Header(tensors, offsets, metadata)


class Duplicate(ValueError):
    """A JSON object names something twice."""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary; a name given twice is an error, as one of the two would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Duplicate(key)
            seen.add(key)
    return found


# A text is one match, closed or not, and nothing in it is tried twice: time and memory stay linear.
_NO_BRACKETS = re.compile(r'(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[^"\[\]{}]++)++', re.DOTALL)


def refuse_deep_json(text: str, name: str) -> None:
    """Refuse JSON that nests deeper than any header does, before a parser recurses into it."""
    brackets = _NO_BRACKETS.sub("", text)
    left = brackets
    for _ in range(DEPTH_CAP):  # each round takes the innermost level away
        left = left.replace("[]", "").replace("{}", "")
        if not left:
            return
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in "[{" else -1
        if depth > DEPTH_CAP:
            raise FormatError(f"{name}: its JSON nests deeper than {DEPTH_CAP} levels")


def _refuse_half_characters(parsed: dict[str, Any], name: str) -> None:
    """Refuse names and metadata with half a surrogate pair, which JSON can escape but no text can hold."""
    metadata = parsed.get("__metadata__")
    values = metadata.items() if isinstance(metadata, dict) else ()
    for text in (*parsed, *(part for pair in values for part in pair)):
        if isinstance(text, str) and not is_text(text):
            raise FormatError(f"{name}: its header has {shown(text)}, which is not Unicode text")


def _metadata(parsed: dict[str, Any], name: str) -> dict[str, str]:
    found = parsed.pop("__metadata__", None)
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"{name}: its metadata must map text to text")
    return found


def _entry(key: str, entry: object, name: str) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise FormatError(f"{name}: tensor {shown(key)} needs exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"{name}: tensor {shown(key)} is of type {shown(entry['dtype'])}, which is not supported")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise FormatError(f"{name}: tensor {shown(key)} needs whole numbers for its shape and two for its offsets")
    if len(shape) > MOST_AXES:
        raise FormatError(f"{name}: tensor {shown(key)} has {len(shape)} axes, and at most {MOST_AXES} are allowed")
    info = TensorInfo(dtype, tuple(shape))
    if info.nbytes > LARGEST:
        raise FormatError(f"{name}: tensor {shown(key)} of shape {shown(shape)} is larger than any file")
    if offsets[1] - offsets[0] != info.nbytes:
        raise FormatError(
            f"{name}: tensor {shown(key)} needs {info.nbytes} bytes by its type and shape, but its offsets give "
            f"{offsets[1] - offsets[0]}"
        )
    return info, offsets[0], offsets[1]


def _counts(value: object) -> bool:
    if type(value) is not list:
        return False
    for item in value:  # noqa: SIM110 - asked for every tensor of every file, a loop is twice as fast
        if type(item) is not int or not 0 <= item <= LARGEST:
            return False
    return True
