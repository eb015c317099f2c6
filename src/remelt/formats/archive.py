"""Zip archives as torch writes them: members stored as they are, found without reading them."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from remelt.errors import FormatError
from remelt.formats.tensor_names import shown

_UTF8 = 0x800
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x1 | 0x40 | 0x2000
"""Flags of members that are encrypted, strongly encrypted, or whose directory entry is masked."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's bytes are in the file."""

    offset: int
    size: int


def read_members(file: BinaryIO, path: Path) -> dict[str, Member]:
    """The members of an archive by name.

    Raises `FormatError` for members that are compressed, encrypted, doubled, overlapping, or out of the file's bounds.
    """
    name = path.name
    try:
        with zipfile.ZipFile(file) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OverflowError,
        struct.error,
        UnicodeDecodeError,
    ) as error:
        raise FormatError(
            f"{name} is not a whole zip archive: {error}", hint="the file is damaged: download it again"
        ) from None
    members: dict[str, Member] = {}
    ranges: list[tuple[int, int, str]] = []
    for info in infos:
        member = shown(info.filename)
        if info.flag_bits & _ENCRYPTED:
            raise FormatError(f"{name}: member {member} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise FormatError(f"{name}: member {member} is compressed, but a checkpoint's members are stored")
        if info.filename in members:
            raise FormatError(f"{name}: member {member} is there twice")
        start = _data_offset(file, info, directory, name)
        members[info.filename] = Member(start, info.file_size)
        ranges.append((info.header_offset, start + info.file_size, member))
    end = 0
    for begin, finish, member in sorted(ranges):
        if begin < end:
            raise FormatError(f"{name}: member {member} overlaps the one before it")
        end = finish
    return members


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo, directory: int, name: str) -> int:
    """Where the member's data begins, by its local header; all of it is before the directory."""
    member = shown(info.filename)
    if not 0 <= info.header_offset <= directory - _LOCAL_HEADER.size:
        raise FormatError(f"{name}: member {member} begins outside the file's data")
    file.seek(info.header_offset)
    magic, *_, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != b"PK\x03\x04":
        raise FormatError(f"{name}: member {member} has no local header where the directory says")
    encoding = "utf-8" if info.flag_bits & _UTF8 else "cp437"
    if file.read(name_length).decode(encoding, errors="replace") != info.orig_filename:
        raise FormatError(f"{name}: member {member} has another name in its local header")
    start: int = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if start + info.file_size > directory:
        raise FormatError(f"{name}: member {member} goes beyond the end of the file's data")
    return start
