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
from remelt.engine.journal import Journal, Names, Part, left_names
from remelt.engine.lock import OutputLock
from remelt.engine.opening import open_own
from remelt.engine.sink import FileSink
from remelt.errors import OutputError, RunError
from remelt.formats.layout import OutputLayout

PARTIAL = ".partial"
JOURNAL, LOCK = "journal", "lock"
_OF_FOLDER = "remelt."
_STALE = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.partial)?")
_INDEX = ".safetensors.index.json"
_PIPELINE = "model_index.json"


def is_unfinished(name: str) -> bool:
    """Whether a file of this name in an output's folder belongs to a merge that is not done.

    >>> is_unfinished("model.safetensors.partial"), is_unfinished("remelt.journal"), is_unfinished("model.safetensors")
    (True, True, False)
    """
    return name.endswith(PARTIAL) or name in (_OF_FOLDER + JOURNAL, _OF_FOLDER + LOCK)


def is_unfinished_folder(folder: Path) -> bool:
    """Whether all files in a folder belong to a merge that is not done, those included that it began to publish."""
    new = left_names(folder / (_OF_FOLDER + JOURNAL)).new
    for parent, folders, files in os.walk(folder):
        if any(os.path.islink(os.path.join(parent, name)) for name in folders):
            return False
        for name in files:
            if not is_unfinished(name) and Path(parent, name).relative_to(folder).as_posix() not in new:
                return False
    return True


def reserved_bytes(layout: OutputLayout, path: Path) -> int:
    """What an interrupted run has reserved of a result already."""
    reserved = 0
    for file in layout.files:
        target = path / file.name if layout.is_folder else path
        with contextlib.suppress(OSError):
            reserved += min(target.with_name(target.name + PARTIAL).stat().st_size, file.size)
    return reserved


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
        companions: Sequence[tuple[Path | bytes, str]] = (),
        *,
        fingerprint: str | None = None,
        restart: bool = False,
    ) -> None:
        self.layout, self.path, self.companions = layout, path, companions
        self.continues = fingerprint is not None
        self.sinks: dict[str, FileSink] = {}
        self.by_key: dict[str, FileSink] = {}
        self.parts: dict[str, dict[int, Part]] = {}
        self.new: frozenset[str] = frozenset()
        """Files that an unfinished publication put where nothing was before."""
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
            raise OutputError(f"cannot write to {error.filename or path}: {error.strerror}") from error
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
        earlier = left_names(self.journal.path)
        self.new = earlier.new
        left = list(self.journal.parts()) if resume else []
        files = frozenset(file.name for file in self.layout.files)
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
        if not self.layout.is_folder:
            self.journal.begin(kept, Names())
            return
        for name in earlier.files - files:  # an unfinished merge of another layout
            _remove(self._final(name + PARTIAL))
        self.journal.begin(kept, Names(files, self.new))

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

    def place(self, key: str, start: int, stop: int) -> memoryview | tuple[int, int, int] | None:
        """The file that holds the tensor, where it may be written to."""
        return self.by_key[key].place(key, start, stop)

    def refused(self, key: str, error: OSError) -> RunError:
        """What to say of bytes that could not be written."""
        return self.by_key[key].refused(key, error)

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

    def complete(self) -> None:
        """Everything is written: fill in the checksums, flush to the device, and close the files."""
        try:
            for sink in self.sinks.values():
                sink.finish(combined({key: self._checksum(key) for key in sink.layout.offsets}))
            self.journal.close()
        except OSError as error:
            raise RunError(f"cannot complete {self.path}: {error.strerror}") from error

    def publish(self) -> None:
        """Make the complete result visible: rename, index last, fsync of the folder."""
        try:
            small = [(name, one if isinstance(one, bytes) else one.read_bytes()) for one, name in self.companions]
            small += self.layout.indexes
            if self.layout.is_folder:
                finals = {*self.sinks, *(name for name, _ in small)}
                new = frozenset(name for name in finals if name in self.new or not os.path.lexists(self._final(name)))
                self.journal.publishing(Names(frozenset(finals), new))
                self._remove_entries()
            for name, sink in self.sinks.items():
                os.replace(sink.path, self._final(name))
            folders = {self._final(name).parent for name in self.sinks}
            for folder in folders:  # an index must never be found before what it names
                _sync_folder(folder)
            for name, content in small:
                _write_small(self._final(name), content)
            if self.layout.is_folder:
                self._remove_stale({self._final(name) for name in finals})
            for folder in folders:
                _sync_folder(folder)
            self.journal.remove()
            self.lock.release()
        except OSError as error:
            raise RunError(f"cannot publish {self.path}: {error.strerror}: {error.filename}") from error

    def _checksum(self, key: str) -> int:
        return sum(part.checksum for part in self.parts.get(key, {}).values()) % 2**64

    def _stems(self) -> dict[Path, set[str]]:
        """In each folder of the result, the names of its weight files without number and suffix."""
        stems: dict[Path, set[str]] = {}
        for name in self.sinks:
            target = self._final(name)
            match = _STALE.fullmatch(target.name)
            assert match is not None
            stems.setdefault(target.parent, set()).add(match[1])
        return stems

    def _remove_entries(self) -> None:
        """Without its index, a folder with some old and some new shards is not taken for a model."""
        entries = {folder / f"{stem}{_INDEX}" for folder, stems in self._stems().items() for stem in stems}
        if any("/" in name for name in self.sinks):
            entries.add(self.path / _PIPELINE)
        for path in sorted(entries):
            if _remove(path):
                _sync_folder(path.parent)

    def _remove_stale(self, current: set[Path]) -> None:
        """Weights of an older, differently sharded result would be loaded in place of these: they go.

        So does what an unfinished merge left. Files under other names are somebody else's, and stay.
        """
        for folder, stems in self._stems().items():
            for path in folder.iterdir():
                match = _STALE.fullmatch(path.name)
                if match and match[1] in stems and path not in current and not _is_being_written(path):
                    _remove(path)
        for name in self.new:
            if self._final(name) not in current:
                _remove(self._final(name))

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
        with contextlib.suppress(OSError):
            self.lock.release()
        with contextlib.suppress(OSError):
            if self.layout.is_folder and not keep:
                _remove_empty(self.path)


def _is_being_written(path: Path) -> bool:
    """Whether an unfinished file has a journal of its own, as a merge to that single file keeps."""
    return path.name.endswith(PARTIAL) and path.with_name(f"{path.name.removesuffix(PARTIAL)}.{JOURNAL}").exists()


def _remove(path: Path) -> bool:
    """Remove a file or link; whether there was one. A folder of that name stays."""
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
        return False
    path.unlink(missing_ok=True)
    return True


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
    descriptor = open_own(partial, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, 0)
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
