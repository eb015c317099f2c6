"""An adapter whose factors follow a model of which the axes were permuted: it stays of its kind, rank and names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from remelt.adapters.checkpoint import ChangesCheckpoint, Entry, changes_of
from remelt.adapters.kinds.decomposed import PART as MAGNITUDE
from remelt.adapters.kinds.decomposed import way_of
from remelt.adapters.kinds.full import Whole
from remelt.adapters.kinds.loha import LoHa
from remelt.adapters.kinds.lora import LoRA, LoRABias, is_turned
from remelt.adapters.names import modules_of
from remelt.adapters.pairing import Layouts
from remelt.errors import AdapterError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.permuted import Gather, PermutedCheckpoint, Positions

Moves = Mapping[int, Positions]
"""For each axis of a tensor along which anything moves, which index comes to each place."""
Part = tuple[str, int, Positions]
"""A part of a module, one of its axes, and which index comes to each place there."""
TurnedParts = Mapping[str, Mapping[int, tuple[str, int]]]
"""By the keys of an adapter's parts, for each axis that is to be rotated: as which axis of which original tensor."""
_SHOWN = 5
_TO_LORA = 'to_lora(permute(adapter, "found.safetensors"), rank=32) of it is computed from the difference as a whole'


class PartGathers:
    """What moves in the parts of an adapter."""

    is_known = True

    def __init__(self, gathers: Mapping[str, Gather], told: str) -> None:
        self.keys: Collection[str] = gathers.keys()
        self._gathers, self._told = gathers, told

    def of(self, key: str) -> Gather:
        """Where the elements of a part come from."""
        return self._gathers[key]

    def source(self, key: str) -> str:
        """The part itself."""
        return key

    def told(self) -> str:
        """What decides it."""
        return self._told

    def files(self) -> tuple[Path, ...]:
        """None: what decides it is told."""
        return ()


def permuted_adapter(
    adapter: Checkpoint,
    layouts: Layouts,
    gather_of: Callable[[str], Gather | None],
    told: str,
    *,
    alone: bool = False,
    turned: Mapping[str, Collection[int]] | None = None,
) -> tuple[PermutedCheckpoint, TurnedParts]:
    """An adapter's own tensors, permuted as the tensors that they change: its factors by rows or by columns.

    ``gather_of`` says of a tensor by its original key where its elements come from; ``told`` what decides that. LoRA,
    LoCon, LoHa, DoRA, biases and full differences are permuted, and any kind where nothing moves. Raises `AdapterError`
    with the modules of other kinds, and with those that would change their names; with ``alone``, also where changes
    depend on the model's own weights. ``turned`` are the axes of original tensors that rotations turn after that: what
    they turn in the adapter is told. Of LoRA, biases and full differences that can be.
    """
    changes: Any = changes_of(adapter, layouts, lambda _: adapter).checkpoint
    assert isinstance(changes, ChangesCheckpoint)
    if alone and changes.needs_base:
        raise AdapterError("it multiplies a model's own weights")
    modules = modules_of(adapter.tensors)
    places = _places(layouts, {entry.dialect for entry in changes.entries.values()})
    axes: dict[str, dict[int, Positions]] = {}
    turns: dict[str, dict[int, tuple[str, int]]] = {}
    refused: list[str] = []
    for entry in changes.entries.values():
        try:
            parts, own = modules[entry.parts.module].parts, places[entry.dialect].get(entry.key, [])
            moves = _moves(entry, own, gather_of)
            for part, axis, index in _parts(entry, moves) if moves else ():
                axes.setdefault(parts[part], {})[axis] = index
            for part, axis, original in _turned(entry, own, turned or {}):
                turns.setdefault(parts[part], {})[axis] = original
        except _NotPermutedError as error:
            refused.append(f"  {entry.parts.module}: {error}")
    if refused:
        more = [f"  and {len(refused) - _SHOWN} more"] if len(refused) > _SHOWN else []
        lines = [f"{len(refused)} of its modules cannot be permuted by their parts:", *refused[:_SHOWN], *more]
        raise AdapterError("\n".join(lines), hint=_TO_LORA)
    gathers = PartGathers({key: Gather(key, one) for key, one in axes.items()}, told)
    return PermutedCheckpoint(adapter, gathers), turns


class _NotPermutedError(Exception):
    """Why a module cannot be permuted by its parts."""


_Place = tuple[str, int, int, int, bool]
"""Where a tensor is part of an original one: that one's key, the first row there and here, their number, turned."""


def _places(layouts: Layouts, dialects: Collection[str]) -> dict[str, dict[str, list[_Place]]]:
    found: dict[str, dict[str, list[_Place]]] = {dialect: {} for dialect in dialects}
    for dialect in dialects:
        for original, one in layouts.originals[dialect].items():
            at = 0
            for piece in one.pieces:
                count = piece.stop - piece.start
                found[dialect].setdefault(piece.key, []).append((original, at, piece.start, count, one.transposed))
                at += count
    return found


