"""Several adapters as one: for each module the sum of their products as one product, without ever making it whole."""

from __future__ import annotations

import heapq
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from remelt.adapters.checkpoint import ChangesCheckpoint, Entry
from remelt.adapters.extraction import ALPHA, lora_shapes
from remelt.adapters.factors import Factors, joined, truncated
from remelt.adapters.kinds.common import option
from remelt.adapters.kinds.lora import is_turned
from remelt.adapters.written import Written
from remelt.core.dtype import DType
from remelt.core.pieces import Converted
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError
from remelt.formats.checkpoint import Checkpoint
from remelt.tensors import TORCH, bytes_of

_HELD = 4
"""Modules whose factors are held: each is asked for by part."""
_WRITTEN = (DType.F32, DType.F16, DType.BF16, DType.F64)


@dataclass(frozen=True)
class Term:
    """An adapter with what it is multiplied by.

    ``made`` has the model's tensors as rows of those that are changed: it tells what is the same in several layouts.
    """

    changes: ChangesCheckpoint
    strength: float
    made: Mapping[str, Converted] = field(default_factory=dict)
    label: str = "the adapter"


@dataclass(frozen=True)
class Share:
    """What one adapter adds to a module: a change of its own, whole, or some of its rows.

    ``rows`` are of the change and of the module, each a begin, with how many.
    """

    term: Term
    key: str
    rows: tuple[tuple[int, int, int], ...] | None = None

    @property
    def entry(self) -> Entry:
        """What the adapter changes."""
        return self.term.changes.entries[self.key]

    def factors(self, height: int) -> tuple[Tensor, Tensor]:
        """The factors of a module so many rows high, in float64; `AdapterError` where there are none."""
        found = self.term.changes.change(self.key).factors()
        if found is None:
            parts = ", ".join(sorted(self.entry.parts.infos))
            raise AdapterError(
                f"{self.term.label}: {self.entry.parts.module}: {self.entry.kind.name} of {parts} is no product of two "
                "factors",
                hint="to_lora(..., rank=32) of it is computed from the difference as a whole",
            )
        up, down = found[0].double() * self.term.strength, found[1].double()
        if self.rows is None:
            return up, down
        placed = up.new_zeros(height, up.shape[1])
        for begin, place, count in self.rows:
            placed[place : place + count] = up[begin : begin + count]
        return placed, down


class JoinedAdapter(Checkpoint):
    """The weighted sum of adapters that are products of factors, as an adapter; modules keep the first one's names.

    ``written`` has the names of their parts; without ``has_alpha`` the product of the factors is taken as it is.

    Without ``rank`` and ``energy`` it is exact: ranks add up. Else each module keeps the nearest product of that rank,
    or of the least that keeps that share of its energy. ``shares`` has what each keeps. What comes to nothing is left
    out. Raises `AdapterError` where that is all, where a change is no product, or where names cannot be brought
    together.
    """

    path: Path | None = None
    format = "adapters"

    def __init__(
        self,
        terms: Sequence[Term],
        rank: int | None,
        energy: float | None,
        written: Written,
        dtype: DType,
        *,
        has_alpha: bool = True,
    ) -> None:
        if dtype not in _WRITTEN:
            known = ", ".join(map(str, _WRITTEN))
            raise AdapterError(f"factors are written as {known}, but got {dtype}", hint="dtype='fp16'")
        self._terms = [term for term in terms if term.strength != 0.0]
        self._rank, self._energy, self._written = rank, energy, written
        self._has_alpha = has_alpha and "alpha" in written.parts()
        self.metadata: dict[str, str] = {}
        self._lock = threading.Lock()
        self._held: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._shares = shares_of(self._terms)
        self.shares: dict[str, float] = {}
        self.ranks: dict[str, int] = {}
        self.energies: dict[str, float] = {}
        self.keys: dict[str, str] = {}
        """By the name of each module, its key in the model."""
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[str, str]] = {}
        self._entries = {
            key: entry for term in reversed(self._terms) for key, entry in term.changes.entries.items()
        }  # the first one's
        for key in self._shares:
            self._add(key, self._entries[key], dtype)
        if not self.tensors:
            raise AdapterError("the sum of the adapters changes nothing", hint="are their strengths as they should be?")
        self._order = {name: place for place, name in enumerate(self._places)}

    def _add(self, key: str, entry: Entry, dtype: DType) -> None:
        name = entry.parts.module
        factors = self._factors(key)
        if factors.energy == 0.0:
            return
        self.shares[name], self.ranks[name], self.keys[name] = factors.share, factors.rank, entry.key
        self.energies[name] = factors.energy
        parts = self._written.parts(of_embedding=bool(option(entry.parts, "transposed")))
        shape = entry.shape[::-1] if is_turned(entry.parts, entry.shape) else entry.shape
        for part, size in lora_shapes(shape, factors.rank).items():
            if part in parts and (part != "alpha" or self._has_alpha):
                self.tensors[f"{name}.{parts[part]}"] = TensorInfo(dtype, size)
                self._places[f"{name}.{parts[part]}"] = key, part

    def _factors(self, key: str) -> Factors:
        """The factors of one module, in float64."""
        height = self._entries[key].shape[0]
        found = [share.factors(height) for share in self._shares[key]]
        exact = self._rank is None and self._energy is None
        return joined(found) if exact else truncated(found, self._rank, self._energy)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of a part; all parts of its module are made together."""
        place, part = self._places[key]
        data = bytes_of(self._made(place)[part].to(TORCH[self.tensors[key].dtype]))
        return data[start : len(data) if stop is None else stop]

    def _made(self, key: str) -> dict[str, Tensor]:
        with self._lock:
            if key not in self._held:
                factors = self._factors(key)
                weight = math.sqrt(factors.rank / ALPHA) if self._has_alpha else 1.0
                turned = is_turned(self._entries[key].parts, self._entries[key].shape)
                up, down = (factors.down.T, factors.up.T) if turned else (factors.up, factors.down)
                self._held[key] = {
                    "up": up * weight,
                    "down": down * weight,
                    "alpha": torch.tensor(float(ALPHA), dtype=torch.float64),
                }
                while len(self._held) > _HELD:
                    self._held.popitem(last=False)
            return self._held[key]

    def beside(self, key: str, elements: int) -> int:
        """A part as it is stored; those of its module are held."""
        return self.tensors[key].nbytes

    @property
    def held(self) -> int:
        """The parts of modules in float64, and what they are made of."""
        sizes: dict[str, int] = {}
        for name, (key, _) in self._places.items():
            sizes[key] = sizes.get(key, 0) + self.tensors[name].numel * DType.F64.itemsize
        return sum(heapq.nlargest(_HELD, sizes.values())) + sum(term.changes.held for term in self._terms)

    def position(self, key: str) -> tuple[int, int]:
        """The order of the parts."""
        return 0, self._order[key]

    def files(self) -> tuple[Path, ...]:
        """The adapters' files."""
        return tuple(dict.fromkeys(path for term in self._terms for path in term.changes.adapter.files()))

    def view_of(self) -> str:
        """What the sum is of."""
        return repr(([(one.strength, one.changes.view_of()) for one in self._terms], self._rank, self._energy))

    def close(self) -> None:
        """Nothing: the adapters are closed by whoever opened them."""


