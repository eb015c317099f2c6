"""Programs for the native executor, written down shortly, and how bits are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from remelt.engine import native

needs_native = pytest.mark.skipif(not native.available(), reason=f"native executor {native.capability()}")
CAPABILITIES = native.capabilities() if native.available() else ("absent",)

KINDS = {0: torch.float32, 1: torch.float64}
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BEFORE = 5
"""Bytes before a tensor in its buffer, so that its address is as odd as an address can be."""


def instruction(
    name: str,
    out: int = 0,
    a: int = 0,
    b: int = 0,
    c: int = 0,
    *,
    kind: int = 0,
    flags: int = 0,
    extra: str | int | None = None,
) -> list[int]:
    """One instruction; ``extra`` is a stored type by name, or a number."""
    return [
        native.OPERATIONS[name],
        kind,
        out,
        a,
        b,
        c,
        flags,
        native.TYPES[extra] if isinstance(extra, str) else extra or 0,
    ]


def program(*instructions: list[int], **counts: int) -> native.Program:
    """A checked program of 8 registers, one input and one output unless said otherwise."""
    counts = {"registers": 8, "numbers": 0, "inputs": 1, "outputs": 1} | counts
    return native.Program(np.array(instructions, dtype=np.uint16).reshape(-1, 8), **counts)


def raw(tensor: torch.Tensor, before: int = BEFORE) -> memoryview:
    """A tensor's bytes at an odd address."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return memoryview(bytes(before) + data)[before:]


class Output:
    """Where a program stores, at an odd address, between guards that must stay."""

    def __init__(self, dtype: torch.dtype, count: int) -> None:
        self.dtype = dtype
        self._size = count * dtype.itemsize
        self._data = bytearray(b"\xa5" * (self._size + 2 * 64 + BEFORE))

    @property
    def memory(self) -> memoryview:
        """What the program writes."""
        return memoryview(self._data)[64 + BEFORE : 64 + BEFORE + self._size]

    @property
    def tensor(self) -> torch.Tensor:
        """What was written, once nothing lies beside it."""
        assert self._data[: 64 + BEFORE] == b"\xa5" * (64 + BEFORE)
        assert self._data[64 + BEFORE + self._size :] == b"\xa5" * 64
        return torch.frombuffer(bytearray(self.memory) or bytearray(8), dtype=self.dtype)[
            : self._size // self.dtype.itemsize
        ]


def run_one(code: native.Program, tensors: list[torch.Tensor], dtype: torch.dtype, *numbers: float) -> torch.Tensor:
    """The only output of a program over whole tensors."""
    output = Output(dtype, len(tensors[0]))
    native.run(code, list(numbers), [raw(tensor) for tensor in tensors], [output.memory], len(tensors[0]))
    return output.tensor


def assert_same(found: torch.Tensor, expected: torch.Tensor, *given: torch.Tensor) -> None:
    """Equal bit for bit; of NaN it is not said which."""
    integers = INTEGERS[expected.dtype.itemsize]
    nan = expected.to(torch.float64).isnan()
    assert torch.equal(found.to(torch.float64).isnan(), nan)
    different = (found.view(integers) != expected.view(integers)) & ~nan
    places = different.nonzero().flatten()[:3].tolist()
    facts = [(found[i].item(), expected[i].item(), *[tensor[i].item() for tensor in given]) for i in places]
    assert not places, f"found, expected, operands: {facts}"


def special(kind: int) -> torch.Tensor:
    """Values that arithmetic treats apart, 32 of them."""
    dtype = KINDS[kind]
    info = torch.finfo(dtype)
    edge = [
        0.0,
        info.smallest_normal,
        info.tiny / 4,
        info.max,
        float("inf"),
        1.0,
        1.0 + info.eps,
        0.5,
        0.5 - info.eps / 4,
    ]
    others = [3.0, 0.1, 1e-30, 1e30, info.eps, 65520.0]
    values = torch.tensor(edge + others, dtype=dtype)
    nan = torch.tensor([float("nan"), 2.0**-24], dtype=dtype)
    return torch.cat([values, -values, nan])


def crossed(kind: int, count: int) -> list[torch.Tensor]:
    """Every combination of special values: a multiple of 64 of them."""
    return [axis.flatten() for axis in torch.meshgrid(*[special(kind)] * count, indexing="ij")]


def patterns(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Values of random bits."""
    drawn: npt.NDArray[Any] = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(drawn).view(dtype)
