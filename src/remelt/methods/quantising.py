"""Results in few bits: what is stored of a tensor as small numbers and scales, by the formulas of tools that read it.

The methods here are not for recipes: a plan puts one behind each tensor that is to be quantised. They take the tensor,
and the first model's where there is one, and give the stored tensors by name; beside them, as ``lost``, the share of
the elements that differ from the first model's by less than half a step of the numbers that can be stored.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from remelt.core.dtype import DType
from remelt.recipe.declaration import LOST
from remelt.recipe.method import Integer, Method, Role, Same, Text, merge_method

Parts = Annotated[Mapping[str, Tensor], Role("same")]
"""The tensors that stand for one, by what they are."""
EIGHT_BITS = {DType.F8_E4M3: (3, -6, 448.0), DType.F8_E5M2: (2, -14, 57344.0)}
"""Eight-bit floats: bits of the mantissa, the exponent of the smallest normal number, and the largest number."""
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The table of NF4: quantiles of a normal distribution, arXiv 2305.14314, appendix E."""


def half_steps(values: Tensor, dtype: DType) -> Tensor:
    """Half the distance from each number to the next that an eight-bit float holds.

    >>> half_steps(torch.tensor([1.0, 300.0, 0.0]), DType.F8_E4M3).tolist()
    [0.0625, 16.0, 0.0009765625]
    """
    bits, least, _ = EIGHT_BITS[dtype]
    _, exponent = torch.frexp(torch.where(values == 0.0, 2.0**least, values))
    return torch.ldexp(torch.ones_like(values), (exponent - 1).clamp(min=least) - bits - 1)


def changed_and_lost(values: Tensor, base: Tensor, halves: Tensor) -> tuple[int, int]:
    """How many elements differ from the base's, and how many of those by less than half a step."""
    apart = (values - base).abs()
    changed = apart > 0.0
    return int(changed.sum()), int((changed & (apart < halves)).sum())


def _lost(values: Tensor, base: Tensor | None, halves: Tensor) -> Tensor:
    """How many elements differ from the base's, and how many of those by less than half a step."""
    return torch.tensor((0, 0) if base is None else changed_and_lost(values, base, halves), dtype=torch.float64)


