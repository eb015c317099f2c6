"""Publishing a result: every file is complete on the device before any takes its final name, the index last."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path

from remelt.core.checksum import checksum, combined
from remelt.engine.journal import Journal, Part
from remelt.engine.lock import OutputLock
from remelt.engine.sink import FileSink
from remelt.errors import OutputError, RunError
from remelt.formats.layout import OutputLayout

PARTIAL = ".partial"
JOURNAL, LOCK = "journal", "lock"
_OF_FOLDER = "remelt."
_STALE = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_ENTRIES = (".index.json", "model_index.json")


def is_unfinished(name: str) -> bool:
    """Whether a file of this name in an output's folder belongs to a merge that is not done.

    >>> is_unfinished("model.safetensors.partial"), is_unfinished("remelt.journal"), is_unfinished("model.safetensors")
    (True, True, False)
    """
    return name.endswith(PARTIAL) or name in (_OF_FOLDER + JOURNAL, _OF_FOLDER + LOCK)


class FileOutput:
    """A result on disk: a file, or a folder of shards and the small files that belong to the model.

    Nothing is visible under a final name until `publish`; until then an old output is untouched. With a
    ``fingerprint`` of everything that decides its bytes, a later run continues what this one leaves, unless
    ``restart`` is asked for.
    """

    checked = True

    def __init__(
        self,
        layout: OutputLayout,
        path: Path,
        companions: Sequence[tuple[Path, str]] = (),
        *,
        fingerprint: str | None = None,
        restart: bool = False,
    ) -> None:
        self.layout, self.path, self.companions = layout, path, companions
        self.continues = fingerprint is not None
        self.sinks: dict[str, FileSink] = {}
        self.by_key: dict[str, FileSink] = {}
        self.parts: dict[str, dict[int, Part]] = {}
        self._mutex = threading.Lock()
        try:
            (path if layout.is_folder else path.parent).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write to {path}: {error.strerror}") from error
        self.lock = OutputLock(self._beside(LOCK), path)
        self.journal = Journal(self._beside(JOURNAL), fingerprint or secrets.token_hex(16))
        try:
            self._open(resume=self.continues and not restart)
        except OSError as error:
            self.abandon()
            raise OutputError(f"cannot write to {path}: {error.strerror}") from error
        except BaseException:
            self.abandon()
            raise

    def _beside(self, what: str) -> Path:
        if self.layout.is_folder:
            return self.path / f"{_OF_FOLDER}{what}"
        return self.path.with_name(f"{self.path.name}.{what}")

    def _final(self, name: str) -> Path:
        return self.path / name if self.layout.is_folder else self.path

    def _open(self, *, resume: bool) -> None:
        left = list(self.journal.parts()) if resume else []
        for file in self.layout.files:
            target = self._final(file.name)
            partial = target.with_name(target.name + PARTIAL)
            target.parent.mkdir(parents=True, exist_ok=True)
            if left and self.journal.was_publishing and self.layout.is_folder and not partial.exists():
                with contextlib.suppress(FileNotFoundError):
                    os.replace(target, partial)  # a killed publication had come so far
            sink = FileSink(file, partial, resume=bool(left))
            self.sinks[file.name] = sink
            self.by_key.update(dict.fromkeys(file.offsets, sink))
        kept = [part for part in left if self._is_sound(part)]
        for part in kept:
            self.parts.setdefault(part.key, {})[part.start] = part
        self.journal.begin(kept)

    def _is_sound(self, part: Part) -> bool:
        """Whether the bytes of a finished part are what its journal says."""
        sink = self.by_key.get(part.key)
        if sink is None or not sink.resumed or not 0 <= part.start < part.stop:
            return False
        found, place = 0, part.start
        for piece in sink.read(part.key, part.start, part.stop):
            found += checksum(memoryview(piece), place)
            place += len(piece)
        return place == part.stop and found % 2**64 == part.checksum

    @property
    def kept(self) -> int:
        """Bytes that an earlier run finished."""
        return sum(part.stop - part.start for parts in self.parts.values() for part in parts.values())

    def done(self, key: str, start: int, stop: int) -> bool:
        """Whether bytes of a tensor are complete."""
        with self._mutex:
            for part in sorted(self.parts.get(key, {}).values(), key=lambda part: part.start):
                if part.start <= start < part.stop:
                    start = part.stop
        return start >= stop

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Put bytes of a tensor at an offset from its begin."""
        self.by_key[key].write(key, start, data)

    def finished(self, key: str, start: int, stop: int, checksum: int, *, keep: bool) -> None:
        """Bytes of a tensor are complete; the journal tells a later run to ``keep`` them."""
        part = Part(key, start, stop, checksum)
        with self._mutex:
            parts = self.parts.setdefault(key, {})
            for older in [one for one in parts.values() if start <= one.start < stop]:
                del parts[older.start]
            parts[start] = part
        if keep:
            self.journal.add(part)

    def publish(self) -> None:
        """Make the result complete and visible: fsync, rename, index last, fsync of the folder."""
        try:
            for sink in self.sinks.values():
                sink.finish(combined({key: self._checksum(key) for key in sink.layout.offsets}))
            small = [(name, source.read_bytes()) for source, name in self.companions]
            if self.layout.is_folder:
                self.journal.publishing()
                self._remove_entries()
            for name, sink in self.sinks.items():
                os.replace(sink.path, self._final(name))
            folders = {self._final(name).parent for name in self.sinks}
            for folder in folders:  # an index must never be found before what it names
                _sync_folder(folder)
            for name, content in [*small, *self.layout.indexes]:
                _write_small(self._final(name), content)
            if self.layout.is_folder:
                self._remove_stale()
            for folder in folders:
                _sync_folder(folder)
            self.journal.remove()
            self.lock.release()
        except OSError as error:
            raise RunError(f"cannot publish {self.path}: {error.strerror}: {error.filename}") from error

    def _checksum(self, key: str) -> int:
        return sum(part.checksum for part in self.parts.get(key, {}).values()) % 2**64

    def _remove_entries(self) -> None:
        """Without its index, a folder with some old and some new shards is not taken for a model."""
        folders = {self._final(name).parent for name in self.sinks} | {self.path}
        for folder in folders:
            removed = [path for path in folder.iterdir() if path.name.endswith(_ENTRIES)]
            for path in removed:
                path.unlink()
            if removed:
                _sync_folder(folder)

    def _remove_stale(self) -> None:
        """Weights of an older, differently sharded result would be loaded in place of these: they go."""
        current = {self._final(name) for name in [*self.sinks, *(name for name, _ in self.layout.indexes)]}
        stems = {match[1] for path in current if (match := _STALE.fullmatch(path.name))}
        for folder in {path.parent for path in current}:
            for path in folder.iterdir():
                match = _STALE.fullmatch(path.name)
                if match and match[1] in stems and path not in current:
                    path.unlink()

    def abandon(self) -> None:
        """Stop: what is finished stays for the next run to continue, unless there is nothing of use."""
        keep = self.continues and bool(self.parts)
        for sink in self.sinks.values():
            with contextlib.suppress(OSError):
                sink.close()
                if not keep:
                    sink.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if keep:
                self.journal.close()
            else:
                self.journal.remove()
            self.lock.release()
            if self.layout.is_folder and not keep:
                _remove_empty(self.path)


def _remove_empty(folder: Path) -> None:
    """Remove a folder in which there are only empty folders."""
    if any(path.is_file() for path in folder.rglob("*")):
        return
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        path.rmdir()
    folder.rmdir()


def _write_small(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    descriptor = os.open(partial, flags, 0o666)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, path)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
