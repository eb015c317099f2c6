"""A file that is looked at where the system maps it, or read at positions where that is wanted."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from pathlib import Path
from typing import BinaryIO

from remelt.errors import FormatError


class MappedFile:
    """An open file in memory: ``view`` holds its bytes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._path = path
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.view = memoryview(self._map)
        _read_ahead(file.fileno())  # for whoever shares the open file, as the map does
        found = os.fstat(file.fileno())
        self._identity = found.st_dev, found.st_ino
        self._descriptor = -1
        self._lock = threading.Lock()

    def part(self, offset: int, length: int) -> tuple[int, int, int] | None:
        """Bytes of the open file; None where the system reads at no positions."""
        return (self.descriptor(), offset, length) if hasattr(os, "preadv") else None

    def descriptor(self) -> int:
        """The file to be read at positions: opened once that is asked for, as a map needs no open file.

        Raises `FormatError` where another file has taken its name.
        """
        with self._lock:
            if self._descriptor < 0:
                try:
                    descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                except OSError as error:
                    raise FormatError(f"{self._path.name} cannot be read any more: {error.strerror}") from error
                found = os.fstat(descriptor)
                if (found.st_dev, found.st_ino) != self._identity:
                    os.close(descriptor)
                    raise FormatError(
                        f"{self._path.name} was replaced while it was read",
                        hint="merge again once nothing writes that file",
                    )
                _read_ahead(descriptor)
                self._descriptor = descriptor
            return self._descriptor

    def close(self) -> None:
        """Unmap the file, unless views of it are still held: then it goes with the last of them."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            pass


def _read_ahead(descriptor: int) -> None:
    """Have the system read further ahead; one that takes no advice goes on without."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
