"""How many heads an attention has, which the shapes of its tensors do not tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from remelt.errors import RefusedError


@dataclass(frozen=True, slots=True)
class HeadRule:
    """The heads of every attention of a part: ``count`` of them, or as many as have ``size`` channels each.

    ``queries`` heads of queries share one head of keys and values; none says that the shapes tell it.

    >>> HeadRule(count=8).heads(320), HeadRule(size=64).heads(320)
    (8, 5)
    """

    count: int | None = None
    size: int | None = None
    queries: int | None = None

    def heads(self, width: int) -> int:
        """The heads of an attention with ``width`` channels in all of them; `RefusedError` where they do not divide."""
        divisor = self.count or self.size
        if not divisor or width % divisor:
            raise RefusedError(
                f"an attention of {width} channels cannot have {self}",
                hint="say how many heads it has, or how wide they are",
            )
        return self.count or width // divisor

    def __str__(self) -> str:
        if self.count:
            return f"{self.count} heads"
        return f"heads of {self.size} channels" if self.size else "heads of no known number"


Heads = Mapping[str, HeadRule]
"""Head rules by the part of the model that they are of: ``unet``, ``vae``, ``text``, ``vision``, ``model``."""