def _moves(entry: Entry, places: list[_Place], gather_of: Callable[[str], Gather | None]) -> Moves:
    """What moves along the axes of a tensor, by what moves in the original ones that it is a part of."""
    shape = entry.shape
    rows = np.arange(shape[0] if shape else 1, dtype=np.int64)
    others: list[Positions | None] = []
    for original in dict.fromkeys(place[0] for place in places):
        own = [place for place in places if place[0] == original]
        gather = gather_of(original)
        if gather is None or (gather.source == original and not gather.moved):
            others.append(None)
            continue
        if gather.source != original or gather.items is not None or gather.within:
            raise _NotPermutedError("its experts change places")
        if max(gather.axes) > 1:
            raise _NotPermutedError(f"{original} is permuted along axis {max(gather.axes)}")
        first, second = gather.axes.get(0), gather.axes.get(1)
        if own[0][4]:
            first, second = second, first
        others.append(second)
        if first is not None:
            _place_rows(rows, first, own, turned=own[0][4])
    if any(not _alike(one, others[0]) for one in others):
        raise _NotPermutedError("the tensors that it is a part of are not permuted alike")
    found = {0: rows} if not np.array_equal(rows, np.arange(len(rows))) else {}
    return found | ({1: others[0]} if others and others[0] is not None else {})


def _place_rows(rows: Positions, moved: Positions, own: list[_Place], *, turned: bool) -> None:
    """Note what comes to the rows of a tensor, of which ``moved`` tells it for those of the original one."""
    here = np.full(len(moved), -1, np.int64)
    for _, at, start, count, _ in own:
        span = len(moved) if turned else count
        here[at : at + span] = np.arange(start, start + span)
    for _, at, start, count, _ in own:
        span = len(moved) if turned else count
        rows[start : start + span] = here[moved[at : at + span]]
    if (rows < 0).any():
        raise _NotPermutedError("rows of other modules come to its own")


def _turned(
    entry: Entry, places: list[_Place], turned: Mapping[str, Collection[int]]
) -> Iterator[tuple[str, int, tuple[str, int]]]:
    """The parts of a module that are rotated: a part, one of its axes, and which one of the original tensor that is."""
    if all(place[0] not in turned for place in places):
        return
    original, at, start, count, transposed = places[0]
    whole = len(places) == 1 and (at, start, count) == (0, 0, entry.shape[0]) and not transposed
    infos = entry.parts.infos
    if not whole or MAGNITUDE in infos:
        raise _NotPermutedError("its heads are rotated, but it has parts of rotated rows, or magnitudes of rows")
    index = {axis: np.arange(entry.shape[axis]) for axis in turned[original]}
    for part, axis, rows in _parts(entry, index):
        wanted = 0 if part.endswith(("lora_up.weight", "bias")) or axis == 0 else 1
        if isinstance(entry.kind, LoHa) or is_turned(entry.parts, entry.shape) or len(rows) != entry.shape[wanted]:
            raise _NotPermutedError(f"its heads are rotated, which {entry.kind.name} cannot follow by its parts")
        yield part, axis, (original, wanted)


def _alike(one: Positions | None, other: Positions | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _parts(entry: Entry, moves: Moves) -> Iterator[Part]:
    """By which index each axis of the parts of a module is to be gathered."""
    kind, infos = entry.kind, entry.parts.infos
    turned = isinstance(kind, LoRA) and is_turned(entry.parts, entry.shape)
    first, second = (moves.get(1), moves.get(0)) if turned else (moves.get(0), moves.get(1))
    if isinstance(kind, LoRA):
        yield from _along(entry, "lora_up.weight", 0, first)
        yield from _along(entry, "lora_down.weight", 1, second)
    elif isinstance(kind, LoHa):
        side = int("hada_t1" in infos)
        for half in ("hada_w1", "hada_w2"):
            yield from _along(entry, f"{half}_a", side, first)
            yield from _along(entry, f"{half}_b", 1, second)
    elif isinstance(kind, LoRABias):
        yield from _along(entry, next(name for name in infos if name.endswith(".bias")), 0, first)
    elif isinstance(kind, Whole):
        (part,) = kind.telling
        yield from _along(entry, part, 0, first)
        yield from _along(entry, part, 1, second)
    else:
        raise _NotPermutedError(f"{kind.name} has no part for each output and each input")
    if MAGNITUDE in infos:
        by = moves.get(way_of(entry.parts, entry.shape, transposed=turned).axis)
        shape = infos[MAGNITUDE].shape
        yield from _along(entry, MAGNITUDE, 0 if shape[0] == infos[MAGNITUDE].numel else 1, by)


def _along(entry: Entry, part: str, axis: int, index: Positions | None) -> Iterator[Part]:
    """One axis of a part, which has the kernel of a convolution in it, or stands for the first rows alone."""
    if index is None:
        return
    size = entry.parts.infos[part].shape[axis]
    if size < len(index):
        if (index[:size] >= size).any():
            raise _NotPermutedError("other rows come to the first ones, of which alone it has parts")
        index = index[:size]
    elif size > len(index):
        each = size // len(index)
        index = (index[:, None] * each + np.arange(each)).reshape(-1)
    yield part, axis, index
