"""Where results go: files written at their final offsets, or tensors in memory."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from remelt.core.checksum import HASH_PLACEHOLDER, PLACEHOLDER
from remelt.core.tensor_info import TensorInfo
from remelt.engine.opening import open_own
from remelt.errors import OutputError, RunError
from remelt.formats.layout import FileLayout
from remelt.tensors import TORCH

_WRITE = 2**21
"""Bytes of a call of the system: between two of them, threads hand Python's lock to each other."""
_READ = 2**18
_UNABLE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""What file systems say that reserve nothing."""
_CLOSED = -1


class Sink(Protocol):
    """What takes a result's bytes, from any thread, in any order."""

    checked: bool
    """Whether it wants checksums."""

    def done(self, key: str, start: int, stop: int) -> bool:
        """Whether bytes of a tensor are there already, from an earlier run."""

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Put bytes of a tensor at an offset from its begin."""

    def place(self, key: str, start: int, stop: int) -> memoryview | tuple[int, int, int] | None:
        """Where to put bytes of a tensor without asking: memory, or an open file's descriptor, offset and length.

        None where `write` must be asked.
        """

    def refused(self, key: str, error: OSError) -> RunError:
        """What to say of bytes that could not be put in their place."""

    def finished(self, key: str, start: int, stop: int, checksum: int, *, keep: bool) -> None:
        """Bytes of a tensor are complete; a later run may ``keep`` them."""


class MemorySink:
    """A result as a dictionary of tensors."""

    checked = False

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = {key: torch.empty(info.shape, dtype=TORCH[info.dtype]) for key, info in tensors.items()}
        self._bytes = {
            key: tensor.view(-1).view(torch.uint8).numpy() for key, tensor in self.tensors.items() if tensor.numel()
        }

    def done(self, key: str, start: int, stop: int) -> bool:
        """Never: memory does not outlive a run."""
        return False

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Put bytes of a tensor at an offset from its begin."""
        if len(data):
            self._bytes[key][start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def place(self, key: str, start: int, stop: int) -> memoryview | tuple[int, int, int] | None:
        """The memory itself."""
        return memoryview(self._bytes[key][start:stop]) if stop > start else memoryview(bytearray())  # type: ignore[arg-type]

    def refused(self, key: str, error: OSError) -> RunError:
        """Memory refuses nothing."""
        return RunError(f"cannot write {key}: {error.strerror}")

    def finished(self, key: str, start: int, stop: int, checksum: int, *, keep: bool) -> None:
        """Nothing to note."""


class FileSink:
    """One file of a result: reserved in full under a temporary name, then filled in place.

    With ``resume``, a file that an earlier run left there is taken up where it has the layout's size and header:
    ``resumed`` tells.
    """

    def __init__(self, layout: FileLayout, path: Path, *, resume: bool = False) -> None:
        self.layout = layout
        self.path = path
        self._lock = threading.Lock()
        try:
            self.descriptor = open_own(path, os.O_RDWR)
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror}", hint="check the folder's permissions"
            ) from error
        try:
            self.resumed = resume and self._has_header()
            if not self.resumed:
                os.ftruncate(self.descriptor, 0)
                self._reserve()
                self._put(0, memoryview(layout.header))
        except OSError as error:
            self.close()
            self.path.unlink(missing_ok=True)
            raise OutputError(
                f"cannot reserve {layout.size} bytes for {path}: {error.strerror}",
                hint="free disk space or raise the quota, or write elsewhere",
            ) from error

    def _places(self) -> Iterator[tuple[str, int]]:
        """What is filled in at the end, and where."""
        for placeholder in (PLACEHOLDER, HASH_PLACEHOLDER):
            place = self.layout.header.find(placeholder.encode())
            if place >= 0:
                yield placeholder, place

    def _has_header(self) -> bool:
        """Whether the file is one of this layout; its checksum may have been filled in already."""
        header = self.layout.header
        if os.fstat(self.descriptor).st_size != self.layout.size:
            return False
        found = bytearray(b"".join(self._pieces(0, len(header))))
        for placeholder, place in self._places():
            found[place : place + len(placeholder)] = placeholder.encode()
        return bytes(found) == header

    def _reserve(self) -> None:
        if hasattr(os, "posix_fallocate") and self.layout.size:
            try:
                os.posix_fallocate(self.descriptor, 0, self.layout.size)
                return
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
        os.ftruncate(self.descriptor, self.layout.size)

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Put bytes of a tensor at an offset from its begin."""
        try:
            self._put(self.layout.offsets[key] + start, data)
        except OSError as error:
            raise self.refused(key, error) from error

    def place(self, key: str, start: int, stop: int) -> memoryview | tuple[int, int, int] | None:
        """The file itself, where the system writes at positions."""
        return (self.descriptor, self.layout.offsets[key] + start, stop - start) if hasattr(os, "pwrite") else None

    def refused(self, key: str, error: OSError) -> RunError:
        """What to say of bytes that could not be written."""
        return RunError(f"cannot write {key} to {self.path}: {error.strerror}")

    def _put(self, offset: int, data: memoryview) -> None:
        while len(data):
            written = self._write_at(data[:_WRITE], offset)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data, offset = data[written:], offset + written

    def _write_at(self, data: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self.descriptor, data, offset)
        with self._lock:  # Windows has no positioned write
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.write(self.descriptor, data)

    def read(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """What is there of a tensor, in pieces."""
        offset = self.layout.offsets[key]
        return self._pieces(offset + start, offset + stop)

    def _pieces(self, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            with self._lock:
                os.lseek(self.descriptor, start, os.SEEK_SET)
                piece = os.read(self.descriptor, min(_READ, stop - start))
            if not piece:
                return
            yield piece
            start += len(piece)

    def finish(self, checksum: str) -> None:
        """Fill in the checksum, and the hash of all tensors where the header has a place for it; flush and close."""
        for placeholder, place in self._places():
            self._put(place, memoryview((checksum if placeholder == PLACEHOLDER else self._hash()).encode()))
        os.fsync(self.descriptor)
        self.close()

    def _hash(self) -> str:
        """The SHA-256 of everything behind the header, read once more."""
        found = hashlib.sha256()
        for piece in self._pieces(len(self.layout.header), self.layout.size):
            found.update(piece)
        return found.hexdigest()

    def close(self) -> None:
        """Close, leaving the file as it is."""
        if self.descriptor != _CLOSED:
            os.close(self.descriptor)
            self.descriptor = _CLOSED
