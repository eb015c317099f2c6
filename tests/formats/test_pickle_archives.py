"""Archives that torch.save writes: the same tensors as torch.load gives, without running anything."""

from __future__ import annotations

import collections
import copyreg
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.checkpoint import open_checkpoint

TORCH_TYPES = {
    torch.float64: DType.F64,
    torch.float32: DType.F32,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.float8_e4m3fn: DType.F8_E4M3,
    torch.float8_e5m2: DType.F8_E5M2,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.int16: DType.I16,
    torch.int8: DType.I8,
    torch.uint64: DType.U64,
    torch.uint32: DType.U32,
    torch.uint16: DType.U16,
    torch.uint8: DType.U8,
    torch.bool: DType.BOOL,
}


class HyperParameters:
    """A class of a training program that no longer exists where the checkpoint is opened."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.history = [{"loss": 1.0}, (1, 2), {3, 4}]


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_opens_as(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Each tensor has the type, shape and bytes that are expected, whole and in part."""
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "pickle" and checkpoint.files() == (path,)
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            info = checkpoint.tensors[name]
            assert info == TensorInfo(TORCH_TYPES[tensor.dtype], tuple(tensor.shape))
            data = bytes_of(tensor)
            assert bytes(checkpoint.read(name)) == data
            width = info.dtype.itemsize
            middle = info.numel // 2 * width
            assert bytes(checkpoint.read(name, 0, middle)) + bytes(checkpoint.read(name, middle)) == data
        positions = [checkpoint.position(name) for name in checkpoint.tensors]
        assert positions == sorted(positions)


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=source)
    return raw.view(dtype).reshape(shape)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=10),
        st.tuples(
            st.sampled_from(sorted(TORCH_TYPES, key=str)),
            st.lists(st.integers(0, 5), max_size=4).map(tuple),
            st.integers(0, 99),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_torch_saves_is_read_back(
    tmp_path: Path, wanted: dict[str, tuple[torch.dtype, tuple[int, ...], int]]
) -> None:
    path = tmp_path / "model.pt"
    torch.save({name: tensor_of(*described) for name, described in wanted.items()}, path)
    assert_opens_as(path, torch.load(path, weights_only=True))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_any_view_of_a_storage_is_gathered_as_torch_reads_it(tmp_path: Path, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    base = tensor_of(dtype, (300,), seed=3)
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
    strides = data.draw(st.tuples(*[st.integers(0, 12)] * len(shape)))
    offset = data.draw(st.integers(0, 150))
    path = tmp_path / "view.pt"
    torch.save({"view": torch.as_strided(base, shape, strides, offset), "base": base}, path)
    assert_opens_as(path, torch.load(path, weights_only=True))


def test_transposed_permuted_and_channels_last_tensors_are_read_in_row_major_order(tmp_path: Path) -> None:
    image = tensor_of(torch.float16, (2, 3, 5, 7))
    tensors = {
        "transposed": tensor_of(torch.float32, (6, 4)).t(),
        "permuted": image.permute(3, 1, 0, 2),
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "every_other": tensor_of(torch.int16, (9, 9))[::2, 1::3],
        "expanded": tensor_of(torch.float64, (1, 5)).expand(4, 5),
        "narrow": tensor_of(torch.bool, (5, 5))[1:3, 2:4],
        "diagonal": tensor_of(torch.uint16, (4, 4)).diagonal(),
    }
    torch.save(tensors, tmp_path / "strided.pt")
    assert_opens_as(tmp_path / "strided.pt", torch.load(tmp_path / "strided.pt", weights_only=True))


def test_tensors_that_share_a_storage_are_each_read_whole(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    torch.save({"all": base, "half": base[12:], "tied": base, "grid": base.view(4, 6)[1:, ::5]}, tmp_path / "shared.pt")
    assert_opens_as(tmp_path / "shared.pt", torch.load(tmp_path / "shared.pt", weights_only=True))


def test_a_part_of_a_strided_tensor_is_gathered_from_any_element(tmp_path: Path) -> None:
    tensor = tensor_of(torch.float32, (5, 7)).t()
    torch.save({"w": tensor}, tmp_path / "part.pt")
    data = bytes_of(tensor)
    with open_checkpoint(tmp_path / "part.pt") as checkpoint:
        for start in range(0, 35, 4):
            for stop in range(start, 36, 5):
                assert bytes(checkpoint.read("w", 4 * start, 4 * stop)) == data[4 * start : 4 * stop]


def test_parameters_and_their_state_are_read_as_tensors(tmp_path: Path) -> None:
    plain = torch.nn.Parameter(torch.randn(3, 2))
    marked = torch.nn.Parameter(torch.randn(4))
    marked.origin = "a state beside the data"  # type: ignore[attr-defined]
    buffer = torch.nn.Buffer(torch.randn(2))
    torch.save({"plain": plain, "marked": marked, "buffer": buffer}, tmp_path / "parameters.pt")
    assert_opens_as(tmp_path / "parameters.pt", {"plain": plain.data, "marked": marked.data, "buffer": buffer.detach()})


def test_a_modules_state_dict_opens_with_its_version_marks(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "module.bin")
    assert_opens_as(tmp_path / "module.bin", dict(module.state_dict()))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_opens(tmp_path: Path, protocol: int) -> None:
    tensors = collections.OrderedDict(w=torch.arange(6.0).view(2, 3), b=torch.tensor(7))
    torch.save(tensors, tmp_path / "protocol.pt", pickle_protocol=protocol)
    assert_opens_as(tmp_path / "protocol.pt", dict(tensors))


def lightning_checkpoint(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What an old training run leaves: counters, numpy scalars, optimizer states, and objects of its own classes."""
    return {
        "epoch": 3,
        "global_step": np.int64(1200),
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(tensors),
        "loops": collections.defaultdict(list, fit=[1, 2.5, None, True, b"raw"]),
        "callbacks": {HyperParameters: {"best_model_score": np.float32(0.5), "monitor": HyperParameters(0.1)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "hyper_parameters": HyperParameters(0.2),
        "sets": {frozenset({1}), frozenset({2})},
        "complex": complex(1, 2),
        "big": 2**4000,
        "range": range(3),
        "array": np.arange(4),
        "date": np.dtype("float32"),
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
    }


def test_a_training_checkpoint_full_of_unknown_classes_opens(tmp_path: Path) -> None:
    tensors = {"model.weight": torch.randn(3, 3, dtype=torch.float16), "model.bias": torch.randn(3)}
    torch.save(lightning_checkpoint(tensors), tmp_path / "epoch=3.ckpt")
    assert_opens_as(tmp_path / "epoch=3.ckpt", tensors)


def test_opening_imports_no_class_that_the_pickle_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(lightning_checkpoint({"w": torch.ones(2)}), tmp_path / "old.ckpt")
    loaded: list[str] = []
    real = __import__

    def record(name: str, *rest: Any) -> Any:
        loaded.append(name)
        return real(name, *rest)

    monkeypatch.setattr("builtins.__import__", record)
    with open_checkpoint(tmp_path / "old.ckpt") as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
    assert not [name for name in loaded if not name.startswith(("remelt", "zipfile", "mmap", "_", "encodings"))]


@pytest.mark.parametrize("nest", ["state_dict", "model_state_dict", "model", "module", "params", "params_ema", "ema"])
def test_a_state_dict_is_found_where_training_tools_nest_it(tmp_path: Path, nest: str) -> None:
    torch.save({"step": 4, nest: {"w": torch.ones(3)}, "optimizer": {"m": torch.zeros(9)}}, tmp_path / "nested.pt")
    assert_opens_as(tmp_path / "nested.pt", {"w": torch.ones(3)})


def test_a_state_dict_among_other_nests_is_the_one(tmp_path: Path) -> None:
    torch.save({"ema": {"w": torch.zeros(3)}, "state_dict": {"w": torch.ones(3)}}, tmp_path / "both.pt")
    assert_opens_as(tmp_path / "both.pt", {"w": torch.ones(3)})


def test_two_nests_that_may_both_be_meant_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"params": {"w": torch.ones(3)}, "params_ema": {"w": torch.ones(3)}}, tmp_path / "esrgan.pth")
    with pytest.raises(FormatError, match=r"esrgan\.pth holds several state dicts: params, params_ema"):
        open_checkpoint(tmp_path / "esrgan.pth")


def test_an_empty_nest_does_not_count(tmp_path: Path) -> None:
    torch.save({"params": {}, "params_ema": {"w": torch.ones(3)}}, tmp_path / "one.pth")
    assert_opens_as(tmp_path / "one.pth", {"w": torch.ones(3)})


def test_nested_mappings_are_joined_by_dots(tmp_path: Path) -> None:
    nested = {"unet": {"in": {"w": torch.ones(2)}}, "vae": {0: torch.zeros(1), "note": "text"}, "top": torch.ones(1)}
    torch.save(nested, tmp_path / "nested.pt")
    expected = {"unet.in.w": torch.ones(2), "vae.0": torch.zeros(1), "top": torch.ones(1)}
    assert_opens_as(tmp_path / "nested.pt", expected)


def test_a_mapping_that_stands_in_two_places_gives_its_tensors_twice(tmp_path: Path) -> None:
    shared = {"w": torch.ones(2)}
    torch.save({"encoder": shared, "decoder": shared}, tmp_path / "tied.pt")
    assert_opens_as(tmp_path / "tied.pt", {"encoder.w": torch.ones(2), "decoder.w": torch.ones(2)})


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, tmp_path / "clash.pt")
    with pytest.raises(FormatError, match=r"clash\.pt: two tensors are named 'a\.b'"):
        open_checkpoint(tmp_path / "clash.pt")


def test_a_tensor_repeated_by_its_strides_opens_within_reason(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(1000, 1000)}, tmp_path / "some.pt")
    with open_checkpoint(tmp_path / "some.pt") as checkpoint:
        assert bytes(checkpoint.read("w", 3_999_996)) == struct.pack("<f", 1.0)
    torch.save({"w": torch.ones(1).expand(2**30, 2**20)}, tmp_path / "bomb.pt")
    with pytest.raises(FormatError, match=r"bomb\.pt: 'w' repeats the 4 bytes of its storage into 4503599627370496"):
        open_checkpoint(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: torch.ones(2, dtype=torch.complex64), r"tensors of type torch\.ComplexFloatStorage"),
        (lambda: torch.eye(3).to_sparse(), r"_rebuild_sparse_tensor, which is not supported"),
        (lambda: torch.empty(2, device="meta"), r"_rebuild_meta_tensor_no_storage, which is not supported"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, r"is not supported"),
        (lambda: torch.ones([1] * 40), r"a tensor of 40 axes"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path: Path, made: Any, expected: str) -> None:
    torch.save({"odd": made()}, tmp_path / "odd.pt")
    with pytest.raises(FormatError, match=rf"odd\.pt: .*{expected}"):
        open_checkpoint(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (torch.nn.Linear(2, 2), r"holds a whole torch\.nn\.modules\.linear\.Linear object, not a state dict"),
        ([torch.ones(2)], r"holds list, not a state dict"),
        ({"epoch": 3}, r"holds no tensors"),
        ({}, r"holds no tensors"),
        ("text", r"holds str, not a state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused_with_what_it_is(tmp_path: Path, content: Any, expected: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(FormatError, match=rf"other\.pt {expected}"):
        open_checkpoint(tmp_path / "other.pt")


def test_the_last_bytes_of_a_pickled_tensor_beyond_2_gib_are_read(tmp_path: Path) -> None:
    """A small archive whose pickle is made to speak of a large storage, which is a hole in the file."""
    torch.save({"w": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "small.pt")
    size = 2**31 + 4096
    with zipfile.ZipFile(tmp_path / "small.pt") as archive:
        pickled = archive.read("small/data.pkl")
    count = b"K\x01"  # BININT1 1: elements of the storage, length and stride of the tensor
    large = b"\x8a\x05" + size.to_bytes(5, "little")
    assert pickled.count(count) >= 3
    first = pickled.index(count)
    pickled = pickled[:first] + large + pickled[first + 2 :]
    shape = pickled.index(count, first)
    pickled = pickled[:shape] + large + pickled[shape + 2 :]
    path = tmp_path / "large.pt"
    name = b"large/data/0"
    with open(path, "wb") as file:
        entries = [(b"large/data.pkl", pickled, len(pickled)), (name, None, size)]
        central = b""
        for entry, content, length in entries:
            begin = file.tell()
            fields = (20, 0, 0, 0, 33, 0, length, length, len(entry), 0)
            file.write(struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields) + entry)
            central += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, *fields, 0, 0, 0, 0, begin) + entry
            if content is not None:
                file.write(content)
            else:
                file.seek(length - 4, os.SEEK_CUR)
                file.write(b"last")
        begin = file.tell()
        file.write(central + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, len(central), begin, 0))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["w"] == TensorInfo(DType.U8, (size,))
        assert bytes(checkpoint.read("w", size - 8)) == b"\0\0\0\0last"


class RunsAtLoading:
    """Its pickle creates a file when a trusting reader loads it."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "something in the pickle ran"


def test_a_hostile_leaf_beside_good_tensors_stays_inert(tmp_path: Path, sentinel: Path) -> None:
    hostile = {
        "system": RunsAtLoading(os.system, (f"touch {sentinel}",)),
        "open": RunsAtLoading(open, (str(sentinel), "w")),
        "eval": RunsAtLoading(eval, (f"open({str(sentinel)!r}, 'w')",)),
        "write": RunsAtLoading(Path.write_text, (sentinel, "ran")),
    }
    tensors = {"w": torch.arange(3.0)}
    torch.save({**hostile, **tensors}, tmp_path / "hostile.pt")
    assert_opens_as(tmp_path / "hostile.pt", tensors)


def test_the_sentinel_would_notice(tmp_path: Path) -> None:
    path = tmp_path / "trusting.pt"
    torch.save({"open": RunsAtLoading(os.mkdir, (str(tmp_path / "ran"),))}, path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_registered_extensions_are_not_looked_up(tmp_path: Path) -> None:
    copyreg.add_extension("collections", "Counter", 240)  # type: ignore[arg-type]
    try:
        torch.save({"counter": collections.Counter("aab"), "w": torch.ones(1)}, tmp_path / "extension.pt")
    finally:
        copyreg.remove_extension("collections", "Counter", 240)  # type: ignore[arg-type]
    assert_opens_as(tmp_path / "extension.pt", {"w": torch.ones(1)})


def test_an_archive_with_json_beside_its_pickle_opens(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "extra.pt")
    with zipfile.ZipFile(tmp_path / "extra.pt", "a") as archive:
        archive.writestr("extra/notes.json", json.dumps({"made": "by hand"}))
    assert_opens_as(tmp_path / "extra.pt", {"w": torch.ones(1)})
