"""Headers as the safetensors library writes them, read by one pattern, at a fifth of the time that JSON takes.

Whatever the pattern does not cover or a rule forbids is left to the reader of JSON, which has the words for it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from weakref import WeakValueDictionary

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo

LARGEST = 2**63 - 1
"""The largest size, offset or dimension that a header may state."""
MOST_AXES = 64
"""Axes of a tensor at most: what numpy and torch compute with."""
DTYPES = {dtype.name: dtype for dtype in DType}

_NUMBER = "0|[1-9][0-9]{0,18}+"
_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]*+)":\{"dtype":"(\w++)","shape":\[([0-9,]*+)\],'
    rf'"data_offsets":\[({_NUMBER}),({_NUMBER})\]\}}(?:,|\Z)'
)
_AROUND = len('"":{"dtype":"","shape":[],"data_offsets":[,]},')
"""Characters of an entry beside what the pattern takes out of it."""
_SHAPE = re.compile(rf"(?:(?:{_NUMBER})(?:,(?:{_NUMBER}))*+)?+")
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_METADATA = re.compile(rf'\{{"__metadata__":(\{{{_STRING}:{_STRING}(?:,{_STRING}:{_STRING})*+\}}),', re.DOTALL)


@dataclass(frozen=True)
class Entries:
    """The tensors of a header in storage order, where each starts in the data, and the size of the data.

    Tensors of one type and shape have one description.
    """

    tensors: dict[str, TensorInfo]
    starts: dict[str, int]
    size: int


_KNOWN: WeakValueDictionary[str, Entries] = WeakValueDictionary()
"""Entries of files that are open now, by their text: models of one make share them."""


def read_plain(text: str) -> tuple[Entries, dict[str, str]] | None:
    """The tensors and the metadata of a header that the pattern covers and that breaks no rule; else None."""
    begin, metadata = 1, {}
    found = _METADATA.match(text)
    if found is not None:
        read = _read_metadata(found[1])
        if read is None:
            return None
        begin, metadata = found.end(), read
    end = len(text.rstrip(" ")) - 1
    if text[end - 1 : end + 1] != "}}":  # of the last entry, and of all
        return None
    written = text[begin:end]
    entries = _KNOWN.get(written)
    if entries is None:
        entries = _read_entries(written)
        if entries is not None:
            _KNOWN[written] = entries
    return None if entries is None else (entries, metadata)


def _read_metadata(written: str) -> dict[str, str] | None:
    """The metadata, which maps text to text; None where it may hold something twice, or half a character."""
    try:
        read = json.loads(written)
    except ValueError:
        return None
    pairs = len(re.findall(_STRING, written, re.DOTALL)) // 2
    return None if "\\u" in written or len(read) != pairs else read


def _read_entries(written: str) -> Entries | None:
    rows = _ENTRY.findall(written)
    covered = sum(map(len, map("".join, rows))) + _AROUND * len(rows) - 1
    if covered != len(written):
        return None
    infos: dict[tuple[str, str], TensorInfo | None] = {}
    tensors: dict[str, TensorInfo] = {}
    starts: dict[str, int] = {}
    expected = 0
    for key, dtype, shape, first, last in rows:
        kind = dtype, shape
        info = infos[kind] if kind in infos else infos.setdefault(kind, _info(dtype, shape))
        start = int(first)
        if info is None or start != expected or int(last) - start != info.nbytes:
            return None
        tensors[key], starts[key] = info, start
        expected = start + info.nbytes
    if len(tensors) != len(rows) or "__metadata__" in tensors or expected > LARGEST:
        return None
    return Entries(tensors, starts, expected)


def _info(dtype: str, shape: str) -> TensorInfo | None:
    """A tensor's description; None where its type or shape is none that a header may have."""
    if dtype not in DTYPES or _SHAPE.fullmatch(shape) is None or shape.count(",") >= MOST_AXES:
        return None
    dims = tuple(int(size) for size in shape.split(",")) if shape else ()
    info = TensorInfo(DTYPES[dtype], dims)
    return None if info.nbytes > LARGEST or max(dims, default=0) > LARGEST else info
