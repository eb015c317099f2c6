"""Safetensors files: what the library writes is read back, byte for byte."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.checkpoint import open_checkpoint
from remelt.formats.safetensors import parse_header

TORCH_TYPES = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E5M2: torch.float8_e5m2,
    DType.F8_E8M0: torch.float8_e8m0fnu,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I16: torch.int16,
    DType.I8: torch.int8,
    DType.U64: torch.uint64,
    DType.U32: torch.uint32,
    DType.U16: torch.uint16,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
}
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


def tensor_of(dtype: DType, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor of random bytes; of zeros and ones where it is boolean."""
    info = TensorInfo(dtype, shape)
    source = torch.Generator().manual_seed(seed)
    limit = 2 if dtype is DType.BOOL else 256
    raw = torch.randint(0, limit, (info.nbytes,), dtype=torch.uint8, generator=source)
    return raw.view(TORCH_TYPES[dtype]).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The tensor's row-major bytes."""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def test_every_dtype_of_ours_has_its_counterpart_in_torch() -> None:
    assert set(TORCH_TYPES) == set(DType)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(DType), SHAPES, st.integers(0, 99)), min_size=1, max_size=6))
def test_what_the_library_writes_is_read_back(
    tmp_path: Path, wanted: dict[str, tuple[DType, tuple[int, ...], int]]
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor_of(*described) for name, described in wanted.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "safetensors" and checkpoint.files() == (path,)
        assert dict(checkpoint.metadata) == {"format": "pt"}
        assert set(checkpoint.tensors) == set(wanted)
        for name, (dtype, shape, _) in wanted.items():
            assert checkpoint.tensors[name] == TensorInfo(dtype, shape)
            assert bytes(checkpoint.read(name)) == bytes_of(tensors[name])
        positions = [checkpoint.position(name) for name in checkpoint.tensors]
        assert positions == sorted(positions)


@pytest.mark.parametrize("dtype", DType, ids=str)
def test_a_part_of_a_tensor_is_read_by_byte_offsets(tmp_path: Path, dtype: DType) -> None:
    tensor = tensor_of(dtype, (5, 3), seed=1)
    save_file({"w": tensor}, tmp_path / "part.safetensors")
    width = dtype.itemsize
    with open_checkpoint(tmp_path / "part.safetensors") as checkpoint:
        assert bytes(checkpoint.read("w", 2 * width, 9 * width)) == bytes_of(tensor)[2 * width : 9 * width]
        assert bytes(checkpoint.read("w", 4 * width)) == bytes_of(tensor)[4 * width :]
        assert bytes(checkpoint.read("w", 3 * width, 3 * width)) == b""


def test_a_scalar_has_no_shape_and_one_element(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor(2.5)}, tmp_path / "scalar.safetensors")
    with open_checkpoint(tmp_path / "scalar.safetensors") as checkpoint:
        assert checkpoint.tensors["scale"] == TensorInfo(DType.F32, ())
        assert torch.frombuffer(checkpoint.read("scale"), dtype=torch.float32).item() == 2.5


def test_a_file_is_known_by_its_content_whatever_its_suffix(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "renamed.ckpt")
    with open_checkpoint(tmp_path / "renamed.ckpt") as checkpoint:
        assert checkpoint.format == "safetensors"


def test_a_header_that_begins_like_a_pickle_is_still_safetensors(tmp_path: Path) -> None:
    for length in (0x280, 0x380, 0x480, 0x580):
        text = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
        path = tmp_path / f"header-{length}.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + text + b"x")
        with open_checkpoint(path) as checkpoint:
            assert bytes(checkpoint.read("w")) == b"x"


def test_a_file_without_tensors_opens(tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors", metadata={"a": "b"})
    with open_checkpoint(tmp_path / "none.safetensors") as checkpoint:
        assert not checkpoint.tensors and dict(checkpoint.metadata) == {"a": "b"}


def test_the_last_bytes_of_a_tensor_beyond_2_gib_are_read(tmp_path: Path) -> None:
    elements = 2**31 + 9
    entry = {"dtype": "F16", "shape": [elements], "data_offsets": [0, 2 * elements]}
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "sparse.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        begin = file.tell()
        file.seek(begin + 2 * elements - 4)
        file.write(b"last")
    assert os.path.getsize(path) == begin + 2 * elements
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["w"].nbytes == 2 * elements > 2**32
        assert bytes(checkpoint.read("w", 2 * elements - 8)) == b"\0\0\0\0last"


def test_reading_from_many_threads_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {f"w{number}": tensor_of(DType.U8, (1000,), number) for number in range(16)}
    save_file(tensors, tmp_path / "many.safetensors")
    wrong: list[str] = []
    with open_checkpoint(tmp_path / "many.safetensors") as checkpoint:

        def read_all() -> None:
            for _ in range(20):
                wrong.extend(key for key in tensors if bytes(checkpoint.read(key)) != bytes_of(tensors[key]))

        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_writing_into_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    save_file({"w": torch.ones(4)}, path)
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        torch.frombuffer(checkpoint.read("w"), dtype=torch.float32).zero_()
    assert path.read_bytes() == before


def test_a_view_outlives_its_checkpoint(tmp_path: Path) -> None:
    save_file({"w": torch.arange(4)}, tmp_path / "closed.safetensors")
    with open_checkpoint(tmp_path / "closed.safetensors") as checkpoint:
        held = checkpoint.read("w")
    assert bytes(held) == bytes_of(torch.arange(4))


def test_a_header_of_2500_tensors_is_parsed_in_milliseconds() -> None:
    entries = {
        f"model.layers.{number}.self_attn.q_proj.weight": {
            "dtype": "BF16",
            "shape": [64, 64],
            "data_offsets": [number * 8192, (number + 1) * 8192],
        }
        for number in range(2500)
    }
    data = json.dumps(entries).encode()
    times = []
    for _ in range(3):
        began = time.process_time()
        header = parse_header(data, 8 + len(data) + 2500 * 8192, "big.safetensors")
        times.append(time.process_time() - began)
    assert len(header.tensors) == 2500
    assert min(times) < 0.25  # about 0.015 s on an idle machine


def test_an_absent_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"absent\.safetensors cannot be read: No such file"):
        open_checkpoint(tmp_path / "absent.safetensors")
