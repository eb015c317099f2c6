"""Permutations in files: one small safetensors file that tells where they belong, how they were found, and what for.

A level that moves is a tensor ``GROUP/LEVEL`` of int32, one that is rotated then a tensor ``GROUP/LEVEL.rotation`` of
float32; the metadata has the groups with their windows, so that a file is applied without knowing the arch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from remelt.alignment.permutation import Permutation, Permutations, Rotations, identity, is_permutation
from remelt.alignment.rotations import inverse_rotations, rotatable
from remelt.archs.axis_groups import AxisGroup, Level, Shapes, Window, faults, windows_by_key
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError, OutputError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.recipe.axis_orders import HeldPermutations
from remelt.tensors import tensor_over

FORMAT_KEY, GROUPS_KEY, SHAPES_KEY, FACTS_KEY = (
    f"remelt_{name}" for name in ("permutations", "groups", "shapes", "match")
)
FORMAT, ROTATED = FORMATS = "1", "2"
"""Of permutations alone, and with rotations."""
ROTATION = ".rotation"
ORIGINAL = "original"
_OTHER = "remelt rebasin --model-a A --model-b B --save-permutations FILE writes one"
_BROKEN = "take it again from where it came from, or align the models anew"
_SHOWN = 3
_MOST = 2**28
"""Indices of a group, of which no model has as many."""
_ROUNDING = 1e-3
"""How far from orthogonal a matrix of float32 may be, for any size of a head."""
_NUMBERS = ("before", "after", "certified")
Part = NDArray[np.int32]


@dataclass(frozen=True, eq=False, repr=False)
class SavedPermutations(HeldPermutations):
    """Permutations of a model's axis groups, rotations of heads after them, and what is known of both.

    ``groups`` are all groups of the model, fixed ones included, and ``shapes`` those of its tensors, by their keys in
    ``dialect``. ``reference`` and ``model`` are SHA-256 hashes of the contents of what was aligned; ``before`` and
    ``after`` the objective, ``certified`` the share of the groups that were certified to be best without a solver;
    ``reports`` what is told of each group, by its name.
    """

    permutations: Permutations
    groups: tuple[AxisGroup, ...]
    shapes: Shapes
    arch: str | None = None
    dialect: str = ORIGINAL
    reference: str = ""
    model: str = ""
    before: float | None = None
    after: float | None = None
    certified: float | None = None
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rotations: Rotations = field(default_factory=dict)

    def inverse(self) -> SavedPermutations:
        """What undoes them: the same file, read the other way."""
        undone = {name: one.inverse() for name, one in self.permutations.items()}
        turned = inverse_rotations(self.groups, self.permutations, self.rotations)
        return replace(self, permutations=undone, rotations=turned, reference=self.model, model=self.reference)

    @property
    def moving(self) -> dict[str, Permutation]:
        """Those that move anything."""
        return {name: one for name, one in self.permutations.items() if not one.is_identity}

    @property
    def changing(self) -> tuple[AxisGroup, ...]:
        """The groups of which anything is moved or rotated."""
        moving = self.moving
        return tuple(group for group in self.groups if group.name in moving or group.name in self.rotations)


def save_permutations(saved: SavedPermutations, path: Path, *, overwrite: bool = False) -> Path:
    """Write permutations to a safetensors file, which is there once it is whole.

    Raises `OutputError` where there is one already, or where it cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists", hint="--overwrite replaces it")
    tensors = {
        f"{name}/{level}": np.ascontiguousarray(part, np.int32)
        for name, one in saved.moving.items()
        for level, part in one.parts.items()
        if not np.array_equal(part, identity(one.group.by_name[level], one.group))
    }
    rotations = {
        f"{name}/{level}{ROTATION}": np.ascontiguousarray(matrices.numpy(), np.float32)
        for name, levels in saved.rotations.items()
        for level, matrices in levels.items()
    }
    facts = {name: getattr(saved, name) for name in ("arch", "dialect", "reference", "model", *_NUMBERS)}
    metadata = {
        FORMAT_KEY: ROTATED if rotations else FORMAT,
        GROUPS_KEY: _compact([_told(group) for group in saved.groups]),
        SHAPES_KEY: _compact({key: list(shape) for key, shape in saved.shapes.items()}),
        FACTS_KEY: _compact({**facts, "reports": {name: dict(one) for name, one in saved.reports.items()}}),
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(safetensors.numpy.save({**tensors, **rotations}, metadata))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return path


def load_permutations(path: Path) -> SavedPermutations:
    """The permutations of a file. Raises `FormatError` for a file of anything else, and for one that is damaged."""
    with open_checkpoint(path) as checkpoint:
        told, name = checkpoint.metadata, path.name
        if FORMAT_KEY not in told:
            raise FormatError(f"{name} is no permutation file: its metadata has no {FORMAT_KEY}", hint=_OTHER)
        if told[FORMAT_KEY] not in FORMATS:
            raise FormatError(
                f"{name} is a permutation file of format {told[FORMAT_KEY]!r}, "
                f"but this remelt reads formats {' and '.join(FORMATS)}",
                hint="a newer version of remelt wrote it: update this one",
            )
        try:
            groups = tuple(map(_group, json.loads(told[GROUPS_KEY])))
            shapes = {str(key): tuple(map(int, one)) for key, one in json.loads(told[SHAPES_KEY]).items()}
            facts = dict(json.loads(told[FACTS_KEY]))
            reports = {str(key): dict(one) for key, one in facts.get("reports", {}).items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"{name} is damaged: what its metadata tells is no groups: {error}", hint=_BROKEN
            ) from None
        _refuse_faults(name, groups, shapes)
        found, rotations = _read_levels(checkpoint, name, groups, shapes)
    known: dict[str, Any] = {one: facts[one] for one in ("arch", *_NUMBERS) if facts.get(one) is not None}
    known |= {one: str(facts.get(one) or "") for one in ("reference", "model")}
    return SavedPermutations(
        found,
        groups,
        shapes,
        dialect=str(facts.get("dialect") or ORIGINAL),
        reports=reports,
        rotations=rotations,
        **known,
    )


def _read_levels(
    checkpoint: Checkpoint, name: str, groups: Iterable[AxisGroup], shapes: Shapes
) -> tuple[dict[str, Permutation], dict[str, dict[str, torch.Tensor]]]:
    """The permutations and rotations of a file's levels; `FormatError` for what is neither."""
    parts: dict[str, dict[str, Part]] = {}
    rotations: dict[str, dict[str, torch.Tensor]] = {}
    by_name = {group.name: group for group in groups}
    for key, info in checkpoint.tensors.items():
        group_name, _, level_name = key.rpartition("/")
        group = by_name.get(group_name)
        turns = group is not None and level_name.endswith(ROTATION) and level_name not in group.by_name
        level_name = level_name.removesuffix(ROTATION) if turns else level_name
        level = None if group is None else group.by_name.get(level_name)
        if group is None or level is None:
            raise FormatError(f"{name} is damaged: {key!r} is no level of a group that it tells", hint=_BROKEN)
        if turns and level_name not in rotatable(group, shapes):
            raise FormatError(f"{name} is damaged: {key!r} rotates what may only be permuted", hint=_BROKEN)
        extent = group.extent(level)
        wanted = TensorInfo(DType.F32, (*extent, level.size)) if turns else TensorInfo(DType.I32, extent)
        if info != wanted:
            raise FormatError(f"{name} is damaged: {key!r} is {info}, but it must be {wanted}", hint=_BROKEN)
        if turns:
            matrices = tensor_over(checkpoint.read(key), DType.F32).clone().reshape(info.shape)
            if not _is_rotation(matrices):
                raise FormatError(f"{name} is damaged: {key!r} is no rotation of each head", hint=_BROKEN)
            rotations.setdefault(group_name, {})[level_name] = matrices
            continue
        part = np.frombuffer(checkpoint.read(key), "<i4").reshape(info.shape).astype(np.int32)
        if not is_permutation(part, level):
            raise FormatError(f"{name} is damaged: {key!r} is no permutation of its level", hint=_BROKEN)
        parts.setdefault(group_name, {})[level_name] = part
    return {one: Permutation(by_name[one], some) for one, some in parts.items()}, rotations


def _is_rotation(matrices: torch.Tensor) -> bool:
    """Whether each is orthogonal within the rounding of float32."""
    product = matrices @ matrices.transpose(1, 2)
    return bool((product - torch.eye(matrices.shape[-1])).abs().max() < _ROUNDING)  # NaN is not


def specification_faults(groups: Iterable[AxisGroup], shapes: Shapes) -> Iterator[str]:
    """What is wrong with groups of a model with these tensors, of which some may be of no group."""
    given = tuple(groups)
    known = windows_by_key(given)
    return faults(given, {key: shape for key, shape in shapes.items() if key in known})


def _refuse_faults(name: str, groups: tuple[AxisGroup, ...], shapes: Shapes) -> None:
    wrong = [f"{group.name} has numbers that no group has" for group in groups if not _is_plausible(group)]
    try:
        wrong = wrong or list(specification_faults(groups, shapes))
    except (KeyError, IndexError) as error:
        wrong = [f"no level is named {error}"]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise FormatError(f"{name} is damaged: {'; '.join(wrong[:_SHOWN])}{more}", hint=_BROKEN)


def _is_plausible(group: AxisGroup) -> bool:
    """Whether its numbers can be those of a group, so that it is safe to look closer."""
    sizes = [level.size for level in group.levels]
    starts = [window.offset for window in group.windows]
    steps = [step for window in group.windows for step in (window.run, window.axis + 1, *window.strides)]
    cells = [cell for level in group.levels for cell in level.cells]
    largest = math.prod(sizes) * max((window.run for window in group.windows), default=1)
    return min((*sizes, *steps, *cells, 1)) > 0 and min((*starts, 0)) == 0 and largest <= _MOST


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _told(group: AxisGroup) -> dict[str, Any]:
    """A group as JSON holds it: what is as by default is left out."""
    told: dict[str, Any] = {"name": group.name, "levels": [], "windows": []}
    if group.crosses:
        told["crosses"] = group.crosses
    for level in group.levels:
        one: dict[str, Any] = {"name": level.name, "size": level.size}
        optional = (("below", list(level.below)), ("cells", list(level.cells)), ("fixed", level.fixed))
        told["levels"].append(one | {name: value for name, value in optional if value})
    for window in group.windows:
        one = {"key": window.key, "axis": window.axis, "levels": list(window.levels)}
        one |= {"offset": window.offset} if window.offset else {}
        one |= {"run": window.run} if window.run != 1 else {}
        told["windows"].append(one | ({"strides": list(window.strides)} if window.strides else {}))
    return told


def _group(told: Mapping[str, Any]) -> AxisGroup:
    levels = tuple(
        Level(
            str(one["name"]),
            int(one["size"]),
            tuple(map(str, one.get("below", ()))),
            tuple(map(int, one.get("cells", ()))),
            bool(one.get("fixed", False)),
        )
        for one in told["levels"]
    )
    windows = tuple(
        Window(
            str(one["key"]),
            int(one["axis"]),
            tuple(map(str, one["levels"])),
            int(one.get("offset", 0)),
            int(one.get("run", 1)),
            tuple(map(int, one.get("strides", ()))),
        )
        for one in told["windows"]
    )
    return AxisGroup(str(told["name"]), levels, windows, str(told.get("crosses", "")))
