"""Views whose tensors consist of rows of another checkpoint's: they read what slicing by numpy gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import remelt as rm
from remelt.archs.shapes import flux_shapes, sd3_shapes, sdxl_shapes
from remelt.core.dtype import DType
from remelt.core.pieces import Converted, Piece
from remelt.core.tensor_info import TensorInfo
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.memory import MemoryCheckpoint
from remelt.formats.pieced import PiecedCheckpoint

TYPES = st.sampled_from([DType.F64, DType.F32, DType.BF16, DType.F8_E4M3, DType.I64, DType.I16, DType.BOOL])


def bytes_of(info: TensorInfo, seed: int) -> np.ndarray:
    """The bytes of a tensor, one row of them for each of its rows."""
    drawn = np.random.default_rng(seed).integers(0, 256, info.nbytes, np.uint8)
    rows = info.shape[0] if info.shape else 1
    return drawn.reshape(rows, info.nbytes // rows) if rows else drawn.reshape(0, 0)


@st.composite
def views(draw: st.DrawFn) -> tuple[dict[str, TensorInfo], dict[str, np.ndarray], Converted]:
    """Some tensors of one type and width, and one made of rows of them."""
    dtype, rest = draw(TYPES), draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    infos = {f"t{at}": TensorInfo(dtype, (size, *rest)) for at, size in enumerate(sizes)}
    content = {key: bytes_of(info, at) for at, (key, info) in enumerate(infos.items())}
    pieces = []
    for _ in range(draw(st.integers(1, 4))):
        key = draw(st.sampled_from(list(infos)))
        start = draw(st.integers(0, infos[key].shape[0]))
        pieces.append(Piece(key, start, draw(st.integers(start, infos[key].shape[0]))))
    rows = sum(piece.stop - piece.start for piece in pieces)
    return infos, content, Converted(TensorInfo(dtype, (rows, *rest)), tuple(pieces))


def view_of(infos: dict[str, TensorInfo], content: dict[str, np.ndarray], **made: Converted) -> PiecedCheckpoint:
    stored = {key: (info, np.ascontiguousarray(content[key])) for key, info in infos.items()}
    return PiecedCheckpoint(MemoryCheckpoint(stored), made)


@given(views(), st.data())
def test_any_part_of_a_joined_tensor_is_what_slicing_gives(
    made: tuple[dict[str, TensorInfo], dict[str, np.ndarray], Converted], data: st.DataObject
) -> None:
    infos, content, one = made
    view = view_of(infos, content, x=one)
    expected = b"".join(content[piece.key][piece.start : piece.stop].tobytes() for piece in one.pieces)
    start = data.draw(st.integers(0, one.info.nbytes))
    stop = data.draw(st.one_of(st.none(), st.integers(0, one.info.nbytes + 3)))
    assert view.tensors == {"x": one.info}
    assert bytes(view.read("x")) == expected
    assert bytes(view.read("x", start, stop)) == expected[start:stop]
    assert view.is_view("x") == (len(one.pieces) == 1)


@given(views(), st.data())
def test_a_view_of_a_view_reads_the_same_bytes(
    made: tuple[dict[str, TensorInfo], dict[str, np.ndarray], Converted], data: st.DataObject
) -> None:
    infos, content, one = made
    inner = view_of(infos, content, x=one)
    rows = one.info.shape[0]
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    info = TensorInfo(one.info.dtype, (stop - start + rows, *one.info.shape[1:]))
    outer = PiecedCheckpoint(inner, {"y": Converted(info, (Piece("x", start, stop), Piece("x", 0, rows)))})
    width = one.info.nbytes // rows if rows else 0
    whole = bytes(inner.read("x"))
    expected = whole[start * width : stop * width] + whole
    begin = data.draw(st.integers(0, len(expected)))
    assert bytes(outer.read("y", begin)) == expected[begin:]


@given(TYPES, st.integers(0, 6), st.integers(0, 6), st.data())
def test_a_transposed_tensor_is_read_in_any_part(dtype: DType, rows: int, columns: int, data: st.DataObject) -> None:
    info = TensorInfo(dtype, (rows, columns))
    stored = np.random.default_rng(0).integers(0, 256, (rows, columns, dtype.itemsize), np.uint8)
    one = Converted(TensorInfo(dtype, (columns, rows)), (Piece("w", 0, rows),), transposed=True)
    view = PiecedCheckpoint(MemoryCheckpoint({"w": (info, stored)}), {"x": one})
    expected = np.ascontiguousarray(stored.transpose(1, 0, 2)).tobytes()
    start = data.draw(st.integers(0, info.nbytes))
    stop = data.draw(st.integers(0, info.nbytes))
    assert bytes(view.read("x")) == expected
    assert bytes(view.read("x", start, stop)) == expected[start:stop]
    assert not view.is_view("x")
    assert view.part("x", start, stop) is None


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0)])
def test_scalars_and_empty_tensors_are_read_as_they_are(shape: tuple[int, ...]) -> None:
    info = TensorInfo(DType.F32, shape)
    content = np.full(shape, 2.5, np.float32)
    whole = Converted(info, (Piece("w", 0, shape[0] if shape else 1),))
    view = PiecedCheckpoint(MemoryCheckpoint({"w": (info, content)}), {"x": whole})
    assert bytes(view.read("x")) == content.tobytes()
    assert bytes(view.read("x", 2)) == content.tobytes()[2:]


@pytest.fixture
def stored(tmp_path: Path, write_model: Callable[..., Path]) -> Checkpoint:
    tensors = {"a": torch.arange(12.0).reshape(6, 2), "b": torch.arange(12.0, 20.0).reshape(4, 2)}
    return open_checkpoint(write_model(tmp_path / "m", tensors))


def test_where_a_part_lies_agrees_with_what_is_read(stored: Checkpoint) -> None:
    info = TensorInfo(DType.F32, (4, 2))
    made = {
        "rows": Converted(info, (Piece("a", 2, 6),)),
        "halves": Converted(info, (Piece("b", 2, 4), Piece("b", 0, 2))),
        "flipped": Converted(TensorInfo(DType.F32, (2, 4)), (Piece("b", 0, 4),), transposed=True),
    }
    view = PiecedCheckpoint(stored, made)
    assert [view.is_view(key) for key in made] == [stored.is_view("a"), False, False]
    path = view.files()[view.position("rows")[0]]
    data = path.read_bytes()
    for key in ("rows", "halves"):
        for start, stop in ((0, 32), (4, 12), (0, 16), (16, 32), (12, 20), (20, 99), (8, 8)):
            part = view.part(key, start, stop)
            read = bytes(view.read(key, start, stop))
            if key == "rows" and start < stop:
                assert part is not None
            if part is not None:
                _, offset, length = part
                assert data[offset : offset + length] == read
    assert view.part("halves", 12, 20) is None  # it lies in two places
    assert view.part("halves", 16, 32) is not None
    assert view.part("flipped", 0, 8) is None
    offset = view.position("rows")[1]
    assert data[offset : offset + 32] == bytes(view.read("rows"))
    assert view.position("halves")[1] == stored.position("b")[1] + 16
    assert view.position("flipped") == stored.position("b")
    stored.close()


def test_closing_a_view_leaves_the_checkpoint_open(stored: Checkpoint) -> None:
    with PiecedCheckpoint(stored, {"x": Converted(TensorInfo(DType.F32, (1, 2)), (Piece("a", 1, 2),))}) as view:
        pass
    assert np.frombuffer(view.read("x"), np.float32).tolist() == [2.0, 3.0]
    stored.close()


def test_views_that_read_otherwise_have_other_digests(stored: Checkpoint) -> None:
    info = TensorInfo(DType.F32, (4, 2))
    ways = [
        (Piece("b", 0, 4),),
        (Piece("b", 2, 4), Piece("b", 0, 2)),
        (Piece("a", 0, 4),),
        (Piece("a", 2, 6),),
    ]
    told = {PiecedCheckpoint(stored, {"x": Converted(info, pieces)}).view_of() for pieces in ways}
    assert len(told) == len(ways)
    assert PiecedCheckpoint(stored, {"x": Converted(info, ways[0])}).view_of() in told
    stored.close()


BLOCKS = "transformer_blocks|double_blocks|single_blocks|resblocks|layers"
LATER = re.compile(rf"(?<![a-z_])({BLOCKS})\.([2-9]|\d\d)\.|first_stage_model|put_blocks\.[1-37]")
LEFT_OUT = ("text_encoders.", "model.model_sampling.", "conditioner.embedders.1.model.logit_scale", "vae.")
MODELS = {
    name: {key: info for key, info in shapes.items() if not (LATER.search(key) or key.startswith(LEFT_OUT))}
    for name, shapes in (
        ("sdxl", sdxl_shapes(64)),
        ("sd3", sd3_shapes(64, depth=2, qk_norm=True)),
        ("flux", flux_shapes(64)),
    )
}
RECIPES: dict[str, Callable[[Path, Path], Any]] = {
    "by elements": lambda a, b: rm.weighted_sum(a, b, alpha=0.3),
    "by tensors": lambda a, b: rm.slerp(a, b, alpha=0.3),
    "of differences": lambda a, b: rm.add_difference(a, rm.model(b) - rm.model(a), alpha=0.7),
}


@pytest.fixture(scope="module", params=list(MODELS))
def files(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> tuple[Path, Path, Path, Path]:
    """Two models as files, and the same as folders."""
    folder = tmp_path_factory.mktemp(request.param)
    made = []
    for seed in (0, 1):
        drawn = torch.Generator().manual_seed(seed)
        tensors = {
            key: torch.randn(info.shape, generator=drawn).bfloat16() for key, info in MODELS[request.param].items()
        }
        made.append(write_model(folder / f"{seed}", tensors))
    there = [rm.convert(path, f"{folder}/{path.stem}-there/", to="diffusers") for path in made]
    for path in there:
        (path / "model_index.json").write_text("{}")
    return (*made, *there)


@pytest.mark.parametrize("reading", ["map", "read"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_merge_over_views_gives_the_bits_of_one_over_converted_models(
    files: tuple[Path, Path, Path, Path], name: str, reading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMELT_READ", reading)
    a, b, a_there, b_there = files
    recipe = RECIPES[name]
    plain, there = rm.merge(recipe(a, b)), rm.merge(recipe(a_there, b_there))
    for first, second in ((a, b_there), (a_there, b), (a_there, b_there)):
        mixed = rm.merge(recipe(first, second), dialect="original")
        assert mixed.keys() == plain.keys()
        assert [key for key in plain if not torch.equal(mixed[key], plain[key])] == []
    for first, second in ((a, b_there), (a_there, b), (a, b)):
        mixed = rm.merge(recipe(first, second), dialect="diffusers")
        assert mixed.keys() == there.keys()
        assert [key for key in there if not torch.equal(mixed[key], there[key])] == []
