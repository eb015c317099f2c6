"""Amounts of bytes and time, read from people and written for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.core.units import format_bytes, format_seconds, parse_bytes
from remelt.errors import OptionError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4GiB", 4 * 2**30),
        ("4 gib", 4 * 2**30),
        ("4Gi", 4 * 2**30),
        ("4GB", 4 * 10**9),
        ("4g", 4 * 10**9),
        ("1.5k", 1500),
        (" 0.5 MiB ", 2**19),
        ("512b", 512),
        ("2TiB", 2**41),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_amounts_are_read_in_decimal_and_binary_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 GiB free", "1e9", "4PiB", "4ib", "nan", ".5G", "9" * 5000, "٣"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="is not an amount of bytes\nhint: write a number and a unit, as in 512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (1023 * 1024, "1023 KiB"),
        (150 * 2**20, "150 MiB"),
        (6_938_078_334, "6.46 GiB"),
        (2**41, "2.00 TiB"),
        (5000 * 2**40, "5000.00 TiB"),
    ],
)
def test_sizes_are_written_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 2**60))
def test_a_written_size_is_near_to_the_size(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= 0.005 * count + 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (60, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (90_000, "25 h 00 min"),
    ],
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
