"""No program and no call makes the native executor reach outside of what it was given."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from assembly import instruction, needs_native, program
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.engine import native

LOAD = (0, 0, 0, 0, 0, 0, 0, 1)


def code(*lines: list[int] | tuple[int, ...], **counts: int) -> native.Program:
    return program(*[list(line) for line in lines], **({"registers": 2, "outputs": 0} | counts))


REFUSED = {
    "an unknown operation": (lambda: code((999, 0, 0, 0, 0, 0, 0, 0)), "instruction 0 (unknown) has code 999"),
    "an unknown kind": (lambda: code((0, 2, 0, 0, 0, 0, 0, 0)), "instruction 0 (load) has kind 2"),
    "unknown flags": (lambda: code((0, 0, 0, 0, 0, 0, 16, 0)), "has flags 16, of which some are unknown"),
    "an unknown type": (lambda: code((0, 0, 0, 0, 0, 0, 0, 6)), "has stored type 6, but there are 6"),
    "no such input": (lambda: code(instruction("load", 0, 1, extra="F16")), "reads input 1, but there are 1"),
    "no such register": (lambda: code(instruction("load", 2, 0, extra="F16")), "writes register 2, but there are 2"),
    "no such operand": (lambda: code(LOAD, instruction("neg", 0, 2)), "takes register 2 as a, but there are 2"),
    "no such number": (
        lambda: code(LOAD, instruction("add", 0, 0, 0, flags=2)),
        "takes number 0 as b, but there are 0",
    ),
    "an empty register": (lambda: code(LOAD, instruction("fma", 0, 0, 0, 1)), "takes register 1 as c before anything"),
    "the other kind": (
        lambda: code(LOAD, instruction("neg", 1, 0, kind=1)),
        "takes register 0 as a, but that holds the other kind",
    ),
    "widening to float32": (lambda: code(LOAD, instruction("widen", 0, 0)), "makes float64: its kind is 1"),
    "narrowing to float64": (lambda: code(LOAD, instruction("narrow", 0, 0, kind=1)), "makes float32: its kind is 0"),
    "rounding to no type": (lambda: code(LOAD, [*instruction("round")[:7], 9]), "has stored type 9"),
    "no such output": (
        lambda: code(LOAD, instruction("store", 1, 0, extra="F16"), outputs=1),
        "instruction 1 (store) writes output 1, but there are 1",
    ),
    "an idle output": (lambda: code(LOAD, outputs=1), "nothing is stored to output 0"),
    "an idle accumulator": (lambda: code(LOAD, accumulators=1), "nothing is added to accumulator 0"),
    "no such accumulator": (
        lambda: code(LOAD, instruction("reduce_sum", 1, 0), accumulators=1),
        "adds to accumulator 1, but there are 1",
    ),
    "two for an accumulator": (
        lambda: code(LOAD, *[instruction("reduce_sum", 0, 0)] * 2, accumulators=1),
        "adds to accumulator 0, which has another instruction",
    ),
    "no such histogram": (lambda: code(LOAD, instruction("histogram_upper", 0, 0)), "counts into histogram 0"),
    "an idle histogram": (lambda: code(LOAD, histograms=1), "nothing is counted into histogram 0"),
    "two for a histogram": (
        lambda: code(LOAD, *[instruction("histogram_upper", 0, 0)] * 2, histograms=1),
        "counts into histogram 0, which has another instruction",
    ),
    "too wide a window": (
        lambda: code(LOAD, instruction("histogram_window", 0, 0, 0, flags=2, extra=21), histograms=1, numbers=1),
        "has 2 to the power of 21 bins, but 20 is the most",
    ),
    "a histogram of a number": (
        lambda: code(LOAD, instruction("histogram_upper", 0, 0, flags=1), histograms=1, numbers=1),
        "counts a register's values",
    ),
    "a histogram of float64": (
        lambda: code(LOAD, instruction("histogram_upper", 0, 0, kind=1), histograms=1),
        "counts patterns of float32 only",
    ),
    "a histogram by a register": (
        lambda: code(LOAD, instruction("histogram_window", 0, 0, 0), histograms=1),
        "begins its window at a number",
    ),
    "too many registers": (lambda: code(LOAD, registers=65536), "a program has 0 to 65535 registers, but got 65536"),
    "fewer than no inputs": (lambda: code(LOAD, inputs=-1), "a program has 0 to 65536 inputs, but got -1"),
}


@needs_native
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_program_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


@needs_native
def test_instructions_are_whole_and_of_16_bits() -> None:
    with pytest.raises(ValueError, match="an instruction is 8 numbers of 16 bits, but got 14 bytes"):
        native.Program(np.zeros(7, dtype=np.uint16), 1, 0, 0, 0)
    with pytest.raises(ValueError, match=r"numbers of 16 bits without sign, but got elements of format 'h'"):
        native.Program(np.zeros(8, dtype=np.int16), 1, 0, 0, 0)  # type: ignore[arg-type]
    with pytest.raises((ValueError, BufferError), match="contiguous"):
        native.Program(np.zeros((2, 16), dtype=np.uint16)[:, ::2], 1, 0, 0, 0)


def halved() -> native.Program:
    return program(
        instruction("load", 0, 0, extra="F16"),
        instruction("mul", 0, 0, 0, flags=2),
        instruction("store", 0, 0, extra="F16", flags=native.WITH_CHECKSUM),
        numbers=1,
    )


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "a short input": (
        ([0.5], [bytes(7)], [bytearray(8)], 4),
        {},
        ValueError,
        "4 elements of 2 bytes are more than the 7",
    ),
    "a short output": (([0.5], [bytes(8)], [bytearray(7)], 4), {}, ValueError, "number 0 of the outputs"),
    "no input": (([0.5], [], [bytearray(8)], 4), {}, ValueError, "the program takes 1 inputs, but got 0"),
    "two outputs": (([0.5], [bytes(8)], [bytearray(8)] * 2, 4), {}, ValueError, "takes 1 outputs, but got 2"),
    "no number": (([], [bytes(8)], [bytearray(8)], 4), {}, ValueError, "the program takes 1 numbers, but got 0"),
    "numbers that are text": ((["x"], [bytes(8)], [bytearray(8)], 4), {}, TypeError, "must be real number"),
    "narrow numbers": (
        (np.zeros(1, np.float32), [bytes(8)], [bytearray(8)], 4),
        {},
        ValueError,
        "numbers are float64, but got elements of format 'f'",
    ),
    "an output to read": (([0.5], [bytes(8)], [bytes(8)], 4), {}, BufferError, "not writable"),
    "fewer than no elements": (([0.5], [bytes(8)], [bytearray(8)], -1), {}, OverflowError, ""),
    "more than fit": (([0.5], [bytes(8)], [bytearray(8)], 2**62), {}, ValueError, "fits the address space"),
    "an odd start": (
        ([0.5], [bytes(8)], [bytearray(8)], 4),
        {"start": 2},
        ValueError,
        "a call with checksums begins at a multiple of 4 elements, but got 2",
    ),
    "sums for none": (
        ([0.5], [bytes(8)], [bytearray(8)], 4),
        {"sums": np.zeros(1)},
        ValueError,
        "where the program has",
    ),
    "an unknown name": (
        ([0.5], [bytes(8)], [bytearray(8)], 4),
        {"begin": 2},
        TypeError,
        "run() has no argument 'begin'",
    ),
    "memory at nothing": (([0.5], [(0, 8)], [bytearray(8)], 4), {}, ValueError, "an address that is not 0"),
    "memory past the end": (([0.5], [(2**64 - 4, 8)], [bytearray(8)], 4), {}, ValueError, "ends before the last"),
    "memory of four": (([0.5], [(1, 2, 3, 4)], [bytearray(8)], 4), {}, ValueError, "a pair of address and length"),
    "a file that is too short": (([0.5], [(0, 0, 3)], [bytearray(8)], 4), {}, ValueError, "more than the 3 bytes"),
    "a file of no number": (([0.5], [(2**40, 0, 8)], [bytearray(8)], 4), {}, ValueError, "lie in an open file"),
    "a file past all ends": (([0.5], [(0, 2**63, 8)], [bytearray(8)], 4), {}, ValueError, "end where a file can"),
}


@needs_native
@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_is_refused(case: str) -> None:
    arguments, named, error, message = CALLS[case]
    with pytest.raises(error) as caught:
        native.run(halved(), *arguments, **named)
    assert message in str(caught.value)


@needs_native
def test_results_have_room_and_begin_with_a_chunk() -> None:
    sums = program(
        instruction("load", 0, 0, extra="F8_E5M2"), instruction("reduce_sum", 0, 0), outputs=0, accumulators=1
    )
    count = native.CHUNK + 1
    with pytest.raises(ValueError, match="2 chunks of 1 sums are more than 1 numbers"):
        native.run(sums, [], [bytes(count)], [], count, sums=np.zeros(1))
    with pytest.raises(ValueError, match="a call with sums begins at a multiple of 65536, but got 8"):
        native.run(sums, [], [bytes(count)], [], count, start=8, sums=np.zeros(2))
    with pytest.raises(ValueError, match="where the program has such, and only there"):
        native.run(sums, [], [bytes(count)], [], count)
    with pytest.raises(ValueError, match="at an address that is a multiple of 8"):
        native.run(sums, [], [bytes(8)], [], 8, sums=np.zeros(17, np.uint8)[1:9].view(np.float64))
    bins = program(
        instruction("load", 0, 0, extra="F32"), instruction("histogram_upper", 0, 0), outputs=0, histograms=1
    )
    with pytest.raises(ValueError, match="the histograms have 32768 counts, but there is room for 32767"):
        native.run(bins, [], [bytes(4)], [], 1, counts=np.zeros(2**15 - 1, dtype=np.int32))
    with pytest.raises(ValueError, match="counts are int32, but got elements of format 'l'"):
        native.run(bins, [], [bytes(4)], [], 1, counts=np.zeros(2**15, dtype=np.int64))


@needs_native
def test_inspection_takes_whole_elements_from_a_multiple_of_8() -> None:
    with pytest.raises(ValueError, match="elements of 4 bytes do not fill 6 bytes"):
        native.inspect(bytes(6), native.TYPES["F32"])
    with pytest.raises(ValueError, match="a part begins at a multiple of 8, but got 4"):
        native.inspect(bytes(8), native.TYPES["F32"], 4)
    with pytest.raises(ValueError, match="types are 0 to 6, but got 7"):
        native.inspect(bytes(8), 7)


@needs_native
def test_memory_may_be_named_by_its_address() -> None:
    data, out = np.arange(100, dtype=np.float16), np.zeros(100, dtype=np.float16)
    native.run(halved(), (0.5,), [(data.ctypes.data, data.nbytes)], ((out.ctypes.data, out.nbytes),), 100)
    assert np.array_equal(out, data / 2)
    assert native.inspect((out.ctypes.data, out.nbytes), native.TYPES["F16"]) == native.inspect(
        out, native.TYPES["F16"]
    )


@needs_native
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9) | st.integers(0, 65535), min_size=8, max_size=8), max_size=12),
    st.integers(0, 5),
    st.integers(0, 1100),
)
def test_hostile_programs_are_refused_or_run(lines: list[list[int]], size: int, count: int) -> None:
    counts = {"registers": size, "numbers": size, "inputs": size, "outputs": 0, "accumulators": 0}
    codes = np.array(lines, dtype=np.uint16).reshape(-1, 8)
    try:
        checked = native.Program(codes, **counts)
    except ValueError:
        return
    native.run(checked, [1.0] * size, [bytes(count * 8)] * size, [], count)


@needs_native
def test_only_a_capability_of_this_machine_is_used() -> None:
    with pytest.raises(ValueError, match="this machine has no capability 'avx1024'"):
        native.use("avx1024")
    assert native.capability() == native.capabilities()[0]
    assert native.capabilities()[-1] == "plain"


def test_the_environment_switches_it_off_and_torch_is_not_imported() -> None:
    script = "import sys, remelt.engine.native as n; print(n.available(), n.capability(), 'torch' in sys.modules)"

    def printed(value: str) -> str:
        environment = {**os.environ, "REMELT_NATIVE": value}
        return subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert printed("0") == "False absent: switched off by REMELT_NATIVE=0 False\n"
    loaded = printed("1")
    assert loaded.endswith(" False\n")
    if native.available():
        assert loaded == f"True {native.capability()} False\n"
