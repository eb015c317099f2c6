"""What every kind of adapter gives: the change of one tensor of a model, some rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from remelt.core.tensor_info import TensorInfo

Rows = Callable[[int, int], Tensor]
"""Rows of the model's own tensor, as a matrix of the first dimension against all others, in the change's type."""


@dataclass(frozen=True)
class Parts:
    """The tensors of one module of an adapter: their types and shapes by the name of the part, read on request.

    ``scale`` is what the product of the factors is multiplied by where a configuration tells it, else None: then it is
    ``alpha`` by rank, or 1 without an ``alpha``. ``options`` are other facts of a configuration, by name.
    """

    module: str
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    scale: float | None = None
    options: Mapping[str, object] | None = None


class Change(ABC):
    """The change of one tensor, by rows, which several threads ask for, with the model's own if the kind needs them."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Two matrices whose product it is, where it is one."""
        return None

    @abstractmethod
    def rows(self, begin: int, end: int, base: Rows | None) -> Tensor:
        """Rows ``begin`` to ``end`` of the change, as a matrix of the first dimension against all others."""


class Kind(ABC):
    """A kind of adapter, such as LoRA: how its parts are told, what they must be, and what they do.

    ``target`` is the tensor of the module that it changes, "weight" or "bias"; with ``optional``, the model may lack
    that tensor. ``names`` are those of all parts that it reads.
    """

    name: str
    target: str = "weight"
    optional: bool = False
    names: frozenset[str]

    @abstractmethod
    def is_of(self, parts: Mapping[str, TensorInfo]) -> bool:
        """Whether a module with these parts is of this kind, whole or with parts missing."""

    @abstractmethod
    def asks_base(self, parts: Parts) -> bool:
        """Whether the change will depend on the tensor that is changed, told without reading."""

    @abstractmethod
    def check(self, parts: Parts, shape: tuple[int, ...]) -> None:
        """Raise `AdapterError` where parts are missing or do not fit a tensor of that shape; reads scalars at most."""

    @abstractmethod
    def open(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        """The change of a tensor of that shape, in float32 or float64; factors are read here, once."""
