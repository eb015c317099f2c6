"""What sets several deltas apart, and what they share: SCE by their variance, RAM by where they are not zero."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from remelt.methods.consensus import agreed
from remelt.methods.selection import HELD, magnitudes_at, selection_of
from remelt.recipe.method import ELEMENTS, Delta, Number, Reduction, Sums, merge_method

_LEAST = 2.0**-126
"""The least normal number of float32: a variance below counts as none."""
_BINS_BELOW = 2**7
"""Bins of a histogram of upper halves that are below it."""


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """The variance of each element among the deltas; of a single delta, its square."""
    if len(deltas) == 1:
        return deltas[0] * deltas[0]
    mean = functools.reduce(torch.add, [delta - deltas[0] for delta in deltas[1:]]) / len(deltas)
    ways = (delta - deltas[0] - mean for delta in deltas)  # from the first: of equal numbers, exactly 0
    return functools.reduce(torch.add, (way * way for way in ways)) / len(deltas)


def _variances(*deltas: Tensor) -> Sequence[Tensor]:
    return (variance(deltas),)


_GUESSES, _NEAR, _UPPERS, _LOWERS = selection_of(_variances)


def _near_and_varying(*deltas: Tensor, sums: Mapping[str, float]) -> Mapping[str, Tensor]:
    """How many variances have each value about the guess, and how many are not 0."""
    return {**_NEAR.function(*deltas, sums=sums), "varying": (variance(deltas).float() >= _LEAST).sum()}


def _selected(deltas: Sequence[Tensor], threshold: float) -> Callable[[int], Tensor]:
    """The deltas by place, where their variance is not below a threshold, else 0."""
    varies = variance(deltas).float() >= threshold  # as they were counted
    return lambda place: torch.where(varies, deltas[place], 0.0)


def _energies(*deltas: Tensor, sums: Mapping[str, float]) -> Mapping[str, Tensor]:
    """Partial sums of a tile: the squares of what is selected of each delta."""
    selected = _selected(deltas, sums["threshold"])
    return {f"energy{place}": selected(place).double().square().flatten().sum() for place in range(len(deltas))}


def shares_of_selected(sums: Mapping[str, Any], *, select_topk: float) -> Mapping[str, float]:
    """The least variance that is selected, and the share that each delta has by its squares there."""
    found = _least_variance(sums, select_topk)
    energies = [sums[f"energy{place}"] for place in range(sum(name.startswith("energy") for name in sums))]
    total = sum(energies)
    for place, energy in enumerate(energies):
        found[f"share{place}"] = energy / total if 0.0 < total < math.inf else 1.0 / len(energies)
    return found


def _least_variance(sums: Mapping[str, Any], share: float) -> dict[str, float]:
    """The variance that the largest share of all that are not 0 have at least, and where it is looked for."""
    if share >= 1.0 or "guess0" not in sums:
        return magnitudes_at(sums, ()) | {"threshold": 0.0}
    size, guess = int(sums[ELEMENTS]), sums["guess0"]
    sampled = int(guess.sum())
    varying = sampled - int(guess[:_BINS_BELOW].sum())
    expected = int(varying * share) / max(sampled, 1)
    is_exact = sampled >= size or "varying" in sums
    count = int(int(sums.get("varying", varying)) * share)
    if is_exact and count <= 0:
        return magnitudes_at(sums, ()) | {"threshold": math.inf}
    found = magnitudes_at(sums, (1.0 - expected,), (size - max(count, 1) + 1,))
    return found | {"threshold": found["threshold0"]}


@merge_method(
    cut="element",
    reductions=(_GUESSES, replace(_NEAR, function=_near_and_varying), _UPPERS, _LOWERS, Reduction(_energies)),
    conclusion=shares_of_selected,
    held=HELD,
    workspace=8.0,
)
def sce(*deltas: Delta, select_topk: Number = 1.0, sums: Sums) -> Delta:
    """Deltas where they differ most, weighted by their energy there, without those of the minority's sign: SCE.

    Formula: select the share ``select_topk`` of all elements with variance, those whose variance among the deltas is
    largest; the rest become 0. Calculate each delta's weight: its sum of squares there, divided by the total of these
    sums. Erase the deltas that have not the sign of their sum, element by element. The result is (sum of w d) / (sum of
    w) over the others.

    Spaces: deltas give a delta. For fine-tunes of several skills: it takes what distinguishes them, most from the one
    that went farthest. Of a single delta, its squares stand for the variance. Where all deltas are equal there is
    nothing to select below 1; an element that is not finite in some delta becomes 0. It costs a pass for the weights,
    and below 1 one more for the threshold, which is exact, with as many kept as have just that variance.

    Source: SCE of FuseChat-3.0 (Wan et al. 2024, arXiv 2408.07990); as in mergekit.

    >>> from torch import tensor
    >>> sce.on(tensor([2.0, 1.0, 0.0]), tensor([-1.0, 1.0, 3.0]), select_topk=1.0)
    tensor([2., 1., 3.])
    """
    selected = _selected(deltas, sums["threshold"])
    shares = [sums[f"share{place}"] for place in range(len(deltas))]
    return agreed(lambda place: selected(place) * shares[place], shares, vote=selected)


def _presence(deltas: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Where each delta is present, and how many are."""
    present = [delta.abs() > epsilon for delta in deltas]
    return present, functools.reduce(torch.add, [one.to(deltas[0].dtype) for one in present])


