"""An adapter as a checkpoint of differences, each computed where it is read: nothing is ever expanded whole."""

from __future__ import annotations

import hashlib
import heapq
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from remelt.adapters.change import Change, Kind, Parts
from remelt.adapters.kinds import kind_of
from remelt.adapters.names import AdapterModule, modules_of
from remelt.adapters.pairing import Layouts
from remelt.adapters.settings import Settings
from remelt.archs.dialects import ORIGINAL
from remelt.core.dtype import DType
from remelt.core.pieces import Converted, Piece
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.pieced import PiecedCheckpoint
from remelt.tensors import TORCH, bytes_of, tensor_over

_OPENED = 4
"""Changes whose factors are held: those of the tensors that threads are at, and some more."""
_COPIES, _COPIES_OF_BASE = 2, 6
"""How often the rows of a change are in memory while they are computed, without those of the model and with them."""
_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """One tensor of a model that an adapter changes: by which module, of what kind, and what is known of it."""

    kind: Kind
    parts: Parts
    shape: tuple[int, ...]
    dialect: str
    key: str
    target: str
    first: str
    """The adapter's own key of one of the parts."""


class ChangesCheckpoint(Checkpoint):
    """The changes that an adapter makes to a model's tensors; keys tell the dialect first. What it leaves is zero."""

    scratch = 2**24
    """Measured: buffers of the library that multiplies matrices, and what the allocator keeps of rows."""

    def __init__(
        self,
        adapter: Checkpoint,
        entries: Mapping[str, Entry],
        tensors: Mapping[str, TensorInfo],
        base_of: Callable[[str], Checkpoint],
        dtype: torch.dtype,
    ) -> None:
        self.path, self.format, self.metadata = adapter.path, adapter.format, adapter.metadata
        self.adapter, self.entries, self.tensors = adapter, entries, dict(tensors)
        self._base_of, self._dtype = base_of, dtype
        self._opened: OrderedDict[str, Change] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of some elements of a change: the rows that hold them are computed."""
        info = self.tensors[key]
        stop = info.nbytes if stop is None else min(stop, info.nbytes)
        if start >= stop:
            return memoryview(b"")
        entry = self.entries.get(key)
        if entry is None:
            return memoryview(bytes(stop - start))
        width = info.nbytes // max(info.shape[0] if info.shape else 1, 1)
        first, last = start // width, -(-stop // width)
        rows = self.change(key).rows(first, last, lambda begin, end: self.base_rows(entry, begin, end))
        data = bytes_of(rows.to(self._dtype))
        return data[start - first * width : stop - first * width]

    def change(self, key: str) -> Change:
        """The change of a tensor, with its factors."""
        with self._lock:
            found = self._opened.get(key)
            if found is not None:
                self._opened.move_to_end(key)
                return found
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            with self._lock:
                found = self._opened.get(key)
            if found is None:
                entry = self.entries[key]
                found = entry.kind.open(entry.parts, entry.shape, self._dtype)
                with self._lock:
                    self._opened[key] = found
                    while len(self._opened) > _OPENED:
                        self._opened.popitem(last=False)
                    self._opening.pop(key, None)
        return found

    def base_rows(self, entry: Entry, begin: int, end: int) -> Tensor:
        """Rows of the model's own tensor."""
        base = self._base_of(entry.dialect)
        info = base.tensors[entry.key]
        width = info.nbytes // max(info.shape[0] if info.shape else 1, 1)
        stored = tensor_of(base.read(entry.key, begin * width, end * width), info.dtype)
        return stored.to(self._dtype).reshape(end - begin, -1)

    def position(self, key: str) -> tuple[int, int]:
        """Where the first part of the change lies."""
        entry = self.entries.get(key)
        return (0, 0) if entry is None else self.adapter.position(entry.first)

    def beside(self, key: str, elements: int) -> int:
        """The rows that hold those elements, in as many copies as are made of them."""
        info, entry = self.tensors[key], self.entries.get(key)
        width = info.numel // max(info.shape[0] if info.shape else 1, 1)
        rows = min(elements + 2 * width, info.numel) * info.dtype.itemsize
        if entry is None:
            return rows
        return rows * (_COPIES_OF_BASE if entry.kind.asks_base(entry.parts) else _COPIES)

    @property
    def held(self) -> int:
        """The factors of the changes that are open, and of one that is being opened, in two types more."""
        sizes = (
            sum(info.numel for info in entry.parts.infos.values()) * self._dtype.itemsize
            for entry in self.entries.values()
        )
        largest = heapq.nlargest(_OPENED, sizes)
        return sum(largest) + 2 * sum(largest[:1])

    @property
    def stored(self) -> DType:
        """The type of the adapter's factors; alpha may have one of its own."""
        return max(self.adapter.tensors.values(), key=lambda info: info.numel).dtype

    @property
    def needs_base(self) -> bool:
        """Whether any change depends on the model that is changed."""
        return any(entry.kind.asks_base(entry.parts) for entry in self.entries.values())

    def files(self) -> tuple[Path, ...]:
        """The adapter's files, and the model's where the changes depend on it."""
        base = self._base_of(ORIGINAL).files() if self.needs_base else ()
        return (*self.adapter.files(), *base)

    def view_of(self) -> str:
        """What each change is of, as a digest."""
        told = [(key, one.shape, one.target, one.parts.module, one.parts.scale) for key, one in self.entries.items()]
        return hashlib.sha256(repr((told, str(self._dtype))).encode("utf-8", "surrogatepass")).hexdigest()

    def close(self) -> None:
        """Nothing: the adapter is closed by whoever opened it."""


