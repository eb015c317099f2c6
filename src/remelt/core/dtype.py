"""Element types, named as the safetensors format names them, with the names that people type."""

from __future__ import annotations

import enum

from remelt.core.nearest import nearest_hint
from remelt.errors import OptionError


class DType(enum.Enum):
    """An element type: its value is ``(name in a safetensors header, bytes, kind)``.

    >>> DType.parse("fp16"), DType.BF16.itemsize, DType.I64.is_float
    (<DType.F16>, 2, False)
    """

    F64 = ("F64", 8, "float")
    F32 = ("F32", 4, "float")
    F16 = ("F16", 2, "float")
    BF16 = ("BF16", 2, "float")
    F8_E4M3 = ("F8_E4M3", 1, "float")
    F8_E5M2 = ("F8_E5M2", 1, "float")
    F8_E8M0 = ("F8_E8M0", 1, "scale")
    I64 = ("I64", 8, "int")
    I32 = ("I32", 4, "int")
    I16 = ("I16", 2, "int")
    I8 = ("I8", 1, "int")
    U64 = ("U64", 8, "int")
    U32 = ("U32", 4, "int")
    U16 = ("U16", 2, "int")
    U8 = ("U8", 1, "int")
    BOOL = ("BOOL", 1, "bool")

    itemsize: int
    """Bytes of one element."""
    is_float: bool
    """Whether merging arithmetic applies; integers, booleans and powers of two as scales are only ever copied."""

    def __init__(self, stored: str, itemsize: int, kind: str) -> None:
        self.itemsize, self.is_float = itemsize, kind == "float"

    @classmethod
    def parse(cls, name: str) -> DType:
        """The type of that name: safetensors' (``F16``), torch's (``float16``) or the community's (``fp16``).

        Raises `OptionError` for an unknown one, with the nearest name.
        """
        found = _NAMES.get(name.strip().lower().removeprefix("torch."))
        if found is None:
            hint = nearest_hint(name.lower(), _NAMES) or f"one of {', '.join(sorted(_NAMES))}"
            raise OptionError(f"{name!r} is not an element type", hint=hint)
        return found

    def __repr__(self) -> str:
        return f"<DType.{self.name}>"

    def __str__(self) -> str:
        return self.name


_NAMES: dict[str, DType] = {dtype.name.lower(): dtype for dtype in DType} | {
    "float64": DType.F64,
    "fp64": DType.F64,
    "double": DType.F64,
    "float32": DType.F32,
    "fp32": DType.F32,
    "float": DType.F32,
    "float16": DType.F16,
    "fp16": DType.F16,
    "half": DType.F16,
    "bfloat16": DType.BF16,
    "float8_e4m3fn": DType.F8_E4M3,
    "fp8_e4m3": DType.F8_E4M3,
    "fp8": DType.F8_E4M3,
    "float8_e5m2": DType.F8_E5M2,
    "fp8_e4m3fn": DType.F8_E4M3,
    "float8_e8m0fnu": DType.F8_E8M0,
    "fp8_e5m2": DType.F8_E5M2,
    "int64": DType.I64,
    "int32": DType.I32,
    "int16": DType.I16,
    "int8": DType.I8,
    "uint64": DType.U64,
    "uint32": DType.U32,
    "uint16": DType.U16,
    "uint8": DType.U8,
}
