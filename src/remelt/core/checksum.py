"""Checksums of tensors that add up: any part in any order, by any thread, gives the same sum.

Each 64-bit word of a tensor is multiplied by an odd number that belongs to its place, and the products are added modulo
2^64. A word that changes, moves or is lost changes the sum; two changes hide each other with a chance of about 2^-64.
It guards against damage, at the speed of memory, not against forgery: for that there is SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

WORD = 8
PIECE = 2**12
"""Words for which the numbers of places are drawn; further pieces multiply them by a number of their own."""
PLACEHOLDER = "0" * 64
HASH_PLACEHOLDER = "f" * 64
"""Where a header is to have the SHA-256 of what follows it."""
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
PLACES = np.random.Philox(key=np.array([1, _GOLDEN], dtype=np.uint64)).random_raw(PIECE) | np.uint64(1)
"""The odd numbers of a piece's places, 64 bits each: 32 KiB, which the first cache holds."""


def checksum(data: memoryview, start: int = 0) -> int:
    """What bytes from an offset on add to their tensor's checksum; the offset is a multiple of 8.

    >>> whole = memoryview(bytes(range(24)))
    >>> checksum(whole) == (checksum(whole[16:], 16) + checksum(whole[:16])) % 2**64
    True
    """
    if start % WORD:
        raise ValueError(f"a part begins at a multiple of {WORD}, but got {start}")
    place = start // WORD
    whole = len(data) // WORD * WORD
    words = np.frombuffer(data[:whole], dtype="<u8")
    head = min(-place % PIECE, len(words))
    pieces = (len(words) - head) // PIECE
    tail = head + pieces * PIECE
    total = _part(words[:head], place) + _part(words[tail:], place + tail)
    if pieces:
        # einsum multiplies and adds without a temporary, and twice as fast as a product of matrices of integers.
        sums = np.einsum("ij,j->i", words[head:tail].reshape(pieces, PIECE), PLACES)
        total += int(np.dot(sums, _multipliers((place + head) // PIECE, pieces)))
    if whole < len(data):
        last = np.array([int.from_bytes(bytes(data[whole:]), "little")], dtype="<u8")
        total += _part(last, place + len(words))
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


def _part(words: npt.NDArray[np.uint64], place: int) -> int:
    """What words within one piece add."""
    if not len(words):
        return 0
    piece, within = divmod(place, PIECE)
    return int(np.einsum("j,j->", words, PLACES[within : within + len(words)])) * int(_multipliers(piece, 1)[0])


@functools.lru_cache(2048)
def _multipliers(first: int, count: int) -> npt.NDArray[np.uint64]:
    """An odd number for each piece: the steps of splitmix64."""
    z = np.arange(first + 1, first + 1 + count, dtype=np.uint64) * np.uint64(_GOLDEN)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (z ^ z >> np.uint64(31)) | np.uint64(1)
