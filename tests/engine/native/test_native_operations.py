"""Every operation gives torch's bits, on values that arithmetic treats apart, with registers and with numbers."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from assembly import KINDS, assert_same, crossed, instruction, needs_native, patterns, program, run_one, special

from remelt.engine import native

pytestmark = [needs_native, pytest.mark.usefixtures("capability")]

STORED = {0: "F32", 1: "F64"}


def rooted(values: torch.Tensor) -> torch.Tensor:
    """Square roots to nearest: torch's own come from a library that misses that in one of 200."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.sqrt(values.numpy()))


UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "copy": torch.clone,
    "neg": torch.neg,
    "abs": torch.abs,
    "sqrt": rooted,
    "sign": torch.sign,
    "logical_not": torch.logical_not,
}
ARITHMETIC = ("add", "sub", "mul", "div", "minimum", "maximum", "lt", "le", "gt", "ge", "eq", "ne")
LOGIC = ("logical_and", "logical_or", "logical_xor")
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    name: getattr(torch, name) for name in (*ARITHMETIC, *LOGIC)
}


def loads(kind: int, count: int) -> list[list[int]]:
    return [instruction("load", place, place, kind=kind, extra=STORED[kind]) for place in range(count)]


def evaluated(
    name: str, kind: int, tensors: list[torch.Tensor], numbers: dict[int, float] | None = None
) -> torch.Tensor:
    """The operation on tensors; some operands are numbers instead."""
    numbers = numbers or {}
    flags = sum(1 << place for place in numbers)
    operands = [list(numbers).index(place) if place in numbers else place for place in range(len(tensors))]
    code = program(
        *loads(kind, len(tensors)),
        instruction(name, 5, *operands, kind=kind, flags=flags),
        instruction("store", 0, 5, kind=kind, extra=STORED[kind]),
        inputs=len(tensors),
        numbers=len(numbers),
    )
    return run_one(code, tensors, KINDS[kind], *numbers.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNARY)
def test_an_operation_on_one_gives_the_bits_of_torch(name: str, kind: int) -> None:
    for values in (special(kind).repeat(2), patterns(KINDS[kind], 4096, 1)):
        assert_same(evaluated(name, kind, [values]), UNARY[name](values).to(KINDS[kind]), values)
    for number in special(kind).tolist():
        expected = UNARY[name](torch.full((64,), number, dtype=KINDS[kind])).to(KINDS[kind])
        assert_same(evaluated(name, kind, [values[:64]], {0: number}), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BINARY)
def test_an_operation_on_two_gives_the_bits_of_torch(name: str, kind: int) -> None:
    drawn = [patterns(KINDS[kind], 4096, seed) for seed in (1, 2)]
    for a, b in (crossed(kind, 2), drawn):
        expected = BINARY[name](a, b).to(KINDS[kind])
        assert_same(evaluated(name, kind, [a, b]), expected, a, b)
        assert_same(evaluated(name, kind, [a[:77], b[:77]]), expected[:77], a, b)
    values = special(kind).repeat(2)
    for number in special(kind):
        full = number.expand(len(values)).contiguous()
        assert_same(
            evaluated(name, kind, [values, full], {1: number.item()}),
            BINARY[name](values, full).to(KINDS[kind]),
            values,
        )
        assert_same(
            evaluated(name, kind, [full, values], {0: number.item()}),
            BINARY[name](full, values).to(KINDS[kind]),
            values,
        )
        both = evaluated(name, kind, [full, full], {0: number.item(), 1: number.item()})
        assert_same(both, BINARY[name](full, full).to(KINDS[kind]))


