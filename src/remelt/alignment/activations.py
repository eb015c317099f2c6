"""Activation matching: channels are paired by what they answer to the same inputs, not by their weights.

After Li and others, "Convergent Learning" (1511.07543), and section 3.1 of "Git Re-Basin" (2209.04836). What the
channels of a group answer does not depend on how other groups are permuted, so the permutation with the largest sum of
correlations is the best one at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from remelt.alignment.assignment import solve
from remelt.alignment.permutation import Permutation, Permutations
from remelt.alignment.products import elements_of, free_levels
from remelt.alignment.running import call, channels_of, evaluated, rows, watched
from remelt.archs.axis_groups import AxisGroup, Window
from remelt.errors import RefusedError

_CHUNK = 2**22
"""Numbers that are looked at together."""
_DEAD = 1e-10
"""Of a channel's square: a variance below that is what rounding makes of a constant."""


@dataclass(frozen=True)
class ActivationMatch:
    """What was found: a permutation for each group that was measured."""

    permutations: Permutations
    correlations: Mapping[str, tuple[float, float]]
    """By group: the mean correlation of the channels that stand in the same place, before and after."""
    unmeasured: tuple[str, ...]
    """Groups that no module's answers show, such as experts; nothing is known of them, and they stay as they are."""


def match_activations(
    reference: nn.Module,
    model: nn.Module,
    groups: Sequence[AxisGroup],
    batches: Iterable[Any],
    *,
    progress: Callable[[int], None] | None = None,
) -> ActivationMatch:
    """Permutations of the model's groups under which its channels answer most like those of the reference.

    The groups' keys are the names of the modules' parameters. Both modules are run once on each of ``batches``:
    tensors, tuples of positional arguments, or mappings of keyword arguments; in evaluation mode, without gradients.
    Meanwhile a matrix of float32 is kept for each linear map, convolution and normalisation of a group, as large as the
    square of its width, and what both answer to one batch; give some of the groups at a time where that is
    too much. ``progress`` hears how many batches are done.

    Channels that never change say nothing and are put where the others leave room. Weight matching can go on from what
    is found: ``match(..., given=found.permutations)``.

    Raises `RefusedError` where a module's answers differ in shape, and where there are no batches.

    >>> from remelt.archs.axes.draft import Drafts
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> drafts = Drafts({key: tuple(one.shape) for key, one in net.state_dict().items()})
    >>> hidden = drafts.free("hidden", 4).made_by("0").read_by("2")
    >>> found = match_activations(net, net, drafts.finished(), [torch.randn(100, 3)])
    >>> found.permutations["hidden"].is_identity
    True
    """
    free = [group for group in groups if not group.is_fixed]
    sums: dict[str, list[_Sums]] = {}
    by_group: dict[str, list[_Sums]] = {group.name: [] for group in free}
    for group in free:
        for name, one in _shown(group, model):
            sums.setdefault(name, []).append(one)
            by_group[group.name].append(one)
    done = 0
    with evaluated(reference, model):
        for batch in batches:
            for name, ours, theirs in _answers(reference, model, sums, batch):
                for one in sums[name]:
                    one.add(ours, theirs)
            done += 1
            if progress is not None:
                progress(done)
    if not done:
        raise RefusedError("activations are matched on data, but there are no batches")
    return _solved(free, by_group)


def _shown(group: AxisGroup, model: nn.Module) -> Iterator[tuple[str, _Sums]]:
    """The modules whose answers show a group's channels, with what is to be added up of them."""
    parts = dict(model.named_modules())
    for window in group.windows:
        name, _, parameter = window.key.rpartition(".")
        if window.chooses or parameter != "weight" or name not in parts or not free_levels(group, window):
            continue
        found = channels_of(parts[name])
        if found is not None and found[0] == window.axis:
            yield name, _Sums(group, window, found[1])


