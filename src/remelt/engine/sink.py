"""Where results go: files written at their final offsets, or tensors in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from remelt.core.tensor_info import TensorInfo
from remelt.engine.tensors import TORCH
from remelt.errors import OutputError, RunError
from remelt.formats.layout import FileLayout

_WRITE = 2**20


class Sink(Protocol):
    """What takes a result's bytes, from any thread, in any order."""

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Put bytes of a tensor at an offset from its begin."""


class MemorySink:
    """A result as a dictionary of tensors."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = {key: torch.empty(info.shape, dtype=TORCH[info.dtype]) for key, info in tensors.items()}
        self._bytes = {
            key: tensor.view(-1).view(torch.uint8).numpy() for key, tensor in self.tensors.items() if tensor.numel()
        }

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Put bytes of a tensor at an offset from its begin."""
        if len(data):
            self._bytes[key][start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)


class FileSink:
    """One file of a result: preallocated in full under a temporary name, then filled in place."""

    def __init__(self, layout: FileLayout, path: Path) -> None:
        self.layout = layout
        self.path = path
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        try:
            self.descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror}", hint="check the folder's permissions"
            ) from error
        try:
            self._allocate()
            self._put(0, memoryview(layout.header))
        except OSError as error:
            self.abandon()
            raise OutputError(
                f"cannot reserve {layout.size} bytes for {path}: {error.strerror}",
                hint="free disk space, or choose another",
            ) from error

    def _allocate(self) -> None:
        if hasattr(os, "posix_fallocate") and self.layout.size:
            os.posix_fallocate(self.descriptor, 0, self.layout.size)
        else:
            os.ftruncate(self.descriptor, self.layout.size)

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Put bytes of a tensor at an offset from its begin."""
        try:
            self._put(self.layout.offsets[key] + start, data)
        except OSError as error:
            raise RunError(f"cannot write {key} to {self.path}: {error.strerror}") from error

    def _put(self, offset: int, data: memoryview) -> None:
        while len(data):
            written = self._write_at(data[:_WRITE], offset)
            data, offset = data[written:], offset + written

    def _write_at(self, data: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self.descriptor, data, offset)
        with self._lock:  # Windows has no positioned write
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.write(self.descriptor, data)

    def finish(self) -> None:
        """Flush to the device and close."""
        os.fsync(self.descriptor)
        os.close(self.descriptor)
        self.descriptor = -1

    def abandon(self) -> None:
        """Close and remove what was written."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        self.path.unlink(missing_ok=True)