def _operands(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The tensor, and that of the first model where it is another one."""
    return tensors[0], tensors[1] if len(tensors) > 1 else None


def scaled(
    x: Tensor, base: Tensor | None, *, dtype: str, down: int, across: int, tall: int, wide: int, divisor: float
) -> dict[str, Tensor]:
    """Numbers of which the largest of each block is the largest that the type holds, and the scales."""
    highest = 127.0 if dtype == "I8" else EIGHT_BITS[DType[dtype]][2]
    height, width = x.shape[-2:]
    if (tall, wide) == (0, 0):
        tall, wide = -(-height // down), -(-width // across)
    padded = torch.nn.functional.pad(x, (0, across * wide - width, 0, down * tall - height))
    blocks = padded.reshape(*x.shape[:-2], down, tall, across, wide)
    largest = blocks.abs().amax((-3, -1))
    scale = (largest.double() / highest).float().to(x.dtype)
    scale = torch.where(scale > 0.0, scale, torch.ones_like(scale))
    spread = scale.repeat_interleave(tall, -2).repeat_interleave(wide, -1)[..., :height, :width]
    small = (x / spread).clamp(-highest, highest)
    halves = torch.full_like(x, 0.5) if dtype == "I8" else half_steps(small, DType[dtype])
    lost = _lost(x, base, halves * spread)
    return {"weight": small.round() if dtype == "I8" else small, "scale": scale * divisor, LOST: lost}


@merge_method(cut="tensor", workspace=8.0, name="quantise")
def _scaled(
    *tensors: Same,
    dtype: Text = "F8_E4M3",
    down: Integer = 1,
    across: Integer = 1,
    tall: Integer = 0,
    wide: Integer = 0,
    divisor: Integer = 1,
    scales: Text = "[]",
    constants: Text = "",
) -> Parts:
    """The tensor in an eight-bit type. Formula: x / scale, with scale = max |x| of a block / the largest number."""
    values, base = _operands(tensors)
    plain = values.reshape(1, -1) if values.dim() < 2 else values
    like = None if base is None else base.reshape(plain.shape)
    found = scaled(plain, like, dtype=dtype, down=down, across=across, tall=tall, wide=wide, divisor=float(divisor))
    found["scale"] = found["scale"].reshape(json.loads(scales))
    return {**found, "weight": found["weight"].reshape(values.shape), **_told(constants, values)}


def _told(constants: str, like: Tensor) -> dict[str, Tensor]:
    """Small tensors that are the same whatever is merged."""
    return {
        name: torch.tensor(numbers, dtype=like.dtype, device=like.device)
        for name, numbers in (json.loads(constants) if constants else {}).items()
    }


@functools.lru_cache(maxsize=1)
def _nf4_middles() -> Tensor:
    table = torch.tensor(_NF4, dtype=torch.float64)
    return (table[1:] + table[:-1]) / 2.0


@merge_method(cut="tensor", workspace=10.0, name="quantise")
def _mapped(*tensors: Same, block: Integer = 64, constants: Text = "") -> Parts:
    """The tensor in NF4. Formula: the nearest of the table's numbers to x / max |x| of its block, two codes a byte."""
    values, base = _operands(tensors)
    flat = values.reshape(-1)
    size = -(-flat.numel() // block) * block
    blocks = torch.nn.functional.pad(flat, (0, size - flat.numel())).reshape(-1, block)
    largest = blocks.abs().amax(1)
    safe = torch.where(largest > 0.0, largest, torch.ones_like(largest))
    codes = torch.bucketize(blocks / safe[:, None], _nf4_middles().to(flat)).reshape(-1)[: flat.numel()]
    codes = torch.nn.functional.pad(codes, (0, flat.numel() % 2))
    packed = (codes[0::2] * 16 + codes[1::2]).to(flat.dtype)
    halves = (safe[:, None] / 16.0).expand_as(blocks).reshape(-1)[: flat.numel()]
    lost = _lost(flat, None if base is None else base.reshape(-1), halves)
    table = torch.tensor(_NF4, dtype=flat.dtype, device=flat.device)
    return {
        "weight": packed.reshape(-1, 1),
        "absmax": largest,
        "quant_map": table,
        LOST: lost,
        **_told(constants, values),
    }


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@merge_method(cut="tensor", workspace=12.0, name="quantise")
def _packed(*tensors: Same, turned: Integer = 0, constants: Text = "") -> Parts:
    """The tensor in MXFP4. Formula: the nearest number of E2M1 to x / 2^e, with e that of the largest of 32 less 2."""
    values, base = _operands(tensors)
    rows = values.transpose(-1, -2).contiguous() if turned else values
    blocks = rows.reshape(-1, 32)
    largest = blocks.abs().amax(1)
    _, exponent = torch.frexp(largest)
    shared = torch.where(largest > 0.0, exponent - 3, torch.full_like(exponent, -127)).clamp(-127, 127)
    small = torch.ldexp(blocks, -shared[:, None])
    table = torch.tensor(_E2M1, dtype=torch.float64, device=values.device)
    codes = torch.bucketize(small.abs().double(), (table[1:] + table[:-1]) / 2.0)
    codes = codes + 8 * (small < 0.0)
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(values.dtype)
    gap = torch.where(small.abs() < 2.0, 0.25, torch.where(small.abs() < 4.0, 0.5, 1.0)).to(values.dtype)
    halves = torch.ldexp(gap, shared[:, None])
    like = None if base is None else (base.transpose(-1, -2).contiguous() if turned else base).reshape(blocks.shape)
    lost = _lost(blocks, like, halves)
    stored = (*rows.shape[:-1], rows.shape[-1] // 32, 16) if turned else (*rows.shape[:-1], rows.shape[-1] // 2)
    scale = (shared + 127).to(values.dtype).reshape(*rows.shape[:-1], rows.shape[-1] // 32)
    return {"weight": packed.reshape(stored), "scale": scale, LOST: lost, **_told(constants, values)}


@merge_method(cut="tensor", workspace=10.0, name="quantise")
def _gguf(*tensors: Same, kind: Integer = 8) -> Parts:
    """The tensor in a quantisation of GGUF, by the package ``gguf``. Formula: of Q8_0, x / (max |x| of 32 / 127)."""
    from remelt.formats.gguf import gguf_library

    values, base = _operands(tensors)
    library = gguf_library("quantised tensors")
    rows = values.reshape(-1, values.shape[-1]).float().cpu()
    type_ = library.GGMLQuantizationType(kind)
    stored = library.quants.quantize(rows.numpy(), type_)
    lost = _lost(rows, None if base is None else base.reshape(rows.shape).float().cpu(), _gguf_halves(rows, type_))
    return {"weight": torch.from_numpy(stored).reshape(*values.shape[:-1], -1).to(values.dtype), LOST: lost}


def _gguf_halves(rows: Tensor, kind: Any) -> Tensor:
    """Half a step, as the largest of a block of 32 tells it: what blocks of blocks hold is a little coarser."""
    width = rows.shape[-1]
    bits = {"Q8_0": 127.0, "Q5_0": 16.0, "Q5_1": 31.0, "Q4_0": 8.0, "Q4_1": 15.0}.get(kind.name, 8.0)
    largest = rows.reshape(-1, 32).abs().amax(1, keepdim=True)
    return (largest / bits / 2.0).expand(-1, 32).reshape(-1, width)


def quantiser(kind: str) -> Method[..., Any]:
    """The method that stores tensors in a way: ``scaled``, ``nf4``, ``mxfp4`` or ``gguf``."""
    known: dict[str, Method[..., Any]] = {"scaled": _scaled, "nf4": _mapped, "mxfp4": _packed, "gguf": _gguf}
    return known[kind]
