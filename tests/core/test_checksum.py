"""Checksums add up: whatever the division, and as their definition says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.core.checksum import PIECE, PLACES, WORD, checksum, combined

PIECE_BYTES = PIECE * WORD


def defined(data: bytes, start: int = 0) -> int:
    """The definition, word by word, in whole numbers."""
    total = 0
    for begin in range(0, len(data), WORD):
        piece, within = divmod((start + begin) // WORD, PIECE)
        z = (piece + 1) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        word = int.from_bytes(data[begin : begin + WORD], "little")
        total += word * int(PLACES[within]) * ((z ^ z >> 31) | 1)
    return total % 2**64


def drawn(size: int) -> bytes:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 8, 3 * PIECE_BYTES + 5])
@pytest.mark.parametrize("start", [0, 8, PIECE_BYTES - 8, PIECE_BYTES, 5 * PIECE_BYTES + 16, 2**50])
def test_a_checksum_is_what_its_definition_says(size: int, start: int) -> None:
    data = drawn(size)
    assert checksum(memoryview(data), start) == defined(data, start)
    assert checksum(memoryview(b"." + data)[1:], start) == defined(data, start), "at an odd address"


def test_checksums_stay_what_they_are() -> None:
    data = memoryview(bytes(range(256)) * 1000)
    assert PLACES[:2].tolist() == [1935219594521208387, 14311493506466004437]
    assert f"{checksum(data):016x}" == "84b82211ee5364b0"
    assert f"{checksum(data[:100], 8):016x}" == "7a8a743c33fe8bb0"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3 * PIECE_BYTES), st.lists(st.integers(0, 3 * PIECE), max_size=5))
def test_parts_in_any_division_add_up_to_the_whole(size: int, cuts: list[int]) -> None:
    data = memoryview(drawn(size))
    places = sorted({0, size, *(cut * WORD for cut in cuts if cut * WORD < size)})
    parts = [checksum(data[begin:end], begin) for begin, end in itertools.pairwise(places)]
    assert sum(reversed(parts)) % 2**64 == checksum(data)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_changed_byte_changes_the_sum(data: bytes, more: st.DataObject) -> None:
    place = more.draw(st.integers(0, len(data) - 1))
    hurt = bytearray(data)
    hurt[place] ^= more.draw(st.integers(1, 255))
    assert checksum(memoryview(hurt)) != checksum(memoryview(data))


def test_words_that_trade_places_change_the_sum() -> None:
    data = drawn(4 * PIECE_BYTES)
    words = np.frombuffer(data, dtype="<u8")
    pieces = words.reshape(4, PIECE)[[1, 0, 2, 3]].tobytes()
    pair = words[[1, 0, *range(2, len(words))]].tobytes()
    assert len({checksum(memoryview(each)) for each in (data, pieces, pair)}) == 3


def test_a_part_begins_with_a_word() -> None:
    with pytest.raises(ValueError, match="a part begins at a multiple of 8, but got 4"):
        checksum(memoryview(bytes(8)), 4)


def test_many_checksums_become_one_in_any_order() -> None:
    assert combined({"a": 1, "b": 2}) == combined({"b": 2, "a": 1})
    assert combined({"a": 1, "b": 2}) != combined({"a": 2, "b": 1})
