"""Bytes and seconds, read from and written for people."""

from __future__ import annotations

import re
from fractions import Fraction

from remelt.errors import OptionError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_AMOUNT = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes from ``"4GiB"`` (binary), ``"4GB"`` (decimal) or ``"4096"``.

    >>> parse_bytes("4GiB"), parse_bytes("1.5k")
    (4294967296, 1500)
    """
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2].lower() not in _FACTORS:
        raise OptionError(f"{text!r} is not an amount of bytes", hint="write a number and a unit, as in 512MiB or 4GB")
    return int(Fraction(match[1]) * _FACTORS[match[2].lower()])


def format_bytes(count: int) -> str:
    """A size for people, in binary units.

    >>> format_bytes(512), format_bytes(3 * 2**30)
    ('512 B', '3.00 GiB')
    """
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{count} B" if unit == "B" else f"{amount:.0f} {unit}" if amount >= 100 else f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} TiB"


def format_seconds(seconds: float) -> str:
    """A duration for people.

    >>> format_seconds(0.25), format_seconds(75), format_seconds(7384)
    ('0.2 s', '1 min 15 s', '2 h 03 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
