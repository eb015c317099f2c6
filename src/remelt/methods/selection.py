"""Thresholds by rank: which magnitude has a given place in the order of all, exactly, without sorting.

The bits of float32 magnitudes are in the order of the magnitudes. A histogram of their upper halves, of a sample, tells
nearly where the wanted one is; one pass over all then counts each of the magnitudes about there, and how many are
below. Where the sample was all there is, the magnitudes of one upper half are enough; where the guess was wrong, a pass
finds the right half first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from remelt.recipe.method import ELEMENTS, Reduction

UPPER_BINS = 2**15
ROW = 2**8
"""Magnitudes: a window begins at a multiple of them, whose number float32 holds exactly."""
HELD = 3 * 2**19
"""Bytes of the histograms of one operand."""
_HALF = 2**16
"""Magnitudes that have one upper half."""
_WINDOW = 2**18
"""Magnitudes about a guess: some percent more and less, which a sample of thousands hardly misses."""


def upper_histogram(values: Tensor) -> Tensor:
    """How many magnitudes have each of the upper halves of float32's bits: 32,768 counts.

    >>> int(upper_histogram(torch.tensor([1.0, -1.0, 2.0]))[0x3F80])
    2
    """
    if has_torch_function_unary(values):
        return handle_torch_function(upper_histogram, (values,), values)
    return torch.bincount(_magnitudes(values) >> 16, minlength=UPPER_BINS)


def window_histogram(values: Tensor, row: float, bins: int) -> Tensor:
    """How many magnitudes have the bits ``256 * row``, the next ones, and so on: ``bins`` counts, a power of two.

    One more count follows, of the magnitudes below.

    >>> window_histogram(torch.tensor([1.0, -1.0, 2.0, 0.5]), 0x3F8000, 2)
    tensor([2, 0, 1])
    """
    if has_torch_function_unary(values):
        return handle_torch_function(window_histogram, (values,), values, row, bins)
    places = _magnitudes(values) - int(row) * ROW
    within = torch.bincount(places[(places >= 0) & (places < bins)], minlength=bins)
    return torch.cat((within, (places < 0).sum().reshape(1)))


def _guesses(*models: Tensor) -> Mapping[str, Tensor]:
    """For each model, how many magnitudes of a sample have each upper half."""
    return {f"guess{place}": upper_histogram(model) for place, model in enumerate(models)}


def _near(*models: Tensor, sums: Mapping[str, float]) -> Mapping[str, Tensor]:
    """For each model, how many have each magnitude about the guess."""
    return {
        f"near{place}": window_histogram(model, sums[f"guessed{place}"], _WINDOW) for place, model in enumerate(models)
    }


def _uppers(*models: Tensor) -> Mapping[str, Tensor]:
    """For each model, how many of all magnitudes have each upper half."""
    return {f"upper{place}": upper_histogram(model) for place, model in enumerate(models)}


def _lowers(*models: Tensor, sums: Mapping[str, float]) -> Mapping[str, Tensor]:
    """For each model, how many have each of the magnitudes of the threshold's upper half."""
    return {f"lower{place}": window_histogram(model, sums[f"row{place}"], _HALF) for place, model in enumerate(models)}


def _is_whole(sums: Mapping[str, float]) -> bool:
    return bool(sums["whole"] or sums["settled"])


def _is_settled(sums: Mapping[str, float]) -> bool:
    return bool(sums["settled"])


SELECTION = (
    Reduction(_guesses, sampled=True),
    Reduction(_near, unless=_is_whole, due="sample"),
    Reduction(_uppers, unless=_is_whole, due="never"),
    Reduction(_lowers, unless=_is_settled, due="whole"),
)
"""The rounds of reductions that find thresholds."""


ACROSS = (Reduction(_uppers, across=True), Reduction(_lowers, across=True))
"""The rounds that find thresholds by rank among all tensors of a model."""


def selection_of(values: Callable[..., Sequence[Tensor]]) -> tuple[Reduction, ...]:
    """The rounds that find thresholds of what a function makes of the operands: of as many tensors as it gives."""

    def guesses(*models: Tensor) -> Mapping[str, Tensor]:
        return _guesses(*values(*models))

    def near(*models: Tensor, sums: Mapping[str, float]) -> Mapping[str, Tensor]:
        return _near(*values(*models), sums=sums)

    def uppers(*models: Tensor) -> Mapping[str, Tensor]:
        return _uppers(*values(*models))

    def lowers(*models: Tensor, sums: Mapping[str, float]) -> Mapping[str, Tensor]:
        return _lowers(*values(*models), sums=sums)

    functions: tuple[Callable[..., Mapping[str, Tensor]], ...] = (guesses, near, uppers, lowers)
    return tuple(replace(one, function=function) for one, function in zip(SELECTION, functions, strict=True))


