"""Random numbers by position: the same for any tile size, number of threads, order or machine.

Each number is a pure function of (seed, method, key, stream, occurrence, element), by numpy's Philox generator: all but
the last make its key, the element its counter. A generator that carries state could not give that.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PER_BLOCK = 4
"""64-bit words that Philox makes of one counter value."""


@dataclass(frozen=True)
class Random:
    """The random numbers of a slice of one tensor, in one call of one method.

    ``offset`` is the slice's first element in the flattened tensor, ``size`` its number of elements. ``occurrence``
    tells the calls of one method with one seed apart, so that two models never get the same mask.

    >>> whole = Random(seed=1, method="dropout", key="x.weight", offset=0, size=10)
    >>> part = Random(seed=1, method="dropout", key="x.weight", offset=6, size=3)
    >>> bool((whole.uniform()[6:9] == part.uniform()).all())
    True
    """

    seed: int
    method: str
    key: str
    offset: int
    size: int
    occurrence: int = 0

    def uniform(self, stream: int = 0) -> NDArray[np.float64]:
        """Numbers in [0, 1), one an element, of shape ``(size,)``; each ``stream`` (an input's index) has its own."""
        import numpy as np  # not at the top: recipes are read and written without it

        return (self._words(stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self) -> NDArray[np.float64]:
        """Normal numbers, one an element, of shape ``(size,)``, by the transform of Box and Muller."""
        import numpy as np

        length, turn = self.uniform(0), self.uniform(1)
        return np.asarray(np.sqrt(-2.0 * np.log(1.0 - length)) * np.cos(2.0 * math.pi * turn))

    def _words(self, stream: int) -> NDArray[np.uint64]:
        import numpy as np

        numbers = [stream, self.occurrence] if self.occurrence else [stream]
        identity = "\0".join((str(self.seed), self.method, self.key, *map(str, numbers)))
        digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        philox = np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))
        block, skipped = divmod(self.offset, _PER_BLOCK)
        philox.advance(block)
        words = philox.random_raw(skipped + self.size)
        return np.asarray(words, dtype=np.uint64)[skipped:]
