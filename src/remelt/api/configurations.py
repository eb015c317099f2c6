"""The configuration beside a result: carried over from its first model, and made to say what the result is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from remelt.api.tying import HEAD, TIED
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError

CONFIG = "config.json"
Companion = tuple[Path | bytes, str]
_LARGEST = 2**28
_TYPES = {DType.F64: "float64", DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}
"""Element types that a model can be made of, as configurations name them."""
_TYPE_KEYS = ("dtype", "torch_dtype")
_QUANTISATION = ("quantization_config", "compression_config")
_QUANTISED = (
    *(".weight_scale", ".weight_scale_inv", ".scale_weight", ".input_scale", ".comfy_quant", ".weight_packed"),
    *("_blocks", "_scales", ".scales", ".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB"),
)
"""What stands beside numbers that are stored in few bits."""


def read_json(content: Path | bytes, name: str | None = None) -> dict[str, Any]:
    """The JSON object that a small file holds; `FormatError` for anything else."""
    shown = name or str(content if isinstance(content, Path) else CONFIG)
    if isinstance(content, Path):
        if content.stat().st_size > _LARGEST:
            raise FormatError(f"{shown} is larger than any such file")
        content = content.read_bytes()
    try:
        told = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{shown} is no JSON: {error}") from None
    if not isinstance(told, dict):
        raise FormatError(f"{shown} is no JSON object")
    return told


def written(told: Mapping[str, Any]) -> bytes:
    """A configuration as a file."""
    return (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()


def parts_of(told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration, and those of parts in it, such as ``text_config``."""
    pending: list[Any] = [told]
    while pending:
        one = pending.pop(0)
        if isinstance(one, dict):
            yield one
            pending += [value for name, value in one.items() if name not in _QUANTISATION]


def in_keeping(
    found: Sequence[Companion], result: Mapping[str, TensorInfo], first: Mapping[str, TensorInfo], *, untied: bool
) -> list[Companion]:
    """The small files with a configuration that says the result's element type, ties and quantisation.

    ``first`` are the tensors of the model whose configuration it is, where they are known; ``untied`` says that the
    result is one of tied models and others. A file with nothing to change stays as it is, to the byte.
    """
    changes: list[Callable[[dict[str, Any]], None]] = []
    dtype = _TYPES.get(_main_type(result))  # type: ignore[arg-type]
    dequantised = any(info.written is not None for info in first.values()) and not is_quantised(result)
    if dtype is not None and (dequantised or _main_type(result) is not _main_type(first)):
        changes.append(lambda told: _tell_type(told, dtype))
    if untied and any(key.endswith(HEAD) for key in result):
        changes.append(_tell_untied)
    if not is_quantised(result):
        changes.append(_tell_plain)
    return [_changed(one, changes) if one[1] == CONFIG else one for one in found]


def is_quantised(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether tensors are stored in few bits, with scales beside them or as they are."""
    return any(info.dtype.itemsize == 1 and info.dtype.is_float for info in tensors.values()) or any(
        key.endswith(_QUANTISED) for key in tensors
    )


def _main_type(tensors: Mapping[str, TensorInfo]) -> DType | None:
    """The floating-point type of most bytes."""
    sizes: dict[DType, int] = {}
    for info in tensors.values():
        if info.dtype.is_float:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def _changed(companion: Companion, changes: Sequence[Callable[[dict[str, Any]], None]]) -> Companion:
    content, name = companion
    if not changes:
        return companion
    told, before = read_json(content), read_json(content)
    for change in changes:
        change(told)
    return companion if told == before else (written(told), name)


def _tell_type(told: dict[str, Any], dtype: str) -> None:
    for one in parts_of(told):
        one.update({name: dtype for name in _TYPE_KEYS if name in one})


def _tell_untied(told: dict[str, Any]) -> None:
    told[TIED] = False
    for one in parts_of(told):
        if TIED in one:
            one[TIED] = False


def _tell_plain(told: dict[str, Any]) -> None:
    for one in parts_of(told):
        for name in _QUANTISATION:
            one.pop(name, None)
