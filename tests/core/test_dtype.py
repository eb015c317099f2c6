"""Element types and the names that people give them."""

from __future__ import annotations

import pickle

import pytest

from remelt.core.dtype import DType
from remelt.errors import OptionError


@pytest.mark.parametrize("dtype", DType)
def test_a_type_is_read_by_its_name_in_safetensors(dtype: DType) -> None:
    assert DType.parse(dtype.name) is DType.parse(dtype.name.lower()) is dtype
    assert str(dtype) == dtype.name
    assert repr(dtype) == f"<DType.{dtype.name}>"
    assert pickle.loads(pickle.dumps(dtype)) is dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("torch.float16", DType.F16),
        ("fp16", DType.F16),
        ("half", DType.F16),
        (" BF16 ", DType.BF16),
        ("bfloat16", DType.BF16),
        ("float32", DType.F32),
        ("double", DType.F64),
        ("fp8_e4m3", DType.F8_E4M3),
        ("float8_e4m3fn", DType.F8_E4M3),
        ("fp8_e5m2", DType.F8_E5M2),
        ("uint8", DType.U8),
        ("bool", DType.BOOL),
    ],
)
def test_a_type_is_read_by_the_names_that_people_type(name: str, dtype: DType) -> None:
    assert DType.parse(name) is dtype


def test_an_unknown_type_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"'flaot16' is not an element type\nhint: did you mean .*'float16'"):
        DType.parse("flaot16")
    with pytest.raises(OptionError, match=r"'' is not an element type\nhint: one of bf16, "):
        DType.parse("")


def test_only_floating_point_numbers_are_merged() -> None:
    assert {dtype.name for dtype in DType if dtype.is_float} == {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def test_sizes_are_those_of_the_format() -> None:
    sizes = {1: "F8_E4M3 F8_E5M2 F8_E8M0 I8 U8 BOOL", 2: "F16 BF16 I16 U16", 4: "F32 I32 U32", 8: "F64 I64 U64"}
    for size, names in sizes.items():
        assert {dtype.name for dtype in DType if dtype.itemsize == size} == set(names.split())
