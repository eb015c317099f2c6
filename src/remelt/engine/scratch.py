"""Memory for tiles that is used again: allocating it anew for every tile costs more than what is computed in it."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

_TAUGHT = 31 * 2**20


class Pinned:
    """Memory that a device copies from and to by itself: one buffer for each tensor on its way, whichever kernel."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def like(self, tensor: torch.Tensor, name: tuple[str, int]) -> torch.Tensor:
        """A buffer for a tensor of that length and type, of undefined content."""
        found = self._buffers.get(name)
        if found is None or found.nbytes < tensor.nbytes:
            found = self._buffers[name] = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        return found[: tensor.nbytes].view(tensor.dtype)


class Scratch(threading.local):
    """A thread's buffers: taken for a tile's loads, given back where nothing looks at them any more."""

    def __init__(self) -> None:
        self.free: list[torch.Tensor] = []
        self.taken: list[torch.Tensor] = []
        self.pinned = Pinned()
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
            smaller = [place for place, buffer in enumerate(self.free) if buffer.dtype is dtype]
            if smaller:  # it takes that one's place: as many are held as were ever taken at a time
                del self.free[max(smaller, key=lambda place: self.free[place].numel())]
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

    @property
    def held(self) -> int:
        """Bytes of all buffers and registers of this thread."""
        return sum(buffer.nbytes for buffer in (*self.free, *self.taken, *self._registers.values()))

    def keep_within(self, size: int) -> None:
        """Let go of all buffers where they are more than so many bytes: a smaller task may follow a large one."""
        if self.held > size:
            self.free.clear()
            self._registers.clear()


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, rather than return it to the system for every tile.

    It takes the size of the largest block that was freed for a sign of what is to come: one that is large enough, and
    is never touched, teaches it so.
    """
    torch.empty(_TAUGHT, dtype=torch.uint8)