def _answers(
    reference: nn.Module, model: nn.Module, names: Iterable[str], batch: Any
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """What both modules' parts answer to a batch, call by call."""
    heard: tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]] = ({}, {})
    for module, one in ((reference, heard[0]), (model, heard[1])):

        def hear(name: str, _: Any, answer: torch.Tensor, one: dict[str, list[torch.Tensor]] = one) -> None:
            one.setdefault(name, []).append(answer)

        with watched(module, names, hear):
            call(module, batch)
    for name, ours in heard[0].items():
        theirs = heard[1].get(name, [])
        shapes = [[list(answer.shape) for answer in one] for one in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise RefusedError(
                f"activations are compared where both models answer alike, but {name} answers {shapes[0]} in the "
                f"reference and {shapes[1]} in the model",
                hint="give two models of the same class and settings",
            )
        yield from ((name, left, right) for left, right in zip(ours, theirs, strict=True))


class _Sums:
    """What is added up of one module's answers, for a group that has a window on its weight.

    Numbers are counted from the mean of the first batch, so that little is lost when means are taken off in the end.
    Levels that are fixed are compared place by place: matrices for each of their indices.
    """

    def __init__(self, group: AxisGroup, window: Window, dimension: int) -> None:
        index = elements_of(group, window)
        assert index is not None
        self.levels = free_levels(group, window)
        self.index = torch.from_numpy(index.T.copy())
        self.dimension = dimension
        self.count = 0
        self.middles: list[torch.Tensor] = []
        self.sums = [torch.zeros(self.index.shape, dtype=torch.float64) for _ in range(4)]
        places, size = self.index.shape
        self.products = torch.zeros(places, size, size)

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Add what both answer to one call."""
        sides = [rows(answer, self.dimension) for answer in (ours, theirs)]
        step = max(_CHUNK // max(self.index.numel(), 1), 1)
        for both in zip(*(torch.split(side, step) for side in sides), strict=True):
            self._add([one.float().cpu() for one in both])

    def _add(self, both: Sequence[torch.Tensor]) -> None:
        """Add some rows of both."""
        found = []
        for place, numbers in enumerate(both):
            if not self.count:
                self.middles.append(numbers.mean(dim=0))
            centred = (numbers - self.middles[place])[:, self.index]  # [rows, fixed, free]
            self.sums[place] += centred.sum(dim=0, dtype=torch.float64)
            self.sums[2 + place] += centred.square().sum(dim=0, dtype=torch.float64)
            found.append(centred.movedim(0, 1))
        self.products.baddbmm_(found[0].transpose(1, 2), found[1])
        self.count += len(both[0])

    def correlations(self) -> torch.Tensor:
        """The correlations of the reference's channels with the model's, summed over fixed indices; float32."""
        means = [one / self.count for one in self.sums[:2]]
        scales = []
        for mean, squares, middle in zip(means, self.sums[2:], self.middles, strict=True):
            variance = squares / self.count - mean.square()
            lives = variance > _DEAD * (middle.double()[self.index] + mean).square()
            scales.append(torch.where(lives, variance, torch.inf).rsqrt())
        found = self.products.double() / self.count - means[0][:, :, None] * means[1][:, None]
        return (found * scales[0][:, :, None] * scales[1][:, None]).sum(dim=0).float()


def _solved(groups: Sequence[AxisGroup], sums: Mapping[str, Sequence[_Sums]]) -> ActivationMatch:
    permutations: dict[str, Permutation] = {}
    correlations: dict[str, tuple[float, float]] = {}
    for group in groups:
        terms: dict[tuple[str, ...], torch.Tensor] = {}
        channels = 0
        before = 0.0
        for one in sums[group.name]:
            if one.count:
                found = one.correlations()
                before += float(found.trace())
                channels += one.index.numel()
                term = found.view(group.shape(one.levels) * 2)
                terms[one.levels] = terms[one.levels] + term if one.levels in terms else term
        if terms:
            permutations[group.name], gain = solve(group, terms, Permutation(group, {}))
            correlations[group.name] = before / channels, (before + gain) / channels
    unmeasured = tuple(group.name for group in groups if group.name not in permutations)
    return ActivationMatch(permutations, correlations, unmeasured)
