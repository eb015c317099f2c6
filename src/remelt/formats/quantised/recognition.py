"""Which stored tensors belong together: found by the names that tools give to scales, and held against shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.quantised.schemes import Mapped, NvPacked, Packed, Quantised, Scaled, scale_grid

_SMALL = (DType.F8_E4M3, DType.F8_E5M2, DType.I8)
_PACKED = (DType.U8, *_SMALL)
"""Types of weights that others stand beside."""
_MARKERS = ("scaled_fp8",)
"""Tensors that only say that a file is quantised."""
_OF_INPUTS = ("scale_input", "input_scale", "input_global_scale", "input_scale_2", "comfy_quant", "weight_format")
"""What is said of a layer's inputs, or of the format, beside its weight: no part of the weight."""
_SCALES = ("scale_weight", "weight_scale_inv", "weight_scale", "SCB")
_PLAIN_SCALE = "scale"
"""What newer files of DeepSeek call a scale; norms have tensors of that name, too, but no weight beside it."""
_STATE = ".quant_state.bitsandbytes__"
_FOREIGN = {
    ".qweight": "packed integers of GPTQ or AWQ",
    ".weight_packed": "packed integers of compressed-tensors",
    ".weight_zero_point": "integers with zero points of compressed-tensors",
    ".codebooks": "code books of AQLM",
    ".W_q": "packed integers of HQQ",
}
_CONFIG = "config.json"
_LARGEST_STATE = 2**16
_LACKS_TENSORS = "the file lacks tensors: download it again"


