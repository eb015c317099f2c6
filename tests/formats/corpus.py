"""Malformed and hostile files, each built by code, each with what its refusal must say.

This file has the safetensors files and the folders; ``corpus_of_archives.py`` has zip archives and their pickles.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Builder = Callable[[Path], None]


class Case(NamedTuple):
    """A file that must be refused: ``build`` writes it, and the refusal's message has ``law``."""

    name: str
    build: Builder
    law: str


def header_file(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of any header, whose length may be stated wrongly."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _raw(name: str, content: bytes, law: str) -> Case:
    return Case(name, lambda path: path.write_bytes(content) and None, law)


def _header(name: str, header: Any, law: str, data: bytes = b"ab") -> Case:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _raw(name, header_file(text, data), law)


def _one(name: str, described: Any, law: str, data: bytes = b"ab") -> Case:
    return _header(name, {"w": described}, law, data)


def _two(name: str, first: tuple[int, int], second: tuple[int, int], law: str, size: int) -> Case:
    entries = {key: entry("U8", [stop - start], [start, stop]) for key, (start, stop) in (("v", first), ("w", second))}
    return _header(name, entries, law, b"x" * size)


def safetensors_cases() -> list[Case]:
    """Every rule of a safetensors header, broken once."""
    exact, numbers = "needs exactly dtype, shape and data_offsets", "needs whole numbers for its shape"
    fields = entry()
    return [
        _raw("an empty file", b"", "it has 0 bytes, and the header's length takes 8"),
        _raw("a file of seven bytes", b"\2\0\0\0\0\0\0", "it has 7 bytes, and the header's length takes 8"),
        _raw("a length without a header", (2).to_bytes(8, "little"), "needs 2 bytes, but the file has 0"),
        _raw("an empty header", header_file(b""), "begins with '{'"),
        _raw("a header longer than its file", header_file(b"{}", length=99), "its header needs 99 bytes"),
        _raw("a header beyond the cap", header_file(b"{}", length=100_000_001), "of 100000000 allowed"),
        _raw("a header of 2**63 bytes", header_file(b"{}", length=2**63), "of 100000000 allowed"),
        _raw("a header of 2**64-1 bytes", header_file(b"{}", length=2**64 - 1), "of 100000000 allowed"),
        _raw("a length in big endian", b"\0\0\0\0\0\0\0\2{}", "of 100000000 allowed"),
        _raw("a file of zeros", b"\0" * 4096, "begins with '{'"),
        _header("a header that begins with a space", b" {}", "begins with '{'", b""),
        _header("a header that is a list", b"[]", "begins with '{'", b""),
        _header("a header in UTF-16", "{}".encode("utf-16-le"), "its header is not JSON", b""),
        _header("a header that is not UTF-8", b'{"\xff\xfe": 1}', "its header is not UTF-8 at byte 2", b""),
        _header("an overlong UTF-8 form", b'{"\xc0\xaf": 1}', "its header is not UTF-8", b""),
        _header("a surrogate in UTF-8", b'{"\xed\xa0\x80": 1}', "its header is not UTF-8", b""),
        _header("JSON that stops", b'{"w": {"dtype"', "its header is not JSON", b""),
        _header("two JSON texts", b"{}{}", "its header is not JSON", b""),
        _header("JSON with a comment", b"{/* */}", "its header is not JSON", b""),
        _header("JSON with a last comma", b'{"w": 1,}', "its header is not JSON", b""),
        _header("a control character in a name", b'{"a\nb": 1}', "its header is not JSON", b""),
        _header("zero bytes after the JSON", b"{}\0\0", "its header is not JSON", b""),
        _header("a bomb of lists", b'{"w":' + b"[" * 1_000_000, "nests deeper than 16 levels", b""),
        _header("a bomb of objects", b'{"w":' * 200_000, "nests deeper than 16 levels", b""),
        _header(
            "a bomb behind brackets in text", b'{"]]]]]\\"]]":' + b"[" * 99_999, "nests deeper than 16 levels", b""
        ),
        _header("a number of a million digits", b'{"w":' + b"9" * 1_000_000 + b"}", "its header is not JSON", b""),
        _header("a metadata number", {"__metadata__": {"epoch": 3}}, "metadata must map text to text", b""),
        _header("nested metadata", {"__metadata__": {"a": {"b": "c"}}}, "metadata must map text to text", b""),
        _header("metadata that is text", {"__metadata__": "pt"}, "metadata must map text to text", b""),
        _header("metadata that is a list", {"__metadata__": []}, "metadata must map text to text", b""),
        _header("metadata given twice", b'{"__metadata__":{},"__metadata__":{}}', "has '__metadata__' twice", b""),
        _header("a key of metadata twice", b'{"__metadata__":{"a":"b","a":"c"}}', "has 'a' twice", b""),
        _header("half a character in metadata", b'{"__metadata__":{"a":"\\ud800"}}', "is not Unicode text", b""),
        _header("half a character in a name", {"\ud800": fields}, "has '\\ud800', which is not Unicode text"),
        _header("a tensor twice", json.dumps({"w": fields}).encode()[:-1] + b',"w":1}', "has 'w' twice"),
        _header("a field twice", b'{"w":{"dtype":"U8","dtype":"I8"}}', "has 'dtype' twice"),
        _one("a tensor that is text", "U8", exact),
        _one("a tensor that is null", None, exact),
        _one("a tensor without fields", {}, exact),
        _one("a tensor without a dtype", {"shape": [2], "data_offsets": [0, 2]}, exact),
        _one("a tensor without a shape", {"dtype": "U8", "data_offsets": [0, 2]}, exact),
        _one("a tensor without offsets", {"dtype": "U8", "shape": [2]}, exact),
        _one("a tensor with another field", {**fields, "strides": [1]}, exact),
        _one("an unknown dtype", entry("F4"), "is of type 'F4', which is not supported"),
        _one("a dtype in small letters", entry("u8"), "is of type 'u8', which is not supported"),
        _one("a dtype that is a number", entry(8), "is of type 8, which is not supported"),
        _one("a dtype that is a list", entry(["U8"]), "is of type ['U8'], which is not supported"),
        _one("a dtype of a million letters", entry("U" * 1_000_000), "(of 1000000 characters)"),
        _one("a shape that is a number", entry(shape=2), numbers),
        _one("a shape that is text", entry(shape="2"), numbers),
        _one("a shape that is an object", entry(shape={"0": 2}), numbers),
        _one("a negative length", entry(shape=[-2]), numbers),
        _one("two negative lengths", entry(shape=[-1, -2]), numbers),
        _one("a fractional length", entry(shape=[2.0]), numbers),
        _one("a length that is true", entry(shape=[True, 2]), numbers),
        _one("a length that is null", entry(shape=[None]), numbers),
        _header("a length that is NaN", b'{"w":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', numbers),
        _header("a length of 1e400", b'{"w":{"dtype":"U8","shape":[1e400],"data_offsets":[0,2]}}', numbers),
        _one("a length of 2**64", entry(shape=[2**64]), numbers),
        _one("a shape whose product wraps to 2", entry(shape=[2**33, 2**31, 2]), "is larger than any file"),
        _one("a size that wraps with its dtype", entry("F64", [2**61]), "is larger than any file"),
        _one("a million axes", entry(shape=[1] * 200_000), "has 200000 axes, and at most 64 are allowed"),
        _one("a bomb of long axes", entry(shape=[2**62] * 40_000), "has 40000 axes"),
        _one("one offset", entry(offsets=[0]), "two for its offsets"),
        _one("three offsets", entry(offsets=[0, 2, 4]), "two for its offsets"),
        _one("a negative offset", entry(offsets=[-2, 0]), "two for its offsets"),
        _one("a fractional offset", entry(offsets=[0, 2.0]), "two for its offsets"),
        _one("an offset that is false", entry(offsets=[False, 2]), "two for its offsets"),
        _one("an offset that is text", entry(offsets=["0", "2"]), "two for its offsets"),
        _one("an offset of 2**64", entry(offsets=[2**64 - 2, 2**64]), "two for its offsets"),
        _one(
            "offsets in reverse", entry(offsets=[2, 0]), "needs 2 bytes by its type and shape, but its offsets give -2"
        ),
        _one("too few bytes for the shape", entry(offsets=[0, 1]), "needs 2 bytes", b"a"),
        _one("too many bytes for the shape", entry("F16", [2], [0, 8]), "needs 4 bytes", b"x" * 8),
        _one("bytes of an empty tensor", entry(shape=[0, 9]), "needs 0 bytes"),
        _one(
            "a hole before the first tensor", entry(offsets=[2, 4]), "leaves a gap after the tensor before it", b"xxxx"
        ),
        _two("a hole between tensors", (0, 2), (3, 5), "'w' leaves a gap", 5),
        _two("tensors that overlap", (0, 3), (2, 5), "'w' overlaps the tensor before it", 5),
        _two("two tensors of the same bytes", (0, 4), (0, 4), "'w' overlaps the tensor before it", 4),
        _two("a tensor inside another", (0, 8), (2, 4), "'w' overlaps the tensor before it", 8),
        _one("a file cut off in its data", entry(), "is 1 bytes short", b"a"),
        _one("a file without its data", entry("F32", [10**9], [0, 4 * 10**9]), "is 4000000000 bytes short", b""),
        _one("bytes after the last tensor", entry(), "has 3 bytes after its last tensor", b"abcde"),
        _header("bytes after no tensors", {}, "has 2 bytes after its last tensor"),
        _header("a refusal of a long name", {"n" * 500_000: {}}, "(of 500000 characters)"),
        _raw("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "failed download"),
        _raw("a page of HTML", b"<!DOCTYPE html><html>not found</html>" * 9, "failed download"),
        _raw("an old GGUF file", b"GGUF\1\0\0\0" + b"\0" * 64, "is GGUF version 1"),
        _raw("an HDF5 file", b"\x89HDF\r\n\x1a\n" + b"\0" * 64, "it is an HDF5 file"),
        _raw("a numpy array", b"\x93NUMPY\1\0" + b"\0" * 64, "it is a numpy array"),
        _raw("a file in gzip", b"\x1f\x8b\x08" + b"\0" * 64, "compressed with gzip"),
        _raw("noise", bytes(range(255, 0, -1)) * 8, "of 100000000 allowed"),
    ]


def _write_folder(path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    path.mkdir(exist_ok=True)


def _shard(*keys: str) -> bytes:
    header = {key: entry("U8", [1], [place, place + 1]) for place, key in enumerate(keys)}
    return header_file(json.dumps(header).encode(), b"x" * len(keys))


def _index(name: str, index: Any, law: str, files: dict[str, bytes] | None = None) -> Case:
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    content = {"model.safetensors.index.json": text, **(files or {"a.safetensors": _shard("w")})}
    return Case(name, lambda path: _write_folder(path, content), law)


def _folder(name: str, files: dict[str, bytes], law: str) -> Case:
    return Case(name, lambda path: _write_folder(path, files), law)


def _mapped(name: str, weight_map: Any, law: str, files: dict[str, bytes] | None = None) -> Case:
    return _index(name, {"weight_map": weight_map}, law, files)


def folder_cases() -> list[Case]:
    """Indexes that leave their folder or disagree with it, and folders that are no model, or several."""
    inside, needs = "a shard is a file name in the same folder", "needs a weight_map of tensor names to shard names"
    shard = _shard("w")
    return [
        _mapped("a shard outside the folder", {"w": "../a.safetensors"}, inside),
        _mapped("a shard outside by a detour", {"w": "x/../../a.safetensors"}, inside),
        _mapped("a shard outside for Windows", {"w": "..\\a.safetensors"}, inside),
        _mapped("a shard by its absolute path", {"w": "/etc/passwd"}, inside),
        _mapped("a shard on another drive", {"w": "C:a.safetensors"}, inside),
        _mapped("a shard on another machine", {"w": "\\\\host\\share\\a.safetensors"}, inside),
        _mapped("a shard without a name", {"w": ""}, inside),
        _mapped("a shard with a zero byte", {"w": "a\0.safetensors"}, inside),
        _mapped("a shard that is a number", {"w": 1}, inside),
        _mapped("a shard that is a list", {"w": ["a.safetensors"]}, inside),
        _mapped("a shard that is the folder", {"w": "."}, "names the shard '.', which is not there"),
        _mapped("a missing shard", {"w": "b.safetensors"}, "names the shard 'b.safetensors', which is not there"),
        _mapped("a shard named by half a character", {"w": "\ud800"}, "which is not there"),
        _mapped("a shard of a long name", {"w": "x" * 100_000}, "(of 100000 characters), which is not there"),
        _mapped("a key that no shard has", {"v": "a.safetensors"}, "says that 'v' is in a.safetensors, but it is not"),
        _mapped(
            "a key that is not listed", {"w": "a.safetensors"}, "'v', which model", {"a.safetensors": _shard("w", "v")}
        ),
        _mapped("a shard that is damaged", {"w": "a.safetensors"}, "is 1 bytes short", {"a.safetensors": shard[:-1]}),
        _mapped("a shard that is text", {"w": "a.safetensors"}, "failed download", {"a.safetensors": b"<html>" * 99}),
        _mapped("a weight map that is a list", ["w"], needs),
        _mapped("a weight map that is text", "a.safetensors", needs),
        _mapped("a weight map that is empty", {}, needs),
        _mapped("a weight map that is null", None, needs),
        _index("an index without a weight map", {"metadata": {}}, needs),
        _index("an index that is a list", [], needs),
        _index("an index that is no JSON", b"w: a.safetensors", "is not JSON text"),
        _index("an index that is empty", b"", "is not JSON text"),
        _index("an index that is not UTF-8", b'{"weight_map": "\xff"}', "is not JSON text"),
        _index("an index that nests deeply", b'{"a":' * 100_000, "nests deeper than 16 levels"),
        _index("an index with a key twice", b'{"weight_map":{"w":"a","w":"b"}}', "names 'w' twice"),
        _folder(
            "two indexes",
            {f"{n}.safetensors.index.json": b"{}" for n in "ab"},
            "has 2 index files: a.safetensors.index",
        ),
        _folder("an empty folder", {}, "holds no model"),
        _folder("a folder of other things", {"config.json": b"{}", "x/vocab.txt": b"a"}, "holds no model"),
        _folder(
            "several models", {f"{n}.safetensors": shard for n in "abc"}, "has 3 weight files and no index: a.safe"
        ),
        _folder("shards without an index", {f"model-0000{n}-of-00002.safetensors": shard for n in "12"}, "no index"),
        _folder("a component of several models", {f"unet/{n}.bin": b"" for n in "ab"}, "unet has 2 weight files"),
        _folder("a damaged component", {"unet/model.safetensors": shard[:-1]}, "model.safetensors is 1 bytes short"),
    ]
