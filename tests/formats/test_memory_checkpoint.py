"""Models in memory: buffers of any kind, read as flat bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.memory import MemoryCheckpoint


@given(st.sampled_from(DType), st.lists(st.integers(0, 5), max_size=4).map(tuple), st.data())
def test_any_part_of_a_buffer_is_read(dtype: DType, shape: tuple[int, ...], data: st.DataObject) -> None:
    info = TensorInfo(dtype, shape)
    content = data.draw(st.binary(min_size=info.nbytes, max_size=info.nbytes))
    start = data.draw(st.integers(0, info.numel)) * dtype.itemsize
    with MemoryCheckpoint({"w": (info, content)}) as checkpoint:
        assert checkpoint.path is None and checkpoint.format == "memory"
        assert checkpoint.files() == () and dict(checkpoint.metadata) == {}
        assert dict(checkpoint.tensors) == {"w": info}
        assert bytes(checkpoint.read("w")) == content
        assert bytes(checkpoint.read("w", start)) == content[start:]
        assert bytes(checkpoint.read("w", 0, start)) == content[:start]


def test_an_array_of_any_type_is_read_as_bytes_without_a_copy() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    checkpoint = MemoryCheckpoint({"w": (TensorInfo(DType.F32, (2, 3)), array)})
    view = checkpoint.read("w")
    assert view.format == "B" and len(view) == 24
    array[0, 0] = 5.0
    assert np.frombuffer(view, np.float32)[0] == 5.0


def test_closing_leaves_the_buffers_to_their_owner() -> None:
    with MemoryCheckpoint({"w": (TensorInfo(DType.U8, (2,)), b"ab")}) as checkpoint:
        pass
    assert bytes(checkpoint.read("w")) == b"ab"


def test_tensors_keep_the_order_given() -> None:
    infos = {name: (TensorInfo(DType.U8, ()), b"x") for name in ("z", "a", "m")}
    checkpoint = MemoryCheckpoint(infos)
    assert list(checkpoint.tensors) == ["z", "a", "m"]
    assert sorted(checkpoint.tensors, key=checkpoint.position) == ["z", "a", "m"]


def test_a_buffer_of_another_size_is_refused() -> None:
    with pytest.raises(FormatError, match=r"'w' is F32 \[2, 3\], which is 24 bytes, but 23 are given"):
        MemoryCheckpoint({"w": (TensorInfo(DType.F32, (2, 3)), b"\0" * 23)})


def test_a_buffer_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(FormatError, match="the buffer of 'w' is not C-contiguous"):
        MemoryCheckpoint({"w": (TensorInfo(DType.F32, (3, 2)), np.zeros((2, 3), np.float32).T)})
