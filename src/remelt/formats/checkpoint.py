"""What every format gives: tensors by name, with types and shapes, and their bytes on request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError


class Checkpoint(ABC):
    """An opened model: its header is known, its data is read where it is asked for, from any thread.

    ``tensors`` is in storage order.
    """

    path: Path | None
    format: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @abstractmethod
    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Row-major bytes of a tensor, from ``start`` to ``stop``; a view where the storage allows."""

    @abstractmethod
    def position(self, key: str) -> tuple[int, int]:
        """The file's number and the offset there: what to sort by to read in order."""

    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model by what it is, whatever its suffix: a folder, a zip archive of pickles, or safetensors.

    Raises `FormatError` for a file that is malformed, hostile, or none of these.
    """
    from remelt.formats.safetensors import SafetensorsCheckpoint

    if path.is_dir():
        from remelt.formats.sharded import open_folder

        return open_folder(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(16)
    except OSError as error:
        raise FormatError(f"{path.name} cannot be read: {error.strerror}") from error
    if magic[:4] == b"PK\x03\x04":
        from remelt.formats.pickle import PickleCheckpoint

        return PickleCheckpoint(path)
    _refuse_old(magic, path)
    return SafetensorsCheckpoint(path)


def _refuse_old(magic: bytes, path: Path) -> None:
    """Refuse the formats that torch.save wrote before its zip archives, with the way to convert them."""
    pickled = magic[:1] == b"\x80" and magic[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and magic[8:9] != b"{"
    if pickled:
        raise FormatError(
            f"{path.name} is a bare pickle, as torch.save wrote before version 1.6, which only running it reads",
            hint="convert it where you trust it: torch.save(torch.load(path, weights_only=True), new_path)",
        )