def counted_whole(values: Callable[..., Sequence[Tensor]]) -> tuple[Reduction, ...]:
    """The two rounds that find the same without a sample, as where values are of whole rows."""
    return tuple(Reduction(one.function) for one in selection_of(values)[2:])


def thresholds(sums: Mapping[str, Any], *, k: Sequence[float]) -> Mapping[str, float]:
    """The least magnitude of each model that is kept, as ``threshold0`` and so on: that of its largest share ``k``.

    0 where all are. Beside them what the rounds ask each other: where they look, and what is left to be done.
    """
    return magnitudes_at(sums, [None if share >= 1.0 else 1.0 - max(share, 0.0) for share in k])


def magnitudes_at(
    sums: Mapping[str, Any], shares: Sequence[float | None], ranks: Sequence[int] = ()
) -> dict[str, float]:
    """The magnitude that ends each share of the smallest, as ``threshold0`` and so on; 0 where none is asked for.

    With ``ranks``, counted from 1, the magnitudes that have them; the shares are then only where they are looked for,
    and must not change from round to round.
    """
    found: dict[str, float] = defaultdict(float, settled=1.0, whole=1.0)
    for place, share in enumerate(shares):
        guessed = f"guess{place}" in sums
        if share is None or not (guessed or f"upper{place}" in sums):
            continue
        rank = ranks[place] if ranks else max(int(share * int(sums[ELEMENTS])), 1)
        selected = _selected(sums, place, share, rank) if guessed else _selected_across(sums, place, rank)
        for name, value in selected.items():
            if name in ("settled", "whole"):
                found[name] = min(found[name], value)
            else:
                found[f"{name}{place}"] = value
    return found


def _selected(sums: Mapping[str, Any], place: int, share: float, rank: int) -> dict[str, float]:
    """What is known of the magnitude of one model that has a rank, about at the end of a share of all."""
    guess = _Counts(sums[f"guess{place}"])
    near, upper, lower = (sums.get(f"{name}{place}") for name in ("near", "upper", "lower"))
    whole = guess.total >= int(sums[ELEMENTS])
    found = {"whole": float(whole), "settled": 0.0}
    half, left = guess.place_of(rank if whole else max(int(share * guess.total), 1))
    between = left / max(int(guess.counts[half]), 1)
    row = max(int((half + between) * _HALF) - _WINDOW // 2, 0) // ROW
    found["guessed"] = float(row)
    if near is not None:
        counts = _Counts(near[:-1])
        found_at = rank - int(near[-1])
        if 1 <= found_at <= counts.total:
            return found | {"settled": 1.0, "threshold": magnitude_of(row * ROW + counts.place_of(found_at)[0])}
    if upper is not None:
        half, left = _Counts(upper).place_of(rank)
    found["row"] = float(half * (_HALF // ROW))
    if lower is not None:
        found["threshold"] = magnitude_of(half * _HALF + _Counts(lower[:-1]).place_of(left)[0])
        found["settled"] = 1.0
    return found


def _selected_across(sums: Mapping[str, Any], place: int, rank: int) -> dict[str, float]:
    """The same of all tensors of a model: nothing is guessed, as samples of tensors of many sizes weigh differently."""
    half, left = _Counts(sums[f"upper{place}"]).place_of(rank)
    found = {"row": float(half * (_HALF // ROW))}
    if (lower := sums.get(f"lower{place}")) is not None:
        found["threshold"] = magnitude_of(half * _HALF + _Counts(lower[:-1]).place_of(left)[0])
    return found


class _Counts:
    """The counts of a histogram, in rows with the totals up to the end of each: most rows need not be looked at."""

    def __init__(self, histogram: Tensor) -> None:
        self.counts: npt.NDArray[Any] = histogram.numpy()  # of 32 bits where all of them fit together
        self.rows = self.counts.reshape(ROW, -1)
        self.ends = self.rows.sum(1, dtype=self.counts.dtype).cumsum(dtype=np.int64)
        self.total = int(self.ends[-1])

    def place_of(self, rank: int) -> tuple[int, int]:
        """The bin of the value of that rank in order, counted from 1, and its rank within the bin.

        >>> _Counts(torch.tensor([2, 3] + 254 * [0])).place_of(4)
        (1, 2)
        """
        if not self.total:
            return 0, rank
        row = min(int(np.searchsorted(self.ends, rank)), len(self.rows) - 1)
        within = self.rows[row].cumsum(dtype=np.int64)
        rank -= int(self.ends[row] - within[-1])
        place = min(int(np.searchsorted(within, rank)), len(within) - 1)
        return row * len(within) + place, rank - int(within[place] - self.rows[row, place])


def magnitude_of(bits: int) -> float:
    """The magnitude with those bits.

    >>> magnitude_of(0x3F800000)
    1.0
    """
    return float(np.int32(bits).view(np.float32))


def _magnitudes(values: Tensor) -> Tensor:
    return values.reshape(-1).float().abs().view(torch.int32)
