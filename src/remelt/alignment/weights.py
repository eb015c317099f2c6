"""Where the tensors come from that are matched: a few at a time, as they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import torch

from remelt.archs.axis_groups import AxisGroup, Shapes, Window, windows_by_key


class Weights(Protocol):
    """A model's tensors by key. Those of a file are views of it, which nothing keeps."""

    @property
    def shapes(self) -> Shapes:
        """The shape of each tensor."""

    def is_float(self, key: str) -> bool:
        """Whether a tensor holds floating-point numbers, one an element."""

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor, in the type in which it is stored."""


class TensorWeights:
    """Tensors in memory.

    >>> TensorWeights({"a.weight": torch.zeros(2, 3)}).shapes
    {'a.weight': (2, 3)}
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.shapes: Shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}

    def is_float(self, key: str) -> bool:
        """Whether it is of a floating type."""
        return self.tensors[key].is_floating_point()

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor itself."""
        return self.tensors[key]


_STATISTICS = (".running_mean", ".running_var")


def weighed(groups: Iterable[AxisGroup]) -> tuple[AxisGroup, ...]:
    """The groups without their windows on running statistics: these follow, but are not what is matched.

    Statistics are as large as what they were measured of; beside them the weights would hardly count.
    """
    found = []
    for group in groups:
        windows = tuple(window for window in group.windows if not window.key.endswith(_STATISTICS))
        found.append(group if len(windows) == len(group.windows) else replace(group, windows=windows))
    return tuple(found)


Lying = dict[str, list[tuple[AxisGroup, Window]]]
"""For each tensor the windows that lie on it."""


def free_windows(groups: Iterable[AxisGroup]) -> Lying:
    """Which windows of which groups lie on each tensor, groups that are fixed left out."""
    return windows_by_key(group for group in groups if not group.is_fixed)
