"""GGUF files are read as the package gguf reads them, and damaged ones refused; what is written, it reads."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import remelt as rm
from remelt.core.dtype import DType
from remelt.errors import FormatError, OptionError, OutputError
from remelt.formats.checkpoint import open_checkpoint
from remelt.formats.gguf_header import read_gguf_header
from remelt.formats.quantised import dequantised

gguf = pytest.importorskip("gguf")
KINDS = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits or kind.name in ("F16", "F32")]


def written(path: Path, tensors: dict[str, tuple[Any, Any]], **values: Any) -> Path:
    """A file by the package: each tensor with its bytes and its type."""
    writer = gguf.GGUFWriter(path, "flux")
    for key, value in values.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_array(key, value)
    for key, (data, kind) in tensors.items():
        writer.add_tensor(key, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def drawn(kind: Any, rows: int = 4, width: int = 512) -> Any:
    """Bytes of a type: of drawn numbers where the package writes it, else drawn ones that make no NaN."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((rows, width)).astype(np.float32)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return generator.integers(0, 120, (rows, width // block * size), dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_is_read_bit_for_bit(tmp_path: Path, kind: Any) -> None:
    data = drawn(kind)
    due = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, kind), dtype=np.float32))
    with dequantised(open_checkpoint(written(tmp_path / "a.gguf", {"x": (data, kind)}))) as found:
        info = found.tensors["x"]
        assert info.shape == (4, 512)
        stored = {DType.F16: torch.float16, DType.BF16: torch.bfloat16}.get(info.dtype, torch.float32)
        got = torch.frombuffer(bytearray(found.read("x")), dtype=stored)
        assert torch.equal(got.float().reshape(4, 512).view(torch.int32), due.view(torch.int32))
        size = info.dtype.itemsize
        assert found.read("x", 33 * size, 900 * size) == found.read("x")[33 * size : 900 * size]