def shares_of(terms: Sequence[Term]) -> dict[str, list[Share]]:
    """By the module, what each adapter adds to it; layouts are brought together where adapters name it in several."""
    found: dict[str, list[Share]] = {}
    apart = _named_apart(terms)
    for term in terms:
        others = {piece.key for original in apart if original in term.made for piece in term.made[original].pieces}
        for key in term.changes.entries:
            if key not in others:
                found.setdefault(key, []).append(Share(term, key))
    for original in apart:
        for key, share in _together(original, [term for term in terms if original in term.made]):
            found.setdefault(key, []).append(share)
    return found


def _named_apart(terms: Sequence[Term]) -> list[str]:
    """The model's tensors that adapters name in several layouts."""
    named: dict[str, set[str]] = {}
    for term in terms:
        for original, one in term.made.items():
            named.setdefault(original, set()).update(piece.key.partition(":")[0] for piece in one.pieces)
    return [original for original, layouts in named.items() if len(layouts) > 1]


def _together(original: str, terms: Sequence[Term]) -> Iterator[tuple[str, Share]]:
    """What adapters add to one of the model's tensors, by modules of the first that names all of it."""
    whole = (term for term in terms if all(piece.key in term.changes.entries for piece in term.made[original].pieces))
    first = next(whole, None)
    if first is None or len({term.made[original].transposed for term in terms}) > 1:
        why = "none names all of it" if first is None else "some have it on its side"
        raise AdapterError(
            f"{original} is changed by adapters that name it in several layouts, and {why}",
            hint="to_lora(..., rank=32) of the sum is computed from the differences as a whole",
        )
    aim = first.made[original]
    for term in terms:
        rows: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        for key, place, begin, end in _rows_of(aim):
            for own, at, start, stop in _rows_of(term.made[original]):
                low, high = max(begin, start), min(end, stop)
                if low < high and own in term.changes.entries:
                    rows.setdefault((key, own), []).append((at + low - start, place + low - begin, high - low))
        for (key, own), some in rows.items():
            yield key, Share(term, own, tuple(some))


def _rows_of(one: Converted) -> Iterator[tuple[str, int, int, int]]:
    """The pieces of a tensor: the key and the first row of each there, and from where to where it is here."""
    at = 0
    for piece in one.pieces:
        yield piece.key, piece.start, at, at + piece.stop - piece.start
        at += piece.stop - piece.start
