"""Element type and shape of a tensor whose data is elsewhere."""

from __future__ import annotations

import pytest

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo, total_bytes


@pytest.mark.parametrize(
    ("shape", "numel", "nbytes"), [((), 1, 2), ((0, 4), 0, 0), ((3, 5), 15, 30), ((2**20, 2**13), 2**33, 2**34)]
)
def test_sizes_follow_from_type_and_shape(shape: tuple[int, ...], numel: int, nbytes: int) -> None:
    info = TensorInfo(DType.BF16, shape)
    assert (info.numel, info.nbytes) == (numel, nbytes)


def test_it_is_written_as_type_and_shape() -> None:
    assert str(TensorInfo(DType.F32, (320, 4, 3, 3))) == "F32 [320, 4, 3, 3]"
    assert str(TensorInfo(DType.I64, ())) == "I64 []"


def test_equal_infos_are_one_in_a_set() -> None:
    assert len({TensorInfo(DType.F32, (2,)), TensorInfo(DType.F32, (2,)), TensorInfo(DType.F16, (2,))}) == 2


def test_sizes_add_up() -> None:
    assert total_bytes([TensorInfo(DType.F32, (2,)), TensorInfo(DType.F64, ())]) == 16
    assert total_bytes([]) == 0
