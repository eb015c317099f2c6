"""A checkpoint with other names for some of its tensors: a view, that shares the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from remelt.formats.checkpoint import Checkpoint


class RenamedCheckpoint(Checkpoint):
    """Some tensors of an opened checkpoint, by other names; the checkpoint is closed by whoever opened it.

    ``names`` gives the name there for each name here, in the order in which they are told.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self.checkpoint, self.names = checkpoint, names
        self.path, self.format, self.metadata = checkpoint.path, checkpoint.format, checkpoint.metadata
        self.tensors = {here: checkpoint.tensors[there] for here, there in names.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of a tensor by its name here."""
        return self.checkpoint.read(self.names[key], start, stop)

    def is_view(self, key: str) -> bool:
        """As the tensor's own."""
        return self.checkpoint.is_view(self.names[key])

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """As the tensor's own."""
        return self.checkpoint.part(self.names[key], start, stop)

    def position(self, key: str) -> tuple[int, int]:
        """Where the tensor lies."""
        return self.checkpoint.position(self.names[key])

    def files(self) -> tuple[Path, ...]:
        """All files of the checkpoint."""
        return self.checkpoint.files()

    def view_of(self) -> str:
        """As the checkpoint's own: the recipe and the files decide the names."""
        return self.checkpoint.view_of()

    def close(self) -> None:
        """Nothing: the checkpoint is not this view's."""
