"""What tests of derived groups share: a module with random numbers, and how far permuting it moves its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from remelt.alignment.derivation.tracing import groups_from_module
from remelt.alignment.permutation import Permutation, permuted, random_permutation
from remelt.archs.axis_groups import AxisGroup, Level, keys_of


@dataclass
class Trial:
    """A module in float64 with random parameters and statistics, and its derived groups."""

    module: nn.Module
    inputs: Sequence[Any] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.module.double().eval()
        stored = self.module.state_dict()
        for name, tensor in stored.items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                scale = max(tensor[0].numel(), 1) ** -0.5 if tensor.ndim > 1 else 0.5
                tensor.copy_(
                    drawn.abs() + 0.5 if name.endswith("running_var") else drawn * scale + 0.3 * (tensor.ndim < 2)
                )
        self.tensors = {key: value.clone() for key, value in stored.items()}
        self.groups = groups_from_module(self.module, _doubled(self.inputs), _doubled(self.keywords))
        self.free = [group for group in self.groups if not group.is_fixed]
        self.outputs = self.run(self.tensors)

    def run(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs with some tensors, computed in float64 throughout."""
        self.module.load_state_dict(dict(tensors))
        with torch.no_grad(), _in_float64():
            found = self.module(*_doubled(self.inputs), **_doubled(self.keywords))
        leaves = pytree.tree_leaves(found.to_tuple() if hasattr(found, "to_tuple") else found)
        return [one for one in leaves if isinstance(one, Tensor) and one.is_floating_point()]

    def error(self, permutations: Iterable[Permutation]) -> float:
        """The largest change of an output, relative to its largest number."""
        moved = self.run(permuted(self.tensors, permutations))
        pairs = zip(moved, self.outputs, strict=True)
        return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)

    def error_of(self, groups: Iterable[AxisGroup], seeds: int = 1) -> float:
        """The largest error of random permutations of some groups, all at once."""
        groups = list(groups)
        generators = [np.random.default_rng(seed) for seed in range(seeds)]
        return max(self.error([random_permutation(group, one) for group in groups]) for one in generators)

    @property
    def spelled(self) -> list[str]:
        """The groups as their sizes.

        ``2(3 4)`` has a level of 3 and one of 4 below one of 2, ``4+4`` has two cells, ``[2](3)`` a fixed level.
        """
        return sorted(_spelled(group) for group in self.free)

    @property
    def still(self) -> set[str]:
        """The tensors of which no axis is permuted."""
        moved = {key for group in self.free for window in group.windows for key in keys_of(group, window)}
        return {key for key, value in self.tensors.items() if key not in moved and value.is_floating_point()}


def _spelled(group: AxisGroup) -> str:
    def size(level: Level) -> str:
        return "+".join(map(str, level.cells)) or str(level.size)

    def tree(above: tuple[str, ...]) -> str:
        words = []
        for level in group.levels:
            if level.below == above:
                inner = tree((*above, level.name))
                if inner or not level.fixed:
                    words.append((f"[{size(level)}]" if level.fixed else size(level)) + (f"({inner})" if inner else ""))
        return " ".join(words)

    return tree(())


@contextmanager
def _in_float64() -> Iterator[None]:
    """No step of a model falls back to float32, as norms and rotary embeddings do."""
    names = ("float32", "float")
    kept, method = {name: getattr(torch, name) for name in names}, Tensor.float
    for name in names:
        setattr(torch, name, torch.float64)
    Tensor.float = Tensor.double
    try:
        yield
    finally:
        for name, dtype in kept.items():
            setattr(torch, name, dtype)
        Tensor.float = method


def _doubled(values: Any) -> Any:
    return pytree.tree_map(
        lambda one: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one, values
    )


@pytest.fixture
def trial() -> Callable[..., Trial]:
    """Makes a trial of a module."""

    def make(module: nn.Module, *inputs: Any, **keywords: Any) -> Trial:
        return Trial(module, inputs, keywords)

    return make


@pytest.fixture
def assert_caught() -> Callable[[Trial], None]:
    """Mistakes in a trial's groups change what its module computes: a window dropped, heads or groups dissolved."""

    def check(trial: Trial) -> None:
        for group in trial.free:
            if len(group.windows) > 1:
                reader = max(group.windows, key=lambda window: (window.axis, len(window.levels)))
                stored = trial.module.state_dict()
                shared = [key for key in stored if stored[key].data_ptr() == stored[reader.tensor].data_ptr()]
                rest = [
                    one for one in group.windows if (one.tensor, one.axis) not in {(key, reader.axis) for key in shared}
                ]
                lacking = replace(group, windows=tuple(rest))
                assert trial.error_of([lacking], seeds=4) > 1e-8, f"{group.name} without {reader}"
            tops = [level for level in group.levels if level.below]
            if tops and group.structure != "experts":
                loose = tuple(_loosened(group, trial))
                assert any(trial.error_of([one], seeds=4) > 1e-8 for one in loose), f"{group.name} dissolved"

    return check


def _loosened(group: AxisGroup, trial: Trial) -> Iterator[AxisGroup]:
    """For each packed window with several levels: the group as if its windows like it were one level."""
    for levels in {window.levels for window in group.windows if len(window.along) > 1 and not window.chooses}:
        windows = [one for one in group.windows if one.levels == levels and not one.strides]
        if windows:
            size = int(np.prod(group.shape(levels)))
            flat = tuple(replace(one, levels=("channel",)) for one in windows)
            yield AxisGroup(group.name, (Level("channel", size),), flat)
