"""Whether adapters landed in a merge: the strength of each that every changed tensor shows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from remelt.adapters.checkpoint import changes_of, tensor_of
from remelt.adapters.names import is_adapter
from remelt.api.adapter_views import Changed
from remelt.api.options import PathLike
from remelt.archs.detect import detect
from remelt.check.inputs import Input
from remelt.core.dtype import DType
from remelt.errors import AdapterError, OptionError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.locate import locate_model, models_folders
from remelt.recipe.node import Model

_STEP = 2**20
"""Elements that are looked at at a time."""
_ROUNDING = {DType.F16: 2.0**-11, DType.BF16: 2.0**-8, DType.F32: 2.0**-24, DType.F64: 2.0**-53}
"""Half a unit in the last place, beside the number."""
_COARSE = 2.0**-4
_SLACK = 4.0
"""How many times the error that rounding makes is allowed."""
_LEAST = 1e-4
"""Error of a strength that is always allowed."""


@dataclass
class Landing:
    """What was found of one tensor: the strength of each adapter there, and the error that rounding explains."""

    key: str
    strengths: tuple[float, ...]
    tolerances: tuple[float, ...]


@dataclass
class LandedAdapters:
    """What was found of all: the adapters by name, their strengths over all tensors, and every fault."""

    adapters: tuple[str, ...]
    strengths: tuple[float, ...] = ()
    landings: list[Landing] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def verify_adapters(
    merged: PathLike,
    adapters: Sequence[PathLike],
    base: PathLike,
    *,
    strengths: Sequence[float] | None = None,
    ignore_unused: bool = False,
    models_dirs: Sequence[PathLike] = (),
) -> LandedAdapters:
    """Tell by which strength each adapter is in each tensor of a merge of one base and those adapters.

    ``strengths`` are those that it should be, one for each; without them all tensors must show one and the same. Where
    a tensor does not show it, within what rounding to the file's type explains, that is a fault. Nothing is held whole.

    Raises `AdapterError` where an adapter is none of that model's, or has modules that it lacks; with
    ``ignore_unused`` the latter are left out.
    """
    if strengths is not None and len(strengths) != len(adapters):
        raise OptionError(f"there are {len(adapters)} adapters, but {len(strengths)} strengths", hint="one for each")
    folders = [Path.cwd(), *models_folders([Path(folder) for folder in models_dirs])]
    with contextlib.ExitStack() as stack:

        def opened(name: PathLike) -> Input:
            checkpoint = stack.enter_context(open_checkpoint(locate_model(str(name), folders)))
            label = Path(str(name)).name
            return Input(label, Model(str(name)), checkpoint, detect(checkpoint.tensors))

        there, before = Changed(opened(merged)), Changed(opened(base))
        views = []
        for name in adapters:
            given = opened(name)
            if not is_adapter(given.checkpoint.tensors):
                raise AdapterError(f"{given.label} is no adapter: its tensors are those of a model")
            try:
                view = changes_of(given.checkpoint, before.layouts, before.in_dialect, ignore_unused=ignore_unused)
            except AdapterError as error:
                raise AdapterError(f"{given.label}: {error.message}", hint=error.hint) from None
            views.append(view)
        result = LandedAdapters(tuple(Path(str(name)).name for name in adapters))
        _land(there.original, before.original, views, strengths, result)
    return result


def _land(
    merged: Checkpoint,
    base: Checkpoint,
    views: Sequence[Checkpoint],
    stated: Sequence[float] | None,
    result: LandedAdapters,
) -> None:
    keys = dict.fromkeys(key for view in views for key in view.tensors)
    grams, products = np.zeros((len(views),) * 2), np.zeros(len(views))
    for key in keys:
        if key not in merged.tensors or merged.tensors[key].shape != base.tensors[key].shape:
            result.faults.append(f"{key}: an adapter changes it, but the merge has no such tensor")
            continue
        gram, product, noise = _sums(merged, base, views, key)
        grams, products = grams + gram, products + product
        present = [place for place in range(len(views)) if gram[place, place] > 0.0]
        if not present:
            continue
        inside = gram[np.ix_(present, present)]
        found = np.full(len(views), math.nan)
        found[present] = np.linalg.lstsq(inside, product[present], rcond=None)[0]
        errors = np.full(len(views), math.nan)
        errors[present] = _SLACK * noise * np.sqrt(np.maximum(np.diag(np.linalg.pinv(inside)), 0.0)) + _LEAST
        result.landings.append(Landing(key, tuple(map(float, found)), tuple(map(float, errors))))
    result.strengths = tuple(map(float, np.linalg.lstsq(grams, products, rcond=None)[0])) if keys else ()
    wanted = result.strengths if stated is None else tuple(stated)
    for landing in result.landings:
        for place, strength in enumerate(landing.strengths):
            if math.isnan(strength) or abs(strength - wanted[place]) <= landing.tolerances[place]:
                continue
            said = "stated" if stated is not None else "of all"
            result.faults.append(
                f"{landing.key}: {result.adapters[place]} is there by {strength:.4g}, {said} {wanted[place]:.4g}"
            )


def _sums(
    merged: Checkpoint, base: Checkpoint, views: Sequence[Checkpoint], key: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """Products of the changes with each other and with the difference; and the norm of what rounding made."""
    info, own = merged.tensors[key], base.tensors[key]
    gram, product, square = np.zeros((len(views),) * 2), np.zeros(len(views)), 0.0
    for begin in range(0, info.numel, _STEP):
        end = min(begin + _STEP, info.numel)

        def part(checkpoint: Checkpoint, dtype: DType, begin: int = begin, end: int = end) -> torch.Tensor:
            width = dtype.itemsize
            return tensor_of(checkpoint.read(key, begin * width, end * width), dtype).double()

        now = part(merged, info.dtype)
        way = now - part(base, own.dtype)
        changes = torch.stack(
            [part(view, DType.F32) if key in view.tensors else torch.zeros_like(way) for view in views]
        )
        gram += (changes @ changes.T).numpy()
        product += (changes @ way).numpy()
        square += float(now.square().sum())
    return gram, product, math.sqrt(square) * _ROUNDING.get(info.dtype, _COARSE)
