"""The usual procedure of weight matching, written down as it is published, on the right groups: what to be quicker than.

Whole tensors are copied with every other axis permuted, each visit multiplies everything again, the solver is asked
each time, and all increments are held at once. Sweeps go on until none gains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from remelt.archs.axis_groups import AxisGroup, keys_of

Axes = list[tuple[str, int, int]]
"""What is permuted alike: keys, axes, and where on them it begins."""


def flat_axes(groups: Sequence[AxisGroup]) -> list[tuple[int, Axes]]:
    """The sets of channels that are permuted alike, their number first; heads and groups are not looked at."""
    found = []
    for group in groups:
        sets: dict[tuple[str, ...], Axes] = {}
        for window in group.windows:
            lies = [(key, window.axis, window.offset) for key in keys_of(group, window)]
            sets.setdefault(window.levels, []).extend(lies)
        found += [(int(np.prod(group.shape(levels))), lies) for levels, lies in sets.items()]
    return found


def match_as_usual(
    reference: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor], groups: Sequence[AxisGroup]
) -> tuple[int, dict[int, np.ndarray]]:
    """The sweeps that were made, and the permutation of each set of channels."""
    sets = flat_axes(groups)
    permutations = {number: np.arange(size) for number, (size, _) in enumerate(sets)}
    lying: dict[str, list[tuple[int, int, int]]] = {}
    for number, (_, axes) in enumerate(sets):
        for key, axis, offset in axes:
            lying.setdefault(key, []).append((number, axis, offset))
    for sweep in range(1, 100):
        progress = False
        for number, (size, axes) in enumerate(sets):
            increments = []
            for key, axis, offset in axes:
                ours = reference[key].narrow(axis, offset, size)
                theirs = permuted_but_for(model[key], lying[key], permutations, number, sets)
                theirs = theirs.narrow(axis, offset, size)
                left = torch.moveaxis(ours, axis, 0).reshape(size, -1).float()
                right = torch.moveaxis(theirs, axis, 0).reshape(size, -1).float()
                increments.append(left @ right.T)
            costs = torch.stack(increments).sum(dim=0)
            _, columns = linear_sum_assignment(costs.numpy(), maximize=True)
            old = torch.vdot(costs.flatten(), torch.eye(size)[permutations[number]].flatten())
            new = torch.vdot(costs.flatten(), torch.eye(size)[columns].flatten())
            progress = progress or float(new) > float(old) + 1e-6 * abs(float(old))
            permutations[number] = columns
        if not progress:
            return sweep, permutations
    return sweep, permutations


def permuted_but_for(
    tensor: torch.Tensor,
    lying: Sequence[tuple[int, int, int]],
    permutations: Mapping[int, np.ndarray],
    number: int,
    sets: Sequence[tuple[int, Axes]],
) -> torch.Tensor:
    """A copy with all axes permuted but those of one set of channels."""
    for other, axis, offset in lying:
        if other != number:
            index = np.arange(tensor.shape[axis])
            index[offset : offset + sets[other][0]] = offset + permutations[other]
            tensor = torch.index_select(tensor, axis, torch.from_numpy(index))
    return tensor
