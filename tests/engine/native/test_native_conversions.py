"""Every stored type is read and rounded as torch does it, and what is not finite is noticed."""

from __future__ import annotations

import pytest
import torch
from assembly import (
    INTEGERS,
    KINDS,
    TYPES,
    Output,
    assert_same,
    instruction,
    needs_native,
    patterns,
    program,
    raw,
    run_one,
)

from remelt.core.checksum import checksum
from remelt.engine import native

pytestmark = [needs_native, pytest.mark.usefixtures("capability")]

NARROW = ("F16", "BF16", "F8_E4M3", "F8_E5M2")
STORED = {0: "F32", 1: "F64"}


def every(name: str) -> torch.Tensor:
    """All values of a narrow type."""
    integers = INTEGERS[TYPES[name].itemsize]
    return torch.arange(256 ** TYPES[name].itemsize, dtype=torch.int32).to(integers).view(TYPES[name])


def awkward(kind: int) -> torch.Tensor:
    """Around every value of every narrow type: itself, the halves between two, and their neighbours."""
    dtype = KINDS[kind]
    found = []
    for name in NARROW:
        exact = every(name).to(torch.float64)
        exact = exact[exact.isfinite()].unique()
        found += [exact, (exact[1:] + exact[:-1]) / 2]
    around = torch.cat(found).to(dtype).unique()
    infinity = torch.tensor(float("inf"), dtype=dtype)
    neighbours = [around, torch.nextafter(around, infinity), torch.nextafter(around, -infinity)]
    largest = torch.tensor([465.0, 480.0, 65504.0, 65519.996, 65520.0, 61440.0, 3.4e38, float("inf"), float("nan")])
    values = torch.cat([*neighbours, largest.to(dtype), -largest.to(dtype), patterns(dtype, 2**16, 7)])
    return torch.cat([values, values[: -len(values) % 64]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NARROW)
def test_every_value_of_a_narrow_type_is_read_as_torch_reads_it(name: str, kind: int) -> None:
    code = program(
        instruction("load", 0, 0, kind=kind, extra=name), instruction("store", 0, 0, kind=kind, extra=STORED[kind])
    )
    assert_same(run_one(code, [every(name)], KINDS[kind]), every(name).to(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TYPES)
def test_values_are_rounded_to_a_stored_type_as_torch_rounds_them(name: str, kind: int) -> None:
    values = awkward(kind)
    code = program(
        instruction("load", 0, 0, kind=kind, extra=STORED[kind]), instruction("store", 0, 0, kind=kind, extra=name)
    )
    assert_same(run_one(code, [values], TYPES[name]), values.to(TYPES[name]), values)
    code = program(
        instruction("load", 0, 0, kind=kind, extra=STORED[kind]),
        instruction("round", 1, 0, kind=kind, extra=name),
        instruction("store", 0, 1, kind=kind, extra=STORED[kind]),
    )
    expected = values.to(TYPES[name]).to(KINDS[kind])
    assert_same(run_one(code, [values], KINDS[kind]), expected, values)


@pytest.mark.parametrize("name", ["F32", "F64"])
def test_wide_types_are_read_into_either_kind(name: str) -> None:
    values = patterns(TYPES[name], 5003, 3)
    for kind in KINDS:
        code = program(
            instruction("load", 0, 0, kind=kind, extra=name), instruction("store", 0, 0, kind=kind, extra=STORED[kind])
        )
        assert_same(run_one(code, [values], KINDS[kind]), values.to(KINDS[kind]), values)


@pytest.mark.parametrize("name", TYPES)
def test_a_stored_value_that_is_not_finite_is_noticed_wherever_it_stands(name: str) -> None:
    dtype = TYPES[name]
    code = program(
        instruction("load", 0, 0, kind=1, extra=name),
        instruction("load", 1, 1, kind=0, extra=name),
        instruction("store", 0, 0, kind=1, extra=name),
        instruction("store", 1, 1, kind=0, extra=name),
        inputs=2,
        outputs=2,
    )
    count = 1024 + 77
    largest = torch.tensor(448.0 if name == "F8_E4M3" else torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    calm = largest.expand(count).contiguous()
    places = [Output(dtype, count), Output(dtype, count)]

    def found(first: torch.Tensor, second: torch.Tensor) -> native.Report:
        return native.run(code, [], [raw(first), raw(second)], [place.memory for place in places], count)

    if name != "F64":  # whose largest is infinite in float32
        assert found(calm, calm)[:2] == ((), ())
    finite = torch.ones(count).to(dtype)
    for bad in (float("nan"), float("inf"), float("-inf")):
        if name == "F8_E4M3" and bad == bad:
            continue  # it has no infinities
        for place in (0, 1, 15, 16, 1023, 1024, 1088, count - 1):
            hurt = finite.clone()
            hurt[place] = bad
            assert found(hurt, finite)[:2] == ((0,), (0,))
            assert found(finite, hurt)[:2] == ((1,), (1,))
            assert native.inspect(raw(hurt), native.TYPES[name]) == (False, checksum(raw(hurt)))
    assert native.inspect(raw(calm), native.TYPES[name]) == (True, checksum(raw(calm)))


def test_a_result_that_overflows_its_type_is_noticed() -> None:
    code = program(instruction("load", 0, 0, extra="F32"), instruction("store", 0, 0, extra="F16"))
    output = Output(torch.float16, 3)
    report = native.run(code, [], [raw(torch.tensor([1.0, 65520.0, 2.0]))], [output.memory], 3)
    assert (report.loads, report.stores) == ((), (0,))
    assert output.tensor.tolist() == [1.0, float("inf"), 2.0]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4095, 2**15, 2**15 + 8, 2**17 + 5])
@pytest.mark.parametrize("start", [0, 8, 2**15 - 8, 2**40])
def test_checksums_agree_with_those_of_the_core(length: int, start: int) -> None:
    data = patterns(torch.uint8, length, 5).numpy().tobytes()
    assert native.inspect(data, native.TYPES["OPAQUE"], start) == (True, checksum(memoryview(data), start))


@pytest.mark.parametrize("name", TYPES)
def test_a_store_tells_the_checksum_of_what_it_stored(name: str) -> None:
    code = program(
        instruction("load", 0, 0, extra="F32"),
        instruction("store", 0, 0, extra=name, flags=native.WITH_CHECKSUM),
        instruction("store", 1, 0, extra=name),
        outputs=2,
    )
    for count in (1, 64, 1023, 9001):
        for start in (0, 8, 4096 * 3 + 16):
            outputs = [Output(TYPES[name], count), Output(TYPES[name], count)]
            memories = [output.memory for output in outputs]
            report = native.run(code, [], [raw(torch.randn(count))], memories, count, start=start)
            assert report.checksums == (checksum(memories[0], start * TYPES[name].itemsize), 0)
            assert memories[0] == memories[1]
