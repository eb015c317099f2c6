"""How many bytes of tensors are held at a time while torch's operations run, counted at each operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks, after every operation, at which storages that the operations made are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_identity(tensor) for tensor in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if _identity(tensor) not in given:
                storage = tensor.untyped_storage()
                self.made[_identity(tensor)] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self.made = {key: held for key, held in self.made.items() if not held[0].expired()}  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return result


def peak_of(function: Callable[[], Any]) -> int:
    """The most bytes that a function's tensors held at a time beside those given to it and its result.

    What an operation uses inside itself is not seen: the true peak is never less.
    """
    counting = _Counting()
    with counting, torch.no_grad():
        result = function()
    kept = {_identity(tensor) for tensor in _tensors(result)}
    return max(counting.peak - sum(size for key, (_, size) in counting.made.items() if key in kept), 0)


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in what an operation takes or gives."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return []
