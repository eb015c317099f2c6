"""Memory for tiles that is used again: allocating it anew for every tile costs more than what is computed in it."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

_TAUGHT = 31 * 2**20


class Scratch(threading.local):
    """A thread's buffers: taken for a tile's loads, given back where nothing looks at them any more."""

    def __init__(self) -> None:
        self.free: list[torch.Tensor] = []
        self.taken: list[torch.Tensor] = []
        self._registers: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    def register(self, dtype: torch.dtype, place: int, size: int) -> torch.Tensor:
        """The register of a type at a place, of undefined content: all kernels that a thread runs share them."""
        found = self._registers.get((dtype, place))
        if found is None or found.numel() < size:
            found = self._registers[dtype, place] = torch.empty(size, dtype=dtype)
        return found

    def take(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer of that many elements, of undefined content."""
        for index, buffer in enumerate(self.free):
            if buffer.dtype is dtype and buffer.numel() >= size:
                del self.free[index]
                break
        else:
            buffer = torch.empty(size, dtype=dtype)
        self.taken.append(buffer)
        return buffer if buffer.numel() == size else buffer[:size]

    def give_back(self, tensor: torch.Tensor, living: Iterable[object]) -> None:
        """Let a buffer be taken again, unless one of the living tensors is a view of it."""
        place = tensor.untyped_storage().data_ptr()
        for other in living:
            if isinstance(other, torch.Tensor) and other.untyped_storage().data_ptr() == place:
                return
        for index, buffer in enumerate(self.taken):
            if buffer.untyped_storage().data_ptr() == place:
                self.free.append(self.taken.pop(index))
                return

    def reset(self) -> None:
        """The tile is done: every buffer may be taken again."""
        self.free += self.taken
        self.taken.clear()


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, rather than return it to the system for every tile.

    It takes the size of the largest block that was freed for a sign of what is to come: one that is large enough, and
    is never touched, teaches it so.
    """
    torch.empty(_TAUGHT, dtype=torch.uint8)
