"""In what order the axes of a model are read: as permutations say, or so that it resembles another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remelt.recipe.node import Model


class HeldPermutations:
    """Permutations in memory, for `permute` in the place of a file: one is told from another by identity."""

    def __repr__(self) -> str:
        return f"permutations at {id(self)}"


@dataclass(frozen=True)
class PermutedBy:
    """That the axes of a model are permuted as a file says, or with ``inverse`` so that this is undone.

    ``held`` are permutations in memory, which no file has.
    """

    name: str
    sha256: str | None = None
    inverse: bool = False
    held: HeldPermutations | None = None


@dataclass(frozen=True, eq=False, repr=False)
class AlignedTo:
    """That the axes of a model are permuted to resemble those of ``reference``.

    ``start`` is where the search begins; with ``crossing``, groups of several components are permuted, too; with
    ``rotations``, heads of attention are rotated after it.
    """

    reference: Model
    start: str = "both"
    crossing: bool = False
    rotations: bool = False

    def _told(self) -> tuple[object, ...]:
        one = self.reference
        held = None if one.tensors is None else id(one.tensors)
        return one.name, one.sha256, one.arch, held, one.permuted, self.start, self.crossing, self.rotations

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AlignedTo) and self._told() == other._told()

    def __hash__(self) -> int:
        return hash(self._told())

    def __repr__(self) -> str:
        return f"AlignedTo{self._told()!r}"
