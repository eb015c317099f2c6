"""Publishing a result: every file is complete on the device before any takes its final name, the index last."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from remelt.engine.sink import FileSink
from remelt.errors import OutputError, RunError
from remelt.formats.layout import OutputLayout

PARTIAL = ".partial"
_STALE = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class FileOutput:
    """A result on disk: a file, or a folder of shards and the small files that belong to the model.

    Nothing is visible under a final name until `publish`; until then an old output is untouched.
    """

    def __init__(self, layout: OutputLayout, path: Path, companions: Sequence[tuple[Path, str]] = ()) -> None:
        self.layout, self.path, self.companions = layout, path, companions
        self.sinks: dict[str, FileSink] = {}
        self.by_key: dict[str, FileSink] = {}
        try:
            for file in layout.files:
                target = self._final(file.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                sink = FileSink(file, target.with_name(target.name + PARTIAL))
                self.sinks[file.name] = sink
                self.by_key.update(dict.fromkeys(file.offsets, sink))
        except OSError as error:
            self.abandon()
            raise OutputError(f"cannot write to {path}: {error.strerror}") from error
        except BaseException:
            self.abandon()
            raise

    def _final(self, name: str) -> Path:
        return self.path / name if self.layout.is_folder else self.path

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Put bytes of a tensor at an offset from its begin."""
        self.by_key[key].write(key, start, data)

    def publish(self) -> None:
        """Make the result complete and visible: fsync, rename, index last, fsync of the folder."""
        try:
            for sink in self.sinks.values():
                sink.finish()
            small = [(name, source.read_bytes()) for source, name in self.companions]
            for name, sink in self.sinks.items():
                os.replace(sink.path, self._final(name))
            for name, content in [*small, *self.layout.indexes]:
                _write_small(self._final(name), content)
            if self.layout.is_folder:
                self._remove_stale()
            for folder in {self._final(name).parent for name in self.sinks}:
                _sync_folder(folder)
        except OSError as error:
            self.abandon()
            raise RunError(f"cannot publish {self.path}: {error.strerror}: {error.filename}") from error

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
        """Remove everything unpublished; an old output stays as it was."""
        for sink in self.sinks.values():
            with contextlib.suppress(OSError):
                sink.abandon()
        if self.layout.is_folder and self.path.is_dir() and not any(self.path.rglob("*.*")):
            shutil.rmtree(self.path, ignore_errors=True)


def _write_small(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
