"""Checkpoints with permuted axes: any bytes of a tensor are those of the whole permuted one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.memory import MemoryCheckpoint
from remelt.formats.overlaid import OverlaidCheckpoint
from remelt.formats.permuted import Gather, PermutedCheckpoint, Positions

SIZES = {DType.F64: 8, DType.F32: 4, DType.F16: 2, DType.F8_E4M3: 1}


class Known:
    """Gathers that are told by a mapping."""

    def __init__(self, gathers: dict[str, Gather], *, is_known: bool = True) -> None:
        self.keys, self.gathers, self.is_known = gathers.keys(), gathers, is_known

    def of(self, key: str) -> Gather:
        return self.gathers[key]

    def source(self, key: str) -> str:
        return self.gathers[key].source

    def told(self) -> str:
        return "known"

    def files(self) -> tuple[Path, ...]:
        return ()


class Copied(MemoryCheckpoint):
    """Tensors that no reading looks at where they lie."""

    def is_view(self, key: str) -> bool:
        return False

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        return memoryview(bytes(super().read(key, start, stop)))


def expected(stored: np.ndarray, gather: Gather) -> np.ndarray:
    """The whole tensor, by its definition: items, then what is within them, then axes."""
    found = stored if gather.items is None else stored[gather.items]
    for axis, rows in gather.within.items():
        found = np.stack([item.take(row, axis=axis) for item, row in zip(found, rows, strict=True)])
    for axis, index in gather.axes.items():
        found = found.take(index, axis=axis)
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[DType, np.ndarray, Gather]:
    dtype = draw(st.sampled_from(list(SIZES)))
    ending = draw(st.sampled_from([(), (1,), (3, 3), (70, 9)]))
    shape = (*draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)), *ending)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    raw = random.integers(0, 256, (math.prod(shape) * SIZES[dtype],), np.uint8)
    stored = raw.view(f"V{SIZES[dtype]}").reshape(shape)
    chosen = draw(st.sets(st.integers(0, min(len(shape), 3) - 1)))
    axes: dict[int, Positions] = {axis: random.permutation(shape[axis]) for axis in sorted(chosen)}
    if len(shape) == 1 or not draw(st.booleans()):
        return dtype, stored, Gather("w", axes)
    inside = draw(st.sets(st.integers(0, min(len(shape), 3) - 2)))
    within = {axis: np.stack([random.permutation(shape[axis + 1]) for _ in range(shape[0])]) for axis in sorted(inside)}
    return dtype, stored, Gather("w", axes, random.permutation(shape[0]) if draw(st.booleans()) else None, within)


@given(cases(), st.booleans(), st.data())
def test_any_bytes_are_those_of_the_permuted_tensor(
    case: tuple[DType, np.ndarray, Gather], copied: bool, data: st.DataObject
) -> None:
    dtype, stored, gather = case
    kind = Copied if copied else MemoryCheckpoint
    inner = kind({"w": (TensorInfo(dtype, stored.shape), stored.tobytes())})
    view = PermutedCheckpoint(inner, Known({"w": gather}))
    whole = expected(stored, gather).tobytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert bytes(view.read("w", start, stop)) == whole[start:stop]
    assert bytes(view.read("w", start)) == whole[start:]


def model(*keys: str) -> Checkpoint:
    random = np.random.default_rng(0)
    return MemoryCheckpoint({key: (TensorInfo(DType.F16, (6, 4)), random.bytes(48)) for key in keys})


def test_what_stays_is_looked_at_where_it_lies() -> None:
    inner = model("moved", "still", "other")
    gathers = {"moved": Gather("moved", {0: np.array([5, 4, 3, 2, 1, 0])}), "still": Gather("still")}
    view = PermutedCheckpoint(inner, Known(gathers))
    assert [view.is_view(key) for key in ("moved", "still", "other")] == [False, True, True]
    assert view.read("still").obj is inner.read("still").obj
    unknown = PermutedCheckpoint(inner, Known(gathers, is_known=False))
    assert [unknown.is_view(key) for key in ("moved", "still", "other")] == [False, False, True]


def test_rows_that_follow_one_another_are_not_copied() -> None:
    inner = model("w")
    view = PermutedCheckpoint(inner, Known({"w": Gather("w", {0: np.array([3, 4, 5, 0, 1, 2])})}))
    wide = MemoryCheckpoint({"w": (TensorInfo(DType.F16, (2, 400)), bytes(1600))})
    turned = PermutedCheckpoint(wide, Known({"w": Gather("w", {0: np.array([1, 0])})}))
    assert bytes(view.read("w", 0, 8)) == bytes(inner.read("w", 24, 32))
    assert turned.read("w", 0, 800).obj is wide.read("w").obj


def test_tensors_that_change_places_are_found_under_their_new_keys() -> None:
    inner = model("experts.0", "experts.1")
    gathers = {"experts.0": Gather("experts.1"), "experts.1": Gather("experts.0"), "experts.2": Gather("experts.3")}
    view = PermutedCheckpoint(inner, Known(gathers))
    assert list(view.tensors) == ["experts.0", "experts.1"]
    assert bytes(view.read("experts.0")) == bytes(inner.read("experts.1"))
    assert view.is_view("experts.1")


def test_memory_beside_a_slice_is_bounded_by_it() -> None:
    rows, columns = 2048, 1024
    info = TensorInfo(DType.F16, (rows, columns))
    inner = MemoryCheckpoint({"w": (info, bytes(info.nbytes))})
    index = np.random.default_rng(0).permutation(rows)
    view = PermutedCheckpoint(inner, Known({"w": Gather("w", {0: index, 1: np.arange(columns)[::-1]})}))
    assert view.beside("w", 1000) < info.nbytes
    assert view.held < 2**16


def test_an_overlay_has_the_tensors_of_both() -> None:
    below, above = model("a", "b"), model("b", "c")
    view = OverlaidCheckpoint(below, above)
    assert list(view.tensors) == ["a", "b", "c"]
    assert bytes(view.read("b")) == bytes(above.read("b"))
    assert bytes(view.read("a")) == bytes(below.read("a"))
    assert view.is_view("a") is True
    assert view.files() == ()
