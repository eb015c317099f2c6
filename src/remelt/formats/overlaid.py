"""A checkpoint of which some tensors are another's: a view, that shares the files of both."""

from __future__ import annotations

from pathlib import Path

from remelt.formats.checkpoint import Checkpoint


class OverlaidCheckpoint(Checkpoint):
    """An opened checkpoint, with the tensors of ``over`` in the place of its own; whoever opened them closes them."""

    def __init__(self, checkpoint: Checkpoint, over: Checkpoint) -> None:
        self.checkpoint, self.over = checkpoint, over
        self.path, self.format, self.metadata = checkpoint.path, checkpoint.format, checkpoint.metadata
        self.inherited = checkpoint.inherited
        self.quantised = {key: one for key, one in checkpoint.quantised.items() if key not in over.tensors}
        self.scratch = max(checkpoint.scratch, over.scratch)
        self.tensors = {key: over.tensors.get(key, info) for key, info in checkpoint.tensors.items()}
        self.tensors |= {key: info for key, info in over.tensors.items() if key not in self.tensors}

    def _of(self, key: str) -> Checkpoint:
        return self.over if key in self.over.tensors else self.checkpoint

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of a tensor, of whichever has it here."""
        return self._of(key).read(key, start, stop)

    def is_view(self, key: str) -> bool:
        """As the tensor's own."""
        return self._of(key).is_view(key)

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """As the tensor's own."""
        return self._of(key).part(key, start, stop)

    def beside(self, key: str, elements: int) -> int:
        """As the tensor's own."""
        return self._of(key).beside(key, elements)

    @property
    def held(self) -> int:
        """What both hold."""
        return self.checkpoint.held + self.over.held

    def position(self, key: str) -> tuple[int, int]:
        """Where the tensor lies."""
        return self._of(key).position(key)

    def files(self) -> tuple[Path, ...]:
        """All files of both."""
        return tuple(dict.fromkeys((*self.checkpoint.files(), *self.over.files())))

    def view_of(self) -> str:
        """What both are views of."""
        return f"{self.checkpoint.view_of()} {self.over.view_of()}"

    def close(self) -> None:
        """Nothing: the checkpoints are not this view's."""
