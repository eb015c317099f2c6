"""Inputs and outputs that are bytes of files: the same as in memory, at any offset, and what fails is told."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from assembly import instruction, needs_native, program
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remelt.core.checksum import checksum
from remelt.engine import native

pytestmark = [
    needs_native,
    pytest.mark.skipif(not native.available() or not native.FILES, reason="the system writes at no positions"),
]

STAGE = 2**18
"""Bytes that are written at once."""
MIX = program(
    instruction("load", 0, 0, extra="F16"),
    instruction("load", 1, 1, extra="F32"),
    instruction("lerp", 2, 0, 1, 0, flags=native.NUMBER_C),
    instruction("store", 0, 2, flags=native.WITH_CHECKSUM, extra="F16"),
    instruction("store", 1, 2, flags=native.WITH_CHECKSUM, extra="F64"),
    inputs=2,
    outputs=2,
    numbers=1,
) if native.available() else None  # fmt: skip
NUMBERS = [0.3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def values(count: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    drawn = np.random.default_rng(count)
    return drawn.standard_normal(count).astype(np.float16), drawn.standard_normal(count).astype(np.float32)


def written(path: Path, size: int, content: bytes = b"", offset: int = 0) -> int:
    """An open file of that size, with some content at an offset and guards everywhere else."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.write(descriptor, b"\x5a" * size)
    os.pwrite(descriptor, content, offset)
    return descriptor


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(0, 3000) | st.integers(2**15 - 2, 2**15 + 2) | st.integers(2**17 - 600, 2**17 + 600),
    offset=st.integers(0, 9000) | st.integers(STAGE - 5000, STAGE + 5),
    mapped=st.booleans(),
)
@example(count=2**17, offset=0, mapped=False)
@example(count=2**18 + 7, offset=STAGE - 1, mapped=False)
@example(count=2**16 + 512, offset=STAGE - 1024, mapped=True)
def test_files_at_any_offset_hold_what_memory_would(count: int, offset: int, mapped: bool, folder: Path) -> None:
    a, b = values(count)
    expected = [bytearray(2 * count), bytearray(8 * count)]
    by_memory = native.run(MIX, NUMBERS, [a.tobytes(), b.tobytes()], expected, count)
    descriptors = [
        written(folder / "a", 2 * count + offset, a.tobytes(), offset),
        written(folder / "b", 4 * count, b.tobytes()),
        written(folder / "f16", offset + 2 * count + 100),
        written(folder / "f64", offset + 8 * count + 100),
    ]
    try:
        inputs = [(descriptors[0], offset, 2 * count), b.tobytes() if mapped else (descriptors[1], 0, 4 * count)]
        outputs = [(descriptors[2], offset, 2 * count), (descriptors[3], offset, 8 * count)]
        report = native.run(MIX, NUMBERS, inputs, outputs, count)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert report[:3] == by_memory[:3]
    for name, data, place in zip(("f16", "f64"), expected, report.checksums, strict=True):
        found = (folder / name).read_bytes()
        assert found[offset:-100] == bytes(data)
        assert checksum(memoryview(data)) == place
        assert set(found[:offset] + found[-100:]) == {0x5A}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_told_as_the_system_tells_it() -> None:
    a, b = values(5000)
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left on device") as told:
            outputs = [(descriptor, 0, 10000), bytearray(40000)]
            native.run(MIX, NUMBERS, [a.tobytes(), b.tobytes()], outputs, 5000)
    finally:
        os.close(descriptor)
    assert told.value.filename == "output"


def test_an_input_that_was_cut_short_is_told(folder: Path) -> None:
    b = values(50_000)[1]
    descriptor = written(folder / "short", 99_998)
    try:
        with pytest.raises(EOFError, match="an input file ends before its last element"):
            inputs = [(descriptor, 0, 100_000), b.tobytes()]
            native.run(MIX, NUMBERS, inputs, [bytearray(100_000), bytearray(400_000)], 50_000)
    finally:
        os.close(descriptor)


def test_a_closed_input_is_told(folder: Path) -> None:
    b = values(10)[1]
    descriptor = os.open(folder / "closed", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="Bad file descriptor") as told:
            native.run(MIX, NUMBERS, [(descriptor, 0, 20), b.tobytes()], [bytearray(20), bytearray(80)], 10)
    finally:
        os.close(descriptor)
    assert told.value.filename == "input"


def test_files_are_written_in_pieces_at_multiples_of_their_size(folder: Path) -> None:
    count, offset = 2**19, STAGE // 2 + 1000
    a, b = values(count)
    descriptor = written(folder / "pieces", offset + 2 * count)
    try:
        calls = writes()
        native.run(
            MIX, NUMBERS, [a.tobytes(), b.tobytes()], [(descriptor, offset, 2 * count), bytearray(8 * count)], count
        )
        calls = writes() - calls
    finally:
        os.close(descriptor)
    assert calls <= (offset + 2 * count) // STAGE + 1


def writes() -> int:
    """How often this process has written, by the system's count."""
    text = Path("/proc/self/io")
    if not text.exists():
        pytest.skip("the system counts no calls")
    return int(dict(line.split(": ") for line in text.read_text().splitlines())["syscw"])