def changes_of(
    adapter: Checkpoint,
    layouts: Layouts,
    base_of: Callable[[str], Checkpoint],
    *,
    dtype: torch.dtype = torch.float32,
    ignore_unused: bool = False,
) -> PiecedCheckpoint:
    """The differences that an adapter makes of a model, by the model's original keys; what it leaves is not there.

    ``base_of`` gives the model in a dialect, for what depends on its own tensors. Raises `AdapterError` where modules
    of the adapter are none of the model's, or do not fit them; with ``ignore_unused``, the former are left out.
    """
    modules = modules_of(adapter.tensors, ignore_unknown=ignore_unused)
    settings = Settings.of(adapter.path, adapter.metadata)
    entries: dict[str, Entry] = {}
    unused: list[AdapterModule] = []
    for module in modules.values():
        made = _entries(adapter, module, settings, layouts)
        if made is None:
            unused.append(module)
            continue
        for name, entry in made:
            if name in entries:
                raise AdapterError(
                    f"{entries[name].parts.module} and {module.name} both change {entry.key}",
                    hint="the file holds several adapters: save one of them",
                )
            entries[name] = entry
    if unused and not ignore_unused:
        raise AdapterError(_leftovers(unused, len(modules), layouts), hint="--ignore-unused leaves them out")
    if not entries:
        raise AdapterError("none of its modules is one of the model's", hint="it is of another model")
    stored = DType.F64 if dtype is torch.float64 else DType.F32
    pieces = _originals(entries, layouts, stored)
    tensors = {
        piece.key: TensorInfo(stored, _infos(layouts, piece.key).shape)
        for one in pieces.values()
        for piece in one.pieces
    }
    changes = ChangesCheckpoint(adapter, entries, tensors, base_of, dtype)
    if changes.needs_base:
        base_of(ORIGINAL)  # says so now if there is no model
    return PiecedCheckpoint(changes, pieces)


def _entries(
    adapter: Checkpoint, module: AdapterModule, settings: Settings, layouts: Layouts
) -> list[tuple[str, Entry]] | None:
    """What a module changes, by dialect and key; None where the model has no such module."""
    named = layouts.find(module)
    if named is None:
        return None
    infos = {part: adapter.tensors[key] for part, key in module.parts.items()}

    def read(part: str) -> Tensor:
        key = module.parts[part]
        return tensor_of(adapter.read(key), adapter.tensors[key].dtype).reshape(adapter.tensors[key].shape)

    alpha = float(read("alpha").double().reshape(-1)[0]) if "alpha" in infos and infos["alpha"].nbytes else None
    options = settings.options(module.name) | module.options
    if layouts.is_own:  # then modules are as the adapter has them
        options.pop("fan_in_fan_out", None)
    found = []
    for kind, target, used in kind_of(infos, module.name):
        key = layouts.key_of(named, target)
        if key is None and kind.optional:
            continue
        if key is None:
            raise AdapterError(f"{module.name} changes a {target}, but {named.key} of the model has none")
        parts = Parts(
            module.name, {part: infos[part] for part in used}, read, settings.scale(module.name, infos, alpha), options
        )
        shape = layouts.tensors[named.dialect][key].shape
        kind.check(parts, shape)
        first = module.parts[next(iter(used))]
        found.append((_name(named.dialect, key), Entry(kind, parts, shape, named.dialect, key, target, first)))
    return found


def _originals(entries: Mapping[str, Entry], layouts: Layouts, stored: DType) -> dict[str, Converted]:
    """The original tensors that are changed, as rows of what the entries are of."""
    found: dict[str, Converted] = {}
    by: dict[str, str] = {}
    for dialect in dict.fromkeys(entry.dialect for entry in entries.values()):
        changed = {entry.key for entry in entries.values() if entry.dialect == dialect}
        for key, one in layouts.originals[dialect].items():
            if changed.isdisjoint(piece.key for piece in one.pieces):
                continue
            if key in found:
                raise AdapterError(
                    f"{key} is changed by names of the layouts {by[key]} and {dialect} at once",
                    hint="an adapter names a model's modules in one way",
                )
            pieces = tuple(Piece(_name(dialect, piece.key), piece.start, piece.stop) for piece in one.pieces)
            found[key], by[key] = Converted(TensorInfo(stored, one.info.shape), pieces, one.transposed), dialect
    return {key: found[key] for key in layouts.originals[ORIGINAL] if key in found}


def _leftovers(unused: Iterable[AdapterModule], count: int, layouts: Layouts) -> str:
    """Which modules the model lacks, with the nearest that it has."""
    left = list(unused)
    shown = []
    for module in left[:_SHOWN]:
        near = layouts.nearest(module)
        shown.append(f"  {module.name}" + (f" (the model has {near})" if near else ""))
    more = [f"  and {len(left) - _SHOWN} more"] if len(left) > _SHOWN else []
    return "\n".join([f"{len(left)} of its {count} modules are none of the model's, and would be lost:", *shown, *more])


def _name(dialect: str, key: str) -> str:
    return f"{dialect}:{key}"


def _infos(layouts: Layouts, name: str) -> TensorInfo:
    dialect, _, key = name.partition(":")
    return layouts.tensors[dialect][key]


def tensor_of(data: memoryview, dtype: DType) -> Tensor:
    """Stored numbers as a tensor of one dimension, copied; `AdapterError` for types that nothing in adapters has."""
    if dtype not in TORCH:
        raise AdapterError(f"the parts of adapters are numbers, but some are {dtype}")
    return tensor_over(data, dtype).clone()
