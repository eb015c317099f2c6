"""Several adapters as one: for each module the sum of their products as one product, without ever making it whole."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from remelt.adapters.checkpoint import ChangesCheckpoint, Entry, bytes_of
from remelt.adapters.extraction import lora_shapes
from remelt.adapters.factors import Factors, joined, truncated
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError
from remelt.formats.checkpoint import Checkpoint

_HELD = 4
"""Modules whose factors are held: each is asked for by part."""


@dataclass(frozen=True)
class Term:
    """An adapter with what it is multiplied by."""

    changes: ChangesCheckpoint
    strength: float


class JoinedAdapter(Checkpoint):
    """The weighted sum of adapters that are products of factors, as an adapter; modules keep the first one's names.

    Without ``rank`` and ``energy`` it is exact: ranks add up. Else each module keeps the nearest product of that rank,
    or of the least that keeps that share of its energy. ``shares`` has what each keeps.
    """

    path: Path | None = None
    format = "adapters"

    def __init__(
        self,
        terms: Sequence[Term],
        rank: int | None,
        energy: float | None,
        parts: Mapping[str, str],
        dtype: DType,
        metadata: Mapping[str, str],
    ) -> None:
        self._terms, self._rank, self._energy, self._parts = terms, rank, energy, dict(parts)
        self.metadata = self.inherited = metadata
        self._lock = threading.Lock()
        self._held: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self.shares: dict[str, float] = {}
        self.ranks: dict[str, int] = {}
        self.energies: dict[str, float] = {}
        self.keys: dict[str, str] = {}
        """The name of each module, by what it is in the model."""
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[str, str]] = {}
        entries = {key: entry for one in reversed(terms) for key, entry in one.changes.entries.items()}
        for key in dict.fromkeys(key for one in terms for key in one.changes.entries):
            self._add(key, entries[key], dtype)
        self._order = {name: place for place, name in enumerate(self._places)}

    def _add(self, key: str, entry: Entry, dtype: DType) -> None:
        name = entry.parts.module
        factors = self._factors(key)
        self.shares[name], self.ranks[name], self.keys[name] = factors.share, factors.rank, entry.key
        self.energies[name] = factors.energy
        for part, shape in lora_shapes(entry.shape, factors.rank).items():
            if part in self._parts:
                self.tensors[f"{name}.{self._parts[part]}"] = TensorInfo(dtype, shape)
                self._places[f"{name}.{self._parts[part]}"] = key, part

    def _factors(self, key: str) -> Factors:
        """The factors of one module, in float64."""
        found = []
        for term in self._terms:
            if key in term.changes.entries:
                factors = term.changes.change(key).factors()
                if factors is None:
                    entry = term.changes.entries[key]
                    raise AdapterError(
                        f"{entry.parts.module}: {entry.kind.name} is no product of two factors",
                        hint="--rank makes it one of that rank, from the difference as a whole",
                    )
                up, down = factors
                found.append((up.double() * term.strength, down.double()))
        return (
            joined(found) if self._rank is None and self._energy is None else truncated(found, self._rank, self._energy)
        )

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of a part; all parts of its module are made together."""
        place, part = self._places[key]
        data = bytes_of(self._made(place)[part].to(_STORED[self.tensors[key].dtype]))
        return data[start : len(data) if stop is None else stop]

    def _made(self, key: str) -> dict[str, Tensor]:
        with self._lock:
            if key not in self._held:
                factors = self._factors(key)
                self._held[key] = {
                    "up": factors.up,
                    "down": factors.down,
                    "alpha": torch.tensor(float(factors.rank), dtype=torch.float64),
                }
                while len(self._held) > _HELD:
                    self._held.popitem(last=False)
            return self._held[key]

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


_STORED = {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16, DType.F64: torch.float64}