def fused(kind: int, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The C library's fused multiply-add, an oracle that is always right."""
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    function, number = (library.fmaf, ctypes.c_float) if kind == 0 else (library.fma, ctypes.c_double)
    function.restype, function.argtypes = number, [number] * 3
    found = [function(*each) for each in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    return torch.tensor(found, dtype=KINDS[kind])


def chosen(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.where(c != 0, a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fma", "lerp", "select"])
def test_an_operation_on_three_gives_the_bits_of_torch(name: str, kind: int) -> None:
    if name == "fma" and not ctypes.util.find_library("m"):
        pytest.skip("there is no C library for mathematics to compare with")
    operation = {"fma": lambda a, b, c: fused(kind, a, b, c), "lerp": torch.lerp, "select": chosen}[name]
    drawn = [patterns(KINDS[kind], 1024, seed) for seed in (1, 2, 3)]
    near = [torch.randn(1024, dtype=KINDS[kind], generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]
    for tensors in (crossed(kind, 3), drawn, near):
        expected = operation(*tensors)
        assert_same(evaluated(name, kind, tensors), expected, *tensors)
    values = near[0][:64]
    for number in (0.3, 0.5, 0.7, 1.0, -0.25, 0.0):
        for places in itertools.chain.from_iterable(itertools.combinations(range(3), count) for count in (1, 2, 3)):
            tensors = [torch.full_like(values, number) if place in places else values + place for place in range(3)]
            found = evaluated(name, kind, tensors, dict.fromkeys(places, number))
            assert_same(found, operation(*tensors), *tensors)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.3, 0.49999, 0.5, 0.7, 1.0, 1.5, -0.2])
def test_lerp_with_a_number_gives_the_bits_of_torch_on_halves(weight: float) -> None:
    a, b = (torch.randn(4096, generator=torch.Generator().manual_seed(seed)).half() for seed in (1, 2))
    code = program(
        instruction("load", 0, 0, extra="F16"),
        instruction("load", 1, 1, extra="F16"),
        instruction("lerp", 0, 0, 1, 0, flags=4),
        instruction("store", 0, 0, extra="F16"),
        inputs=2,
        numbers=1,
    )
    assert_same(run_one(code, [a, b], torch.float16, weight), torch.lerp(a, b, weight), a, b)


def test_a_register_is_widened_and_narrowed_in_place() -> None:
    values = torch.cat([special(0), patterns(torch.float32, 3000, 1)])
    code = program(
        instruction("load", 0, 0, extra="F32"),
        instruction("widen", 0, 0, kind=1),
        instruction("store", 0, 0, kind=1, extra="F64"),
    )
    assert_same(run_one(code, [values], torch.float64), values.double())
    code = program(
        instruction("load", 0, 0, kind=1, extra="F64"),
        instruction("narrow", 0, 0),
        instruction("store", 0, 0, extra="F32"),
    )
    wide = torch.cat([special(1), patterns(torch.float64, 3000, 1), values.double() * (1 + 2**-40)])
    assert_same(run_one(code, [wide], torch.float32), wide.float())


def test_a_number_is_rounded_to_the_kind_that_takes_it() -> None:
    third = 1 / 3
    code = program(
        instruction("widen", 0, 0, kind=1, flags=1),
        instruction("narrow", 1, 0, flags=1),
        instruction("store", 0, 0, kind=1, extra="F64"),
        instruction("store", 1, 1, extra="F32"),
        instruction("store", 2, 0, kind=1, flags=1, extra="F64"),
        inputs=0,
        numbers=1,
        outputs=3,
    )
    wide, narrow, plain = bytearray(8 * 33), bytearray(4 * 33), bytearray(8 * 33)
    native.run(code, [third], [], [wide, narrow, plain], 33)
    single = torch.tensor(third, dtype=torch.float32)
    assert torch.equal(torch.frombuffer(wide, dtype=torch.float64), single.double().expand(33))
    assert torch.equal(torch.frombuffer(narrow, dtype=torch.float32), single.expand(33))
    assert torch.equal(torch.frombuffer(plain, dtype=torch.float64), torch.full((33,), third, dtype=torch.float64))


@pytest.mark.parametrize("name", ["add", "fma", "lerp", "select"])
def test_an_operation_may_write_over_its_operands(name: str) -> None:
    count = 2 if name == "add" else 3
    tensors = [torch.randn(1500, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    expected = evaluated(name, 0, tensors)
    for place in range(count):
        code = program(
            *loads(0, count),
            instruction(name, place, 0, 1, 2),
            instruction("store", 0, place, extra="F32"),
            inputs=count,
        )
        assert_same(run_one(code, tensors, torch.float32), expected)
