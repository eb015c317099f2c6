"""A disk on paper: what a program asked of the file system, and what a power cut may leave of it.

Writes, and changes of a folder, may be lost or reach the disk in any order until what they belong to is flushed.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from remelt.engine.sink import FileSink


@dataclass
class Recording:
    """Every operation below a folder, in order, with the files by number as they were first opened."""

    folder: Path
    operations: list[tuple[Any, ...]] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    folders: dict[int, str] = field(default_factory=dict)
    named: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def inside(self, path: Any) -> str | None:
        text = os.fspath(path)
        return os.path.relpath(text, self.folder) if str(text).startswith(str(self.folder)) else None


def record(folder: Path, patch: pytest.MonkeyPatch) -> Recording:
    """Note what happens below a folder from now on, until the patch is undone."""
    told = Recording(folder)
    patch.setattr(FileSink, "place", lambda *_: None)  # every write is asked of Python
    real = {
        name: getattr(os, name)
        for name in ("open", "pwrite", "write", "ftruncate", "posix_fallocate", "fsync", "replace", "unlink", "close")
    }

    def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        descriptor = real["open"](path, flags, *rest, **named)
        name = told.inside(path)
        if name is not None and os.path.isdir(path):
            told.folders[descriptor] = name
        elif name is not None:
            if name not in told.named:
                told.count += 1
                told.named[name] = told.count
                told.operations.append(("create", name, told.count))
            told.numbers[descriptor] = told.named[name]
            if flags & os.O_TRUNC:
                told.operations.append(("size", told.named[name], 0))
        return int(descriptor)

    def closed(descriptor: int) -> None:
        told.numbers.pop(descriptor, None)
        told.folders.pop(descriptor, None)
        real["close"](descriptor)

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        written = real["pwrite"](descriptor, data, offset)
        if descriptor in told.numbers:
            told.operations.append(("write", told.numbers[descriptor], offset, bytes(data[:written])))
        return int(written)

    def write(descriptor: int, data: Any) -> int:
        place = os.lseek(descriptor, 0, os.SEEK_CUR) if descriptor in told.numbers else 0
        if descriptor in told.numbers and os.get_blocking(descriptor):
            import fcntl

            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
                place = os.fstat(descriptor).st_size
        written = real["write"](descriptor, data)
        if descriptor in told.numbers:
            told.operations.append(("write", told.numbers[descriptor], place, bytes(data[:written])))
        return int(written)

    def sized(descriptor: int, *rest: int) -> None:
        real["ftruncate" if len(rest) == 1 else "posix_fallocate"](descriptor, *rest)
        if descriptor in told.numbers:
            told.operations.append(("size", told.numbers[descriptor], rest[-1]))

    def fsync(descriptor: int) -> None:
        real["fsync"](descriptor)
        if descriptor in told.numbers:
            told.operations.append(("flush", told.numbers[descriptor]))
        elif descriptor in told.folders:
            told.operations.append(("flush folder", told.folders[descriptor]))

    def replace(old: Any, new: Any, **named: Any) -> None:
        real["replace"](old, new, **named)
        before, after = told.inside(old), told.inside(new)
        if before is not None and after is not None:
            told.named[after] = told.named.pop(before)
            told.operations.append(("rename", before, after))

    def unlink(path: Any, **named: Any) -> None:
        real["unlink"](path, **named)
        name = told.inside(path)
        if name is not None:
            told.named.pop(name, None)
            told.operations.append(("remove", name))

    for name, stand_in in {
        "open": opened,
        "close": closed,
        "pwrite": pwrite,
        "write": write,
        "ftruncate": sized,
        "posix_fallocate": sized,
        "fsync": fsync,
        "replace": replace,
        "unlink": unlink,
    }.items():
        patch.setattr(os, name, stand_in)
    return told


Names = dict[str, bytes | int]
"""Content of a file from before, or the number of one that was opened."""


def after_power_cut(
    operations: list[tuple[Any, ...]], before: dict[str, bytes], chance: random.Random | None, keep: str = ""
) -> dict[str, bytes]:
    """What is found after a cut behind the last operation; ``chance`` decides of each that was not flushed.

    Without it, all that was not flushed is lost, but for the kind in ``keep``: ``names`` or ``data``.
    """
    survives = [_flushed(operations, place) for place in range(len(operations))]
    if chance is not None:
        survives = [flushed or chance.random() < 0.5 for flushed in survives]
    contents: dict[int, bytearray] = {}
    names: Names = dict(before)
    for (kind, *rest), lasting in zip(operations, survives, strict=True):
        of_names = kind in ("create", "rename", "remove")
        if not lasting and keep != ("names" if of_names else "data"):
            if kind == "create":
                contents.setdefault(rest[1], bytearray())
            continue
        _apply(kind, rest, contents, names)
    return {name: bytes(contents[what]) if isinstance(what, int) else what for name, what in names.items()}


def _apply(kind: str, rest: list[Any], contents: dict[int, bytearray], names: Names) -> None:
    if kind == "create":
        contents.setdefault(rest[1], bytearray())
        names[rest[0]] = rest[1]
    elif kind == "rename":
        if rest[0] in names:
            names[rest[1]] = names.pop(rest[0])
    elif kind == "remove":
        names.pop(rest[0], None)
    elif kind == "size":
        content = contents.setdefault(rest[0], bytearray())
        content[:] = content[: rest[1]].ljust(rest[1], b"\0")
    elif kind == "write":
        content = contents.setdefault(rest[0], bytearray())
        content[:] = content.ljust(rest[1] + len(rest[2]), b"\0")
        content[rest[1] : rest[1] + len(rest[2])] = rest[2]


def _flushed(operations: list[tuple[Any, ...]], place: int) -> bool:
    """Whether what an operation did was flushed by a later one."""
    kind, subject, *_ = operations[place]
    for later, flushed, *_ in operations[place + 1 :]:
        if kind in ("write", "size") and later == "flush" and flushed == subject:
            return True
        of_names = kind in ("create", "rename", "remove") and later == "flush folder"
        if of_names and flushed == (os.path.dirname(subject) or "."):
            return True
    return False
