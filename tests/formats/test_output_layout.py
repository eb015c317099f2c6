"""Output layouts: known in advance, accepted by the safetensors library, the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OutputError
from remelt.formats.checkpoint import open_checkpoint
from remelt.formats.layout import FileLayout, OutputLayout, file_layout, folder_layout

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
INFOS = st.builds(TensorInfo, st.sampled_from(DType), st.lists(st.integers(0, 6), max_size=3).map(tuple))


def content_of(key: str, info: TensorInfo) -> bytes:
    """Bytes that differ from tensor to tensor, and are no bad booleans."""
    seed = sum(key.encode()) % 251
    return bytes((seed + place) % (2 if info.dtype is DType.BOOL else 251) for place in range(info.nbytes))


def write(folder: Path, layout: FileLayout, tensors: dict[str, TensorInfo]) -> Path:
    """Write one file as a layout says, in an order of our own, as the engine may."""
    path = folder / layout.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(layout.size)
        for key, offset in reversed(list(layout.offsets.items())):
            file.seek(offset)
            file.write(content_of(key, tensors[key]))
        file.seek(0)
        file.write(layout.header)
    return path


def write_all(folder: Path, layout: OutputLayout, tensors: dict[str, TensorInfo]) -> None:
    for file in layout.files:
        write(folder, file, tensors)
    for name, content in layout.indexes:
        (folder / name).write_bytes(content)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(NAMES, INFOS, max_size=6), st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), NAMES)
)
def test_a_file_laid_out_here_loads_with_the_safetensors_library(
    tmp_path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str]
) -> None:
    layout = file_layout(tensors, metadata, "out.safetensors")
    path = write(tmp_path, layout, tensors)
    assert path.stat().st_size == layout.size
    assert len(layout.header) % 64 == 0
    for key, offset in layout.offsets.items():
        assert offset % tensors[key].dtype.itemsize == 0
    with safe_open(path, "np") as opened:
        assert set(opened.keys()) == set(tensors)
        assert (opened.metadata() or {}) == metadata
        for key, info in tensors.items():
            described = opened.get_slice(key)
            assert (described.get_dtype(), tuple(described.get_shape())) == (info.dtype.name, info.shape)
    for key, tensor in load_file(path).items():
        assert tensor.shape == tensors[key].shape
    with open_checkpoint(path) as checkpoint:
        assert dict(checkpoint.tensors) == tensors
        for key, info in tensors.items():
            assert bytes(checkpoint.read(key)) == content_of(key, info)


def test_wider_types_go_first_and_the_order_given_is_kept_among_equals() -> None:
    tensors = {
        "byte": TensorInfo(DType.U8, (3,)),
        "half": TensorInfo(DType.BF16, (3,)),
        "wide": TensorInfo(DType.F64, ()),
        "other": TensorInfo(DType.F16, (1,)),
    }
    layout = file_layout(tensors, {}, "out.safetensors")
    assert sorted(layout.offsets, key=lambda key: layout.offsets[key]) == ["wide", "half", "other", "byte"]


def test_the_bytes_of_a_header_are_fixed() -> None:
    layout = file_layout({"w": TensorInfo(DType.F32, (2,))}, {"format": "pt"}, "out.safetensors")
    text = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert layout.header == (120).to_bytes(8, "little") + text.ljust(120)
    assert layout.offsets == {"w": 128} and layout.size == 136


def test_a_folder_without_a_limit_is_one_file_without_an_index(tmp_path: Path) -> None:
    tensors = {"a": TensorInfo(DType.F32, (4,)), "b": TensorInfo(DType.F32, (4,))}
    layout = folder_layout(tensors, {"format": "pt"}, max_shard_size=None)
    assert [file.name for file in layout.files] == ["model.safetensors"]
    assert layout.indexes == () and layout.is_folder
    assert layout.total_bytes == layout.files[0].size
    write_all(tmp_path, layout, tensors)
    assert set(load_file(tmp_path / "model.safetensors")) == {"a", "b"}


def test_shards_fill_in_the_order_given_and_a_large_tensor_has_its_own() -> None:
    sizes = {"a": 6, "b": 4, "huge": 30, "c": 5, "d": 5, "e": 1}
    tensors = {key: TensorInfo(DType.U8, (size,)) for key, size in sizes.items()}
    layout = folder_layout(tensors, {}, max_shard_size=10)
    assert [sorted(file.offsets) for file in layout.files] == [["a", "b"], ["huge"], ["c", "d"], ["e"]]
    assert [file.name for file in layout.files] == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    ((name, content),) = layout.indexes
    index = json.loads(content)
    assert name == "model.safetensors.index.json"
    assert index["metadata"] == {"total_size": 51}
    assert index["weight_map"]["huge"] == "model-00002-of-00004.safetensors"
    assert list(index["weight_map"]) == list(sizes)
    assert layout.total_bytes == sum(file.size for file in layout.files) + len(content)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["", "unet/", "vae/", "text/deep/"]), st.text("abc.0", min_size=1)).map("".join),
        INFOS,
        min_size=1,
        max_size=8,
    ),
    st.one_of(st.none(), st.integers(1, 300)),
)
def test_a_folder_of_shards_and_components_opens_as_what_was_laid_out(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, TensorInfo], limit: int | None
) -> None:
    folder = tmp_path_factory.mktemp("out")
    layout = folder_layout(tensors, {"format": "pt"}, max_shard_size=limit, weight_names={"unet": "diffusion_pytorch"})
    write_all(folder, layout, tensors)
    for component in sorted({key.rpartition("/")[0] for key in tensors}):
        prefix = f"{component}/" if component else ""
        expected = {key: info for key, info in tensors.items() if key.rpartition("/")[0] == component}
        with open_checkpoint(folder / component) as checkpoint:
            assert {prefix + key: info for key, info in checkpoint.tensors.items()} == expected
            assert dict(checkpoint.metadata) == {"format": "pt"}
            for key, info in expected.items():
                assert bytes(checkpoint.read(key.removeprefix(prefix))) == content_of(key, info)


def test_components_take_the_names_of_their_files() -> None:
    tensors = {key: TensorInfo(DType.F16, (8,)) for key in ("unet/a", "unet/b", "text_encoder/a", "top")}
    layout = folder_layout(tensors, {}, max_shard_size=16, weight_names={"unet": "diffusion_pytorch_model"})
    assert [file.name for file in layout.files] == [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors",
        "model.safetensors",
    ]
    assert [name for name, _ in layout.indexes] == ["unet/diffusion_pytorch_model.safetensors.index.json"]
    assert [sorted(file.offsets) for file in layout.files] == [["unet/a"], ["unet/b"], ["text_encoder/a"], ["top"]]


@settings(max_examples=30)
@given(st.dictionaries(NAMES.filter(lambda name: "/" not in name), INFOS, min_size=1), st.integers(1, 99))
def test_the_same_tensors_give_the_same_bytes(tensors: dict[str, TensorInfo], limit: int) -> None:
    assert file_layout(tensors, {"a": "b"}, "x") == file_layout(dict(tensors), {"a": "b"}, "x")
    assert folder_layout(tensors, {}, max_shard_size=limit) == folder_layout(dict(tensors), {}, max_shard_size=limit)


@pytest.mark.parametrize(
    "key", ["../evil", "/etc/passwd", "a/../../b", "c:/x", "\\\\host\\share/x", "a\\..\\b/x", "\0/x"]
)
def test_a_key_cannot_name_a_folder_outside_the_output(key: str) -> None:
    with pytest.raises(OutputError, match="which no subfolder can hold") as caught:
        folder_layout({key: TensorInfo(DType.U8, ())}, {}, max_shard_size=None)
    assert caught.value.hint == "write to one file instead"


@pytest.mark.parametrize("key", ["__metadata__", "half \ud800"])
def test_a_name_that_no_safetensors_file_can_hold_is_refused(key: str) -> None:
    with pytest.raises(OutputError, match=r"out\.safetensors: no tensor in a safetensors file can be named"):
        file_layout({key: TensorInfo(DType.U8, ())}, {}, "out.safetensors")


def test_a_header_beyond_the_librarys_limit_is_refused() -> None:
    with pytest.raises(OutputError, match=r"out\.safetensors would need a header of 100000\d+ bytes, of 100000000"):
        file_layout({"w": TensorInfo(DType.U8, ())}, {"recipe": "x" * 100_000_000}, "out.safetensors")