def find_quantised(
    tensors: Mapping[str, TensorInfo], read: Callable[[str], memoryview], path: Path | None
) -> tuple[dict[str, Quantised], frozenset[str]]:
    """The tensors that others hold, by the key of their weight, and all keys that are no tensors of the model.

    Raises `FormatError` for weights without their scales, for scales that do not fit or belong to nothing, and for
    quantisations that are not read.
    """
    _refuse_foreign(tensors)
    found: dict[str, Quantised] = {}
    hidden = {
        key for key in tensors if _leaf(key) in _MARKERS or (_leaf(key) in _OF_INPUTS and _is_beside(key, tensors))
    }
    block = _block_of(path)
    mapped = {key.partition(_STATE)[0] for key in tensors if _STATE in key}
    for key, info in tensors.items():
        if info.dtype not in _PACKED and key not in mapped:  # as most tensors of most files are
            continue
        made = (
            _mapped(key, tensors, read)
            or _packed_experts(key, tensors)
            or _nv_packed(key, tensors)
            or _scaled(key, info, tensors, block)
        )
        if made is None:
            continue
        name, one = made
        found[name] = one
        hidden.update(part for part in one.parts.values() if part != name)
        hidden.update(_beside_mapped(key, tensors) if isinstance(one, Mapped) else ())
    _refuse_lonely_scales(tensors, hidden)
    _refuse_lonely_weights(tensors, found, hidden)
    return found, frozenset(hidden)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _is_beside(key: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a key stands beside a weight."""
    module = key.rpartition(".")[0]
    return f"{module}.weight" in tensors


def _scaled(
    key: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None
) -> tuple[str, Quantised] | None:
    if info.dtype not in _SMALL:
        return None
    module, _, leaf = key.rpartition(".")
    prefix = f"{module}." if module else ""
    beside = [f"{key}_scale_inv", f"{key}_scale"]
    names = [prefix + one for one in (*_SCALES, _PLAIN_SCALE)] if leaf == "weight" else beside
    present = [name for name in names if name in tensors]
    if len(present) > 1:
        raise FormatError(f"{key} has {len(present)} scales: {', '.join(present)}", hint="a tensor has one of them")
    scale = present[0] if present else None
    if scale is None:
        if info.dtype is DType.I8 and leaf == "weight" and len(info.shape) > 1:
            raise FormatError(
                f"{key} is I8 {list(info.shape)} without a scale beside it",
                hint=f"such weights have one named {', '.join(names)}",
            )
        return None
    grid = scale_grid(info.shape, tensors[scale], block)
    if grid is None:
        raise FormatError(
            f"{scale} is {list(tensors[scale].shape)}, which does not fit {key} of {list(info.shape)}",
            hint="a scale is one number, one a row, or one a block",
        )
    infos = {"weight": info, "scale": tensors[scale]}
    divisor = 127.0 if _leaf(scale) == "SCB" else 1.0
    return key, Scaled(info.shape, {"weight": key, "scale": scale}, infos, *grid, divisor)


def _packed_experts(key: str, tensors: Mapping[str, TensorInfo]) -> tuple[str, Quantised] | None:
    """Experts of gpt-oss: ``NAME_blocks`` and ``NAME_scales`` stand for ``NAME``, transposed."""
    if not key.endswith("_blocks") or tensors[key].dtype is not DType.U8:
        return None
    name = key.removesuffix("_blocks")
    info, scale = tensors[key], tensors.get(f"{name}_scales")
    if scale is None:
        raise FormatError(f"{key} has no {name}_scales beside it", hint=_LACKS_TENSORS)
    if len(info.shape) != 4 or info.shape[:-1] != scale.shape or scale.dtype is not DType.U8:
        raise FormatError(f"{name}_scales is {scale}, which does not fit {key}, {info}")
    experts, down, groups, size = info.shape
    shape = (experts, groups * size * 2, down)
    parts = {"weight": key, "scale": f"{name}_scales"}
    return name, Packed(shape, parts, {"weight": info, "scale": scale}, turned=True)


def _nv_packed(key: str, tensors: Mapping[str, TensorInfo]) -> tuple[str, Quantised] | None:
    module = key.removesuffix(".weight")
    scale, whole = tensors.get(f"{module}.weight_scale"), tensors.get(f"{module}.weight_scale_2")
    info = tensors[key]
    if not key.endswith(".weight") or info.dtype is not DType.U8 or len(info.shape) != 2 or scale is None:
        return None
    shape = (info.shape[0], 2 * info.shape[1])
    if scale.dtype is DType.F8_E4M3 and whole is not None:
        if scale.shape[0] != shape[0] or scale.shape[-1] * 16 != shape[1] or math.prod(whole.shape) != 1:
            raise FormatError(f"{module}.weight_scale is {scale}, which does not fit {key}, {info}")
        parts = {"weight": key, "scale": f"{module}.weight_scale", "whole": f"{module}.weight_scale_2"}
        return key, NvPacked(shape, parts, {"weight": info, "scale": scale, "whole": whole})
    if scale.dtype in (DType.U8, DType.F8_E8M0) and scale.shape == (shape[0], shape[1] // 32):
        parts = {"weight": key, "scale": f"{module}.weight_scale"}
        return key, Packed(shape, parts, {"weight": info, "scale": scale})
    return None


def _beside_mapped(key: str, tensors: Mapping[str, TensorInfo]) -> list[str]:
    return [one for one in (f"{key}{_STATE}nf4", f"{key}{_STATE}fp4") if one in tensors]


def _mapped(
    key: str, tensors: Mapping[str, TensorInfo], read: Callable[[str], memoryview]
) -> tuple[str, Quantised] | None:
    states = _beside_mapped(key, tensors)
    if not states:
        return None
    told = _state(states[0], tensors[states[0]], read)
    names = {part: f"{key}.{part}" for part in ("absmax", "quant_map")}
    if "nested_blocksize" in told:
        names |= {part: f"{key}.{part}" for part in ("nested_absmax", "nested_quant_map")}
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise FormatError(f"{key} lacks {', '.join(missing)}", hint=_LACKS_TENSORS)
    shape, block = tuple(told["shape"]), told["blocksize"]
    infos = {part: tensors[name] for part, name in names.items()}
    blocks = -(-math.prod(shape) // block)
    if tensors[key].nbytes != -(-math.prod(shape) // 2) or infos["absmax"].numel != blocks:
        raise FormatError(
            f"{key} is said to hold {list(shape)} in blocks of {block}, but has {tensors[key]} "
            f"and {infos['absmax'].numel} scales"
        )
    if infos["quant_map"].numel != 16:
        raise FormatError(f"{key}.quant_map has {infos['quant_map'].numel} numbers, and 16 are due")
    if "nested_blocksize" in told and infos["nested_absmax"].numel * told["nested_blocksize"] < blocks:
        raise FormatError(f"{key}.nested_absmax has {infos['nested_absmax'].numel} numbers for {blocks} blocks")
    kind = states[0].rpartition("__")[2]
    nested = (told.get("nested_blocksize", 256), told.get("nested_offset", 0.0))
    return key, Mapped(shape, {"weight": key, **names}, {"weight": tensors[key], **infos}, block, *nested, kind)


def _state(key: str, info: TensorInfo, read: Callable[[str], memoryview]) -> dict[str, Any]:
    """What bitsandbytes says of a tensor, as JSON in bytes."""
    if info.dtype is not DType.U8 or info.nbytes > _LARGEST_STATE:
        raise FormatError(f"{key} is {info}, but holds JSON in bytes")
    try:
        told = json.loads(bytes(read(key)).decode("utf-8"))
    except (ValueError, RecursionError):
        told = None
    shape = told.get("shape") if isinstance(told, dict) else None
    whole = [told.get(name, 64) for name in ("blocksize", "nested_blocksize")] if isinstance(told, dict) else []
    sound = (
        isinstance(shape, list)
        and all(type(side) is int and side >= 0 for side in shape)
        and all(type(one) is int and one >= 2 and one % 2 == 0 for one in whole)
        and isinstance(told.get("nested_offset", 0.0), (int, float))
    )
    if not sound:
        raise FormatError(f"{key} tells no shape and block size that remelt understands")
    found: dict[str, Any] = told
    return found


def _block_of(path: Path | None) -> tuple[int, int] | None:
    """The size of blocks that the configuration beside a model tells."""
    if path is None:
        return None
    file = (path if path.is_dir() else path.parent) / _CONFIG
    try:
        if file.stat().st_size > 2**24:
            return None
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    quantised = told.get("quantization_config") if isinstance(told, dict) else None
    size = quantised.get("weight_block_size") if isinstance(quantised, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return size[0], size[1]
    return None


def _refuse_foreign(tensors: Mapping[str, TensorInfo]) -> None:
    endings = tuple(_FOREIGN)
    for key, info in tensors.items():
        if key.endswith(endings) and not info.dtype.is_float:
            what = next(one for ending, one in _FOREIGN.items() if key.endswith(ending))
            raise FormatError(
                f"{key} is {info}: {what}, which remelt does not read",
                hint="merge the weights that it was made from, or dequantise it with the tool that made it",
            )


def _refuse_lonely_scales(tensors: Mapping[str, TensorInfo], hidden: set[str]) -> None:
    """Refuse scales of nothing, and those whose tensor lacks what says how they are meant."""
    for key, info in tensors.items():
        module, _, leaf = key.rpartition(".")
        if key in hidden:
            continue
        if leaf in _SCALES and not _is_other_scale(key, tensors):
            weight = tensors.get(f"{module}.weight")
            what = "which is not there" if weight is None else f"which is {weight}"
            raise FormatError(f"{key} is a scale of {module}.weight, {what}")
        if leaf == "absmax" and module in tensors and tensors[module].dtype is DType.U8:
            raise FormatError(
                f"{module} is {tensors[module]} with {key}, but without {module}{_STATE}nf4", hint=_LACKS_TENSORS
            )
        if key.endswith("_scales") and info.dtype is DType.U8:
            raise FormatError(
                f"{key} holds the scales of {key.removesuffix('scales')}blocks, which is not there", hint=_LACKS_TENSORS
            )


def _refuse_lonely_weights(tensors: Mapping[str, TensorInfo], found: Mapping[str, Quantised], hidden: set[str]) -> None:
    """Refuse small numbers without a scale where a marker says that there are scales, or other blocks have them.

    A marker speaks of the tensors beside and below it: files hold models that are scaled beside ones that are not.
    """
    markers = {key.removesuffix(_leaf(key)): key for key in tensors if _leaf(key) in _MARKERS}
    scaled = {_without_numbers(key): key for key, one in found.items() if isinstance(one, Scaled)}
    for key, info in tensors.items():
        small = info.dtype in (DType.F8_E4M3, DType.F8_E5M2) and len(info.shape) > 1 and key.endswith(".weight")
        if not small or key in found or key in hidden:
            continue
        marker = next((name for prefix, name in markers.items() if key.startswith(prefix)), None)
        if marker is not None:
            raise FormatError(
                f"{key} is {info} without {key.removesuffix('weight')}scale_weight, in a file that is marked {marker}",
                hint=_LACKS_TENSORS,
            )
        other = scaled.get(_without_numbers(key))
        if other is not None:
            scale = found[other].parts["scale"]
            raise FormatError(f"{key} is {info} without a scale, but {other} has {scale}", hint=_LACKS_TENSORS)


def _without_numbers(key: str) -> str:
    """A key that tensors of all blocks share."""
    return ".".join("*" if part.isdigit() else part for part in key.split("."))


def _is_other_scale(key: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether it is a tensor of that name that stands beside a weight of full precision."""
    weight = tensors.get(f"{key.rpartition('.')[0]}.weight")
    return weight is not None and weight.dtype.is_float and weight.dtype not in _SMALL