def test_metadata_and_shapes_of_more_axes(tmp_path: Path) -> None:
    values = {"general.name": "A style", "comfy.gguf.orig_shape.x": [2, 4, 2, 128], "tokens": ["a", "b"]}
    path = written(
        tmp_path / "a.gguf", {"x": (drawn(gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)}, **values
    )
    with dequantised(open_checkpoint(path)) as found:
        assert found.tensors["x"].shape == (2, 4, 2, 128)
        assert found.metadata == {"general.architecture": "flux", "general.name": "A style"}
    with open_checkpoint(path) as stored:
        assert stored.tensors["x"].dtype is DType.U8


@pytest.fixture
def sound(tmp_path: Path) -> bytes:
    kind = gguf.GGMLQuantizationType.Q4_0
    path = written(
        tmp_path / "sound.gguf", {"x.weight": (drawn(kind), kind)}, note="n", words=["a", "b"], sizes=[1, 2, 3]
    )
    return path.read_bytes()


def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "cut.gguf"
    for end in (*range(4, 400), len(sound) - 1):
        path.write_bytes(sound[:end])
        with pytest.raises(FormatError, match=r"cut\.gguf"):
            open_checkpoint(path)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(4, 260), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_header_is_refused_or_read(changes: list[tuple[int, int]]) -> None:
    header = bytearray(_SOUND)
    for place, value in changes:
        header[place] = value
    with contextlib.suppress(FormatError):
        found = read_gguf_header(memoryview(header), "damaged.gguf")
        assert found.data % found.alignment == 0


def _small() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        kind = gguf.GGMLQuantizationType.Q8_0
        path = written(Path(folder) / "a.gguf", {"x": (drawn(kind, 1, 32), kind)}, words=["a", "b"], sizes=[1, 2, 3])
        return path.read_bytes()


_SOUND = _small()


def head(tensors: int, values: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def tensor(width: int, kind: int) -> bytes:
    return struct.pack("<Q1sIQIQ", 1, b"a", 1, width, kind, 0) + bytes(64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (head(0, 0, 1), "is GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "of another byte order"),
        (head(2**60, 0), "its header needs 8 bytes"),
        (head(0, 1) + struct.pack("<Q", 2**62) + b"x" * 99, "a name in its header is"),
        (head(0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 2), "an array in its header is of the type 9"),
        (head(0, 1) + struct.pack("<Q1sI", 1, b"a", 77), "of the unknown type 77"),
        (head(1, 0) + tensor(32, 250), "of the type 250, which gguf .* does not know"),
        (head(1, 0) + tensor(31, 8), r"of shape \[31\] is not made of blocks of 32"),
        (head(2, 0) + tensor(1, 0)[:-64] + tensor(1, 0), "tensor 'a' is there twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "wrong.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path / "wrong.gguf")


def model(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"patch.weight": (8, 4, 1, 2, 2), "out.weight": (5, 33)}
    for block in range(2):
        shapes |= {f"double_blocks.{block}.qkv.weight": (96, 64), f"double_blocks.{block}.qkv.bias": (96,)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.mark.parametrize(("dtype", "bound"), [("q8_0", 1 / 127), (None, 2**-11), ("bf16", 2**-8), ("fp32", 0.0)])
def test_what_is_written_the_package_reads(tmp_path: Path, dtype: str | None, bound: float) -> None:
    recipe = rm.weighted_sum(rm.model(model(0)), rm.model(model(1)), alpha=0.3)
    due = rm.merge(recipe)
    path = rm.merge(recipe, tmp_path / "out.gguf", dtype=dtype)
    reader = gguf.GGUFReader(path)
    found = {one.name: one for one in reader.tensors}
    assert set(found) == set(due)
    for key, one in found.items():
        values = torch.from_numpy(np.array(gguf.quants.dequantize(one.data, one.tensor_type))).reshape(due[key].shape)
        assert float((values - due[key]).abs().max()) <= bound * float(due[key].abs().max())
        assert one.data_offset % 32 == 0
    expected = {"q8_0": "Q8_0", None: "F16", "bf16": "BF16", "fp32": "F32"}[dtype]
    assert found["double_blocks.0.qkv.weight"].tensor_type.name == expected
    assert found["double_blocks.0.qkv.bias"].tensor_type.name == "F32"
    assert found["out.weight"].tensor_type.name == ("F16" if dtype == "q8_0" else expected)  # no multiple of 32 wide
    assert reader.fields["comfy.gguf.orig_shape.patch.weight"].contents() == [8, 4, 1, 2, 2]
    with dequantised(open_checkpoint(path)) as ours:
        assert {key: info.shape for key, info in ours.tensors.items()} == {
            key: tuple(one.shape) for key, one in due.items()
        }


def test_the_name_of_the_type_may_be_in_capitals(tmp_path: Path) -> None:
    path = rm.merge(rm.model(model(0)), tmp_path / "out.gguf", dtype="Q8_0")
    assert {one.tensor_type.name for one in gguf.GGUFReader(path).tensors} == {"Q8_0", "F16", "F32"}


def test_its_own_types_and_its_header_are_kept(tmp_path: Path) -> None:
    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q5_1", "Q8_0", "F16", "F32", "BF16")]
    tensors = {f"blk.{number}.x": (drawn(kind), kind) for number, kind in enumerate(kinds)}
    path = written(tmp_path / "a.gguf", tensors, words=["hello", "wörld"], note="kept")
    out = rm.merge(rm.weighted_sum(path, path, alpha=0.5), tmp_path / "b.gguf", keep_quantisation=True)
    before, after = gguf.GGUFReader(path), gguf.GGUFReader(out)
    assert [(one.name, one.tensor_type) for one in after.tensors] == [
        (one.name, one.tensor_type) for one in before.tensors
    ]
    for one, other in zip(before.tensors, after.tensors, strict=True):
        np.testing.assert_array_equal(one.data, other.data)  # equal models: the same blocks again
    assert after.fields["words"].contents() == ["hello", "wörld"]
    assert after.fields["note"].contents() == "kept"
    assert rm.merge(out, dtype="fp32", keep_quantisation=False)["blk.0.x"].shape == (4, 512)  # the recipe inside


def test_a_merge_of_two_equals_that_of_their_dequantised_copies(tmp_path: Path) -> None:
    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q4_K", "Q8_0", "Q6_K", "IQ4_XS")]
    generator = np.random.default_rng(3)
    files, copies = [], []
    for name in ("a", "b"):
        tensors, copy = {}, {}
        for number, kind in enumerate(kinds):
            block, size = gguf.GGML_QUANT_SIZES[kind]
            data = generator.integers(0, 60, (4, 512 // block * size), dtype=np.uint8)
            tensors[f"blk.{number}.x"] = data, kind
            copy[f"blk.{number}.x"] = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind), dtype=np.float32))
        files.append(written(tmp_path / f"{name}.gguf", tensors))
        copies.append(rm.model(copy))
    for dtype in ("fp32", "bf16"):
        found = rm.merge(rm.weighted_sum(*files, alpha=0.3), dtype=dtype)
        due = rm.merge(rm.weighted_sum(*copies, alpha=0.3), dtype=dtype)
        assert all(torch.equal(found[key], due[key]) for key in due)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_K
    path = written(tmp_path / "a.gguf", {"blk.0.x": (drawn(kind), kind)})
    with pytest.raises(OptionError, match=r"blk\.0\.x is Q4_K, which the package gguf reads and does not write"):
        rm.merge(rm.model(path) * 1.0, tmp_path / "b.gguf", keep_quantisation=True)
    with pytest.raises(OptionError, match="q8_0 is a type of GGUF files"):
        rm.merge(rm.model(path) * 1.0, tmp_path / "b.safetensors", dtype="q8_0")
    with pytest.raises(OptionError, match="no GGUF file holds F8_E4M3"):
        rm.merge(rm.model(path) * 1.0, tmp_path / "b.gguf", dtype="fp8")
    with pytest.raises(OptionError, match="a GGUF file, whose types only such a file keeps"):
        rm.merge(rm.model(path) * 1.0, tmp_path / "b.safetensors", keep_quantisation=True)
    with pytest.raises(OptionError, match="is no GGUF file"):
        rm.merge(rm.model(model(0)) * 1.0, tmp_path / "b.gguf", keep_quantisation=True)
    with pytest.raises(OutputError, match="at most 63 bytes"):
        rm.merge(rm.model({"x" * 64: torch.zeros(3)}) * 1.0, tmp_path / "b.gguf")
    (tmp_path / "llm").mkdir()
    rm.merge(rm.model(model(0)) * 1.0, tmp_path / "llm" / "model.safetensors")
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OptionError, match="has its tokenizer inside") as caught:
        rm.merge(rm.model(tmp_path / "llm") * 1.0, tmp_path / "b.gguf")
    assert "convert_hf_to_gguf.py" in str(caught.value.hint)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    kind = gguf.GGMLQuantizationType.Q8_0
    path = written(tmp_path / "a.gguf", {"x": (drawn(kind), kind)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FormatError, match="need the package gguf") as caught:
        open_checkpoint(path)
    assert caught.value.hint == 'pip install "remelt[gguf]"'
