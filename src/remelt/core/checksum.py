"""Checksums of tensors that add up: any part in any order, by any thread, gives the same sum.

Each 64-bit word of a tensor is multiplied by an odd number that belongs to its place, and the products are added modulo
2^64. A word that changes, moves or is lost changes the sum; two changes hide each other with a chance of about 2^-64.
It guards against damage, at the speed of memory, not against forgery: for that there is SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

WORD = 8
PIECE = 2**15
"""Words for which the numbers of places are drawn; further pieces multiply them by a number of their own."""
PLACEHOLDER = "0" * 64
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_PLACES = np.random.Philox(key=np.array([1, _GOLDEN], dtype=np.uint64)).random_raw(PIECE) | np.uint64(1)


def checksum(data: memoryview, start: int = 0) -> int:
    """What bytes from an offset on add to their tensor's checksum; the offset is a multiple of 8.

    >>> whole = memoryview(bytes(range(24)))
    >>> checksum(whole) == (checksum(whole[16:], 16) + checksum(whole[:16])) % 2**64
    True
    """
    if start % WORD:
        raise ValueError(f"a part begins at a multiple of {WORD}, but got {start}")
    total, place = 0, start // WORD
    whole = len(data) // WORD * WORD
    words = np.frombuffer(data[:whole], dtype="<u8")
    begin = 0
    while begin < len(words):
        piece, within = divmod(place + begin, PIECE)
        end = min(begin + PIECE - within, len(words))
        part = int(np.dot(words[begin:end], _PLACES[within : within + end - begin]))
        total += part * _multiplier(piece)
        begin = end
    if whole < len(data):
        piece, within = divmod(place + len(words), PIECE)
        last = int.from_bytes(bytes(data[whole:]), "little")
        total += last * int(_PLACES[within]) * _multiplier(piece)
    return total & _MASK


def combined(checksums: Mapping[str, int]) -> str:
    """One checksum of many tensors by key, in hexadecimal, whatever their order.

    >>> combined({"a": 1, "b": 2}) == combined({"b": 2, "a": 1})
    True
    """
    digest = hashlib.sha256()
    for key in sorted(checksums):
        digest.update(f"{checksums[key]:016x}  {key}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _multiplier(piece: int) -> int:
    """An odd number for each piece: the steps of splitmix64."""
    z = (piece + 1) * _GOLDEN & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return (z ^ z >> 31) | 1
