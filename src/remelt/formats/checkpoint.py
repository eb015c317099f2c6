"""What every format gives: tensors by name, with types and shapes, and their bytes on request."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

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
    quantised: Mapping[str, Any] = {}
    """Tensors whose bytes are no numbers, as the format says, with what these stand for."""
    inherited: Mapping[str, str] = {}
    """Metadata that a file that is written of it alone has, too."""

    @abstractmethod
    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Row-major bytes of a tensor, from ``start`` to ``stop``; a view where the storage allows."""

    def is_view(self, key: str) -> bool:
        """Whether reading a tensor, whole or in part, only looks at where it lies, and copies nothing."""
        return False

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """The same bytes as those of an open file: its descriptor, the offset there, and their number.

        None where they are not stored in a row.
        """
        return None

    scratch = 0
    """Bytes of memory that a thread takes for computing what it reads, however many checkpoints like this it reads."""

    def beside(self, key: str, elements: int) -> int:
        """Bytes of memory that reading so many elements of a tensor takes, beside pages of its file."""
        return 0

    @property
    def held(self) -> int:
        """Bytes of memory that are held from one reading to the next."""
        return 0

    @abstractmethod
    def position(self, key: str) -> tuple[int, int]:
        """The file's number and the offset there: what to sort by to read in order."""

    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""

    def view_of(self) -> str:
        """What decides the tensors beside those files and the recipe: empty where nothing does."""
        return ""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_RECIPES = (".mecha", ".remelt")
_RECIPE = re.compile(rb"(?:\xef\xbb\xbf)?(?:\s*+(?:#[^\n]*+\n)?+)*+version[ \t]*+\d")
_TEXT = ("it is text, as a failed download leaves it", "download it again; git lfs pull fetches what a pointer names")
_FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x89HDF", "it is an HDF5 file, as Keras writes", "convert it to safetensors"),
    (0, b"\x93NUMPY", "it is a numpy array", "save a dict of arrays with safetensors.numpy.save_file"),
    (0, b"\x1f\x8b", "it is compressed with gzip", "unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "it is a 7z archive", "unpack it"),
    (0, b"version https://git-lfs", *_TEXT),
    (0, b"<", *_TEXT),
    (
        257,
        b"ustar",
        "it is a tar archive, as torch.save wrote before version 0.1.10",
        "unpack it, or where it is a checkpoint that you trust, load it with torch and save it as safetensors",
    ),
)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model by what it is, whatever its suffix: a folder, a zip archive of pickles, GGUF, or safetensors.

    Raises `FormatError` for a file that is malformed, hostile, or none of these.
    """
    from remelt.formats.safetensors import SafetensorsCheckpoint

    if os.path.isdir(path):
        from remelt.formats.sharded import open_folder

        return open_folder(path)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise FormatError(f"{path.name} is neither a file nor a folder", hint="pipes and devices cannot be mapped")
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise FormatError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError:
        raise FormatError(f"{str(path)!r} cannot be the name of a file") from None
    if start[8:9] == b"{":  # a header's length, then its JSON: whatever the length's bytes happen to spell
        return SafetensorsCheckpoint(path)
    if start[:4] == b"GGUF":
        from remelt.formats.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        from remelt.formats.pickle import PickleCheckpoint

        return PickleCheckpoint(path)
    _refuse_foreign(start, path)
    return SafetensorsCheckpoint(path)


def _refuse_foreign(start: bytes, path: Path) -> None:
    """Refuse other formats by their first bytes, each with the way to one that opens."""
    name = path.name
    if (path.suffix.lower() in _RECIPES and b"\0" not in start) or _RECIPE.match(start):
        raise FormatError(
            f"{name} is a recipe, not a model",
            hint=f"remelt merge {name} makes a model of it; remelt compose puts it in the place of a parameter",
        )
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise FormatError(
            f"{name} is a bare pickle, as torch.save wrote before version 1.6, which only running it reads",
            hint="convert it where you trust it: torch.save(torch.load(path, weights_only=True), new_path)",
        )
    for offset, magic, what, remedy in _FOREIGN:
        if start[offset : offset + len(magic)] == magic:
            raise FormatError(f"{name} is no checkpoint that remelt reads: {what}", hint=remedy)
