"""The journal beside an unfinished result: which parts of which tensors are complete, with their checksums.

Its first line is a fingerprint of everything that decides the result's bytes; a journal of anything else is not
continued. It need not be flushed in step with the data: what it says is verified against the data before it is
believed, so that a line without its data, or data without its line, costs time and nothing else.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_LONGEST = 2**28
_PUBLISHING = {"publishing": "begun"}


@dataclass(frozen=True)
class Part:
    """Bytes ``start`` to ``stop`` of a tensor of the result, complete, with their checksum."""

    key: str
    start: int
    stop: int
    checksum: int


class Journal:
    """An append-only record of finished parts."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.was_publishing = False
        """Whether the earlier run had begun to give its files their final names."""
        self._descriptor = -1

    def parts(self) -> Iterator[Part]:
        """What an earlier run finished of the same result; nothing where the journal is another's, or damaged.

        Reading stops at the first damaged line: a kill may cut the last one.
        """
        try:
            if self.path.stat().st_size > _LONGEST:
                return
            lines = self.path.read_bytes().split(b"\n")
        except OSError:
            return
        if not lines or _opened(lines[0]) != {"fingerprint": self.fingerprint}:
            return
        for line in lines[1:-1]:
            found = _opened(line)
            if found == _PUBLISHING:
                self.was_publishing = True
                continue
            try:
                yield Part(found["key"], int(found["start"]), int(found["stop"]), int(found["checksum"], 16))
            except (KeyError, TypeError, ValueError):
                return

    def begin(self, kept: list[Part]) -> None:
        """Start the journal with what is kept; what it said before is gone."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self.path, flags, 0o666)
        self._write({"fingerprint": self.fingerprint})
        for part in kept:
            self.add(part)

    def add(self, part: Part) -> None:
        """Record a finished part; one write, so that threads need no lock."""
        self._write({"key": part.key, "start": part.start, "stop": part.stop, "checksum": f"{part.checksum:016x}"})

    def publishing(self) -> None:
        """Record that files are about to take their final names, and flush: from here on, they may be found there."""
        self._write(_PUBLISHING)
        os.fsync(self._descriptor)

    def _write(self, record: Mapping[str, str | int]) -> None:
        text = json.dumps(record, separators=(",", ":")).encode()
        os.write(self._descriptor, b"%08x %s\n" % (zlib.crc32(text), text))

    def close(self) -> None:
        """Close the file and leave it for the next run."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _opened(line: bytes) -> dict[str, str]:
    """A line's record, or nothing where it is damaged."""
    check, _, text = line.partition(b" ")
    try:
        record = json.loads(text) if int(check, 16) == zlib.crc32(text) else None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