@merge_method(cut="element", workspace=8.0)
def ram(*deltas: Delta, epsilon: Number = 1e-5) -> Delta:
    """Each element from those deltas that changed it: alone as it is, else their mean.

    Formula: (sum of the deltas present) / (how many are present), 0 where none is; a delta is present where |delta| >
    ``epsilon``.

    Spaces: deltas give a delta. For models that were changed in few places each, by reinforcement learning: a mean of
    all would dilute what one model alone has learned. Elements below ``epsilon`` are lost, so it must suit the deltas.
    It costs one pass.

    Source: Reinforced Agent Merging (arXiv 2601.13572); as in mergekit.

    >>> from torch import tensor
    >>> ram.on(tensor([2.0, 0.0, 3.0]), tensor([4.0, 1.0, 0.0]))
    tensor([3., 1., 3.])
    """
    present, count = _presence(deltas, epsilon)
    total = functools.reduce(
        torch.add, [torch.where(is_there, delta, 0.0) for delta, is_there in zip(deltas, present, strict=True)]
    )
    return torch.where(count == 0.0, total, total / count)


def _meetings(*deltas: Tensor, epsilon: float) -> Mapping[str, Tensor]:
    """Counts of a tile: how many elements each delta shares with others, and has alone."""
    present, count = _presence(deltas, epsilon)
    shared = {f"shared{place}": (one & (count > 1.0)).flatten().sum() for place, one in enumerate(present)}
    alone = {f"alone{place}": (one & (count == 1.0)).flatten().sum() for place, one in enumerate(present)}
    return shared | alone


def boosts(sums: Mapping[str, float], *, gain: float, limit: float) -> Mapping[str, float]:
    """By how much each delta is enlarged where it is alone."""
    found = {}
    for place in range(sum(name.startswith("shared") for name in sums)):
        shared, alone = sums[f"shared{place}"], sums[f"alone{place}"]
        found[f"boost{place}"] = 1.0 + gain * max(min(shared / alone if alone else math.inf, limit), 0.0)
    return found


@merge_method(cut="element", reductions=(_meetings,), conclusion=boosts, workspace=8.0)
def ram_plus(*deltas: Delta, gain: Number = 0.1, limit: Number = 0.2, epsilon: Number = 1e-5, sums: Sums) -> Delta:
    """As `ram`, with what a delta alone has changed enlarged, the more it shares with others elsewhere.

    Formula: where one delta is present, (1 + gain min(s / u, limit)) delta, with s of its elements shared in this
    tensor and u present in it alone; where several are, their mean; else 0. A delta is present where |delta| >
    ``epsilon``.

    Spaces: deltas give a delta. As `ram`: it makes up for what the mean takes from a delta that meets many others. One
    more pass counts the elements.

    Source: RAM+ of Reinforced Agent Merging (arXiv 2601.13572), whose r is ``gain`` and alpha ``limit``; the
    ``ramplus_tl`` of mergekit, where s and u are of one tensor.

    >>> from torch import tensor
    >>> ram_plus.on(tensor([2.0, 0.0, 3.0]), tensor([4.0, 1.0, 0.0]))
    tensor([3.0000, 1.0200, 3.0600])
    """
    present, count = _presence(deltas, epsilon)
    pairs = list(zip(deltas, present, strict=True))
    total = functools.reduce(torch.add, [torch.where(is_there, delta, 0.0) for delta, is_there in pairs])
    alone = functools.reduce(
        torch.add,
        [torch.where(is_there, delta * sums[f"boost{place}"], 0.0) for place, (delta, is_there) in enumerate(pairs)],
    )
    return torch.where(count == 1.0, alone, torch.where(count == 0.0, total, total / count))
