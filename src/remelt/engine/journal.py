"""The journal beside an unfinished result: which parts of which tensors are complete, with their checksums.

Its first line is a fingerprint of everything that decides the result's bytes; a journal of anything else is not
continued. It need not be flushed in step with the data: what it says is verified against the data before it is
believed, so that a line without its data, or data without its line, costs time and nothing else.

It also names the files of the result, whoever made them, so that a later merge knows what in a folder is left of an
unfinished one: ``file`` is one whose unfinished form may lie there, ``new`` one that publication gives its final name
where nothing was before.
"""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path

from remelt.engine.opening import open_own
from remelt.formats.tensor_names import stays_inside

_LONGEST = 2**28
_PATIENCE = 0.05
"""Seconds that a finished part may wait for others to be recorded with it."""
_PUBLISHING = {"publishing": "begun"}


@dataclass(frozen=True)
class Part:
    """Bytes ``start`` to ``stop`` of a tensor of the result, complete, with their checksum."""

    key: str
    start: int
    stop: int
    checksum: int


@dataclass(frozen=True)
class Names:
    """The files of an unfinished output that its journal names: ``files`` by their place, ``new`` ones published."""

    files: frozenset[str] = frozenset()
    new: frozenset[str] = frozenset()


def left_names(path: Path) -> Names:
    """What the journal at a path names, of whatever result; nothing where there is none. Names stay in its folder."""
    found: dict[str, set[str]] = {"file": set(), "new": set()}
    for record in _records(path):
        for kind, names in found.items():
            name = record.get(kind)
            if isinstance(name, str) and stays_inside(name) and "\\" not in name:
                names.add(name)
    return Names(frozenset(found["file"]), frozenset(found["new"]))


class Journal:
    """An append-only record of finished parts."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.was_publishing = False
        """Whether the earlier run had begun to give its files their final names."""
        self._descriptor = -1
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._flushed = 0.0

    def parts(self) -> Iterator[Part]:
        """What an earlier run finished of the same result; nothing where the journal is another's, or damaged.

        Reading stops at the first damaged line: a kill may cut the last one.
        """
        records = _records(self.path)
        if next(records, None) != {"fingerprint": self.fingerprint}:
            return
        for found in records:
            if found == _PUBLISHING:
                self.was_publishing = True
            elif "key" in found:
                try:
                    yield Part(found["key"], int(found["start"]), int(found["stop"]), int(found["checksum"], 16))
                except (KeyError, TypeError, ValueError):
                    return

    def begin(self, kept: Sequence[Part], names: Names) -> None:
        """Start the journal with what is kept and the files that there are, in place of what it said before.

        The old journal stays until the new one is whole: a kill meanwhile loses nothing of what was done.
        """
        lines = [_record({"fingerprint": self.fingerprint}), *_naming(names), *map(_finished, kept)]
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            self._descriptor = open_own(partial, os.O_WRONLY | os.O_APPEND)
            os.ftruncate(self._descriptor, 0)
            self._append(b"".join(lines))
            if kept:
                os.fsync(self._descriptor)
            self.close()
            os.replace(partial, self.path)
        except OSError:
            self.close()
            partial.unlink(missing_ok=True)
            raise

    def add(self, part: Part) -> None:
        """Record a finished part, at once or with those that follow shortly."""
        with self._lock:
            self._waiting.append(_finished(part))
            if time.monotonic() - self._flushed > _PATIENCE:
                self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._append(b"".join(self._waiting))
            self._waiting.clear()
            self._flushed = time.monotonic()

    def publishing(self, names: Names) -> None:
        """Record that files are about to take their final names, and flush: from here on, they may be found there."""
        with self._lock:
            self._flush()
            self._append(b"".join((*_naming(names), _record(_PUBLISHING))))
        os.fsync(self._descriptor)

    def _append(self, lines: bytes) -> None:
        if self._descriptor < 0:
            self._descriptor = open_own(self.path, os.O_WRONLY | os.O_APPEND)
        while lines:
            lines = lines[os.write(self._descriptor, lines) :]

    def close(self) -> None:
        """Close the file and leave it for the next run."""
        if self._descriptor >= 0:
            with self._lock:
                self._flush()
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _naming(names: Names) -> Iterator[bytes]:
    for kind, listed in (("file", names.files), ("new", names.new)):
        for name in sorted(listed):
            yield _record({kind: name})


def _finished(part: Part) -> bytes:
    key = encode_basestring_ascii(part.key)
    return _line(f'{{"key":{key},"start":{part.start},"stop":{part.stop},"checksum":"{part.checksum:016x}"}}'.encode())


def _record(record: Mapping[str, str]) -> bytes:
    return _line(json.dumps(record, separators=(",", ":")).encode())


def _line(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _records(path: Path) -> Iterator[dict[str, str]]:
    """The records of a journal, up to the first damaged line."""
    try:
        if not path.is_file() or path.stat().st_size > _LONGEST:
            return
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines[:-1]:
        found = _opened(line)
        if not found:
            return
        yield found


def _opened(line: bytes) -> dict[str, str]:
    """A line's record, or nothing where it is damaged."""
    check, _, text = line.partition(b" ")
    try:
        record = json.loads(text) if int(check, 16) == zlib.crc32(text) else None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
