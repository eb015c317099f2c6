"""Where matching can begin: channels that look alike whatever the order of everything around them.

The numbers in a channel's row, sorted, are the same for any permutation of its columns. Quantiles of them are compared
instead of the rows themselves; where the columns mean the same in both models (pixels, words), the rows are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from remelt.alignment.assignment import Solver, solve
from remelt.alignment.experts import are_many
from remelt.alignment.permutation import Permutation
from remelt.alignment.products import free_levels, rows_of, rows_of_both
from remelt.alignment.weights import Lying, Weights
from remelt.archs.axis_groups import AxisGroup, Window, keys_of

_QUANTILES = 64
_CHUNK = 2**22
"""Elements that are sorted at a time."""


def signature_start(
    groups: Sequence[AxisGroup], reference: Weights, model: Weights, lying: Lying, solver: Solver
) -> dict[str, Permutation]:
    """For each group the permutation under which the sorted rows of both models agree most."""
    found = {}
    for group in groups:
        if are_many(group):  # whose pairs are too many to be compared
            continue
        terms: dict[tuple[str, ...], torch.Tensor] = {}
        for window in group.windows:
            levels = free_levels(group, window)
            if not levels:
                continue
            shape = group.shape(levels) * 2
            terms.setdefault(levels, torch.zeros(shape))
            if _is_known(group, window, lying):
                for ours, theirs in rows_of_both(group, window, reference, model, lying, {}):
                    terms[levels] += (ours @ theirs.T).view(shape)
                continue
            ours, theirs = (_signatures(rows_of(group, window, one, _CHUNK)) for one in (reference, model))
            middle = (ours.mean(dim=0) + theirs.mean(dim=0)) / 2
            terms[levels] += ((ours - middle) @ (theirs - middle).T).view(shape)
        found[group.name] = solve(group, terms, Permutation(group, {}), solver)[0]
    return found


def _is_known(group: AxisGroup, window: Window, lying: Lying) -> bool:
    """Whether what stands in a row of a window has the same order in any model."""
    lies = [one for one in lying[keys_of(group, window)[0]] if one != (group, window)]
    return all(one.axis == window.axis and not one.chooses for _, one in lies)


def _signatures(chunks: Iterable[torch.Tensor]) -> torch.Tensor:
    """The quantiles of each row, of the same weight as the row itself."""
    found = []
    for rows in chunks:
        ordered, width = rows.sort(dim=1).values, rows.shape[1]
        if width > _QUANTILES:
            places = torch.linspace(0, width - 1, _QUANTILES).round().long()
            ordered = ordered[:, places] * math.sqrt(width / _QUANTILES)
        found.append(ordered)
    return torch.cat(found)
