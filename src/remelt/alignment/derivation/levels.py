"""The labels that are left, as levels: which are free, which stand below which, and how GroupNorms divide them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from remelt.alignment.derivation.labels import Label, scope_of
from remelt.alignment.derivation.stretches import Places, Stretch
from remelt.archs.axis_groups import Level


class Levels:
    """The levels of a module, by the places where labels lie."""

    def __init__(self, places: Places) -> None:
        self.places = places
        found: dict[Label, None] = {}
        for stretches in places.values():
            for stretch in stretches:
                labels = stretch.labels
                found.update(dict.fromkeys(labels))
                for label in labels:
                    if not label.touched or labels.count(label) > 1:
                        label.fixed = True  # nothing was computed with it; or it is there twice, one within another
        self.labels = list(found)
        self.above = {label: self._scope(label) for label in self.labels}
        self._keep_what_windows_tell()
        self._keep_a_tree()
        below = {one for label in self.labels if self.is_free(label) for one in self.above[label]}
        self.kept = [label for label in self.labels if self.is_free(label) or label in below]
        self._components = self._joined()

    def is_kept(self, label: Label) -> bool:
        """Whether a label is a level of a group: a free one, or one that a free one stands below."""
        return label in self._components

    def is_free(self, label: Label) -> bool:
        """Whether something of a label can be permuted."""
        return not label.fixed and label.size > 1 and set(self.cells(label)) != {1}

    def cells(self, label: Label) -> tuple[int, ...]:
        """The sizes of the stretches that GroupNorms leave of a label."""
        ends = {end for width, before in label.partitions for end in range(width - before, label.size, width)}
        cuts = [0, *sorted(ends), label.size]
        return tuple(stop - start for start, stop in pairwise(cuts))

    def members(self, label: Label) -> int | None:
        """The size of each group, where all GroupNorms divide a label alike and into whole groups."""
        if len(label.partitions) != 1:
            return None
        ((width, before),) = label.partitions
        return width if before == 0 and label.size % width == 0 else None

    def first_of(self, key: str) -> Label | None:
        """The label that is the whole of a tensor's first axis."""
        stretches = self.places.get((key, 0), [])
        if len(stretches) != 1 or len(stretches[0].factors) != 1:
            return None
        label = stretches[0].factors[0].label
        return None if label is None or label.partitions else label

    def chooser(self, key: str, axis: int, stretch: Stretch) -> Label | None:
        """The label of the first axis that labels in a stretch on another axis stand below."""
        first = self.first_of(key) if axis else None
        if first is None or not any(self.is_free(one) and first in self.above[one] for one in stretch.labels):
            return None
        return first

    def component(self, label: Label) -> int:
        """The number of the group that a label is in."""
        return self._components[label]

    def _scope(self, label: Label) -> set[Label]:
        known = set(self.labels)
        return {one for one in scope_of(label) or () if one in known and one is not label and one.size > 1}

    def _keep_what_windows_tell(self) -> None:
        for (key, axis), stretches in self.places.items():
            first = self.first_of(key) if axis else None
            for stretch in stretches:
                labels = set(stretch.labels)
                for label in labels:
                    self.above[label] &= labels | ({first} if first is not None else set())

    def _keep_a_tree(self) -> None:
        """Drop what would go in a circle, an earlier label standing above; then what does not go up to the top."""
        wanted = sorted(
            ((label, over) for label in self.labels for over in self.above[label]),
            key=lambda pair: (pair[1].number > pair[0].number, pair[0].number, pair[1].number),
        )
        self.above = {label: set() for label in self.labels}
        for label, over in wanted:
            if label not in self._upwards(over):
                self.above[label].add(over)
        changed = True
        while changed:
            changed = False
            for row in self.above.values():
                lacking = {over for over in row if not self.above[over] <= row}
                row -= lacking
                changed |= bool(lacking)

    def _upwards(self, label: Label) -> set[Label]:
        found, rest = {label}, [label]
        while rest:
            new = self.above[rest.pop()] - found
            found |= new
            rest.extend(new)
        return found

    def _joined(self) -> dict[Label, int]:
        """The number of a component for each label: those on one stretch, or one below another."""
        number = {label: place for place, label in enumerate(self.kept)}

        def merge(labels: Iterable[Label]) -> None:
            numbers = {number[label] for label in labels if label in number}
            if len(numbers) > 1:
                least = min(numbers)
                for label, one in number.items():
                    if one in numbers:
                        number[label] = least

        for label in self.kept:
            merge([label, *self.above[label]] if self.is_free(label) else [label])
        for stretches in self.places.values():
            for stretch in stretches:
                merge(stretch.labels)
        return number

    def of_group(self, labels: Iterable[Label]) -> tuple[tuple[Level, ...], dict[Label, tuple[Level, ...]]]:
        """The levels of a group, parents first, and those that stand for each label."""
        order = sorted(labels, key=lambda one: (len(self.above[one]), _RANKS.get(one.role, 9), one.number))
        names: dict[Label, tuple[str, ...]] = {}
        used: set[str] = set()
        for label in order:
            names[label] = tuple(unused(name, used) for name in self._names(label, order))
        levels: list[Level] = []
        found: dict[Label, tuple[Level, ...]] = {}
        for label in order:
            below = tuple(name for one in order if one in self.above[label] for name in names[one])
            found[label] = self._levels(label, names[label], below)
            levels += found[label]
        return tuple(levels), found

    def _levels(self, label: Label, names: tuple[str, ...], below: tuple[str, ...]) -> tuple[Level, ...]:
        members = self.members(label)
        if members is not None:
            group, member = names
            inner = (*below, group)
            return (
                Level(group, label.size // members, below, fixed=label.fixed),
                Level(member, members, inner, fixed=label.fixed),
            )
        cells = self.cells(label)
        return (Level(names[0], label.size, below, cells if len(cells) > 1 else (), label.fixed),)

    def _names(self, label: Label, order: list[Label]) -> tuple[str, ...]:
        if self.members(label) is not None:
            return ("group", "member")
        if len(order) == 1:
            return ("channel",)
        is_above = any(label in self.above[one] for one in order)
        if label.role == "head":
            return ("head" if is_above else "query",)
        if not label.role and any(one.role == "expert" for one in self.above[label]):
            return ("hidden",)
        return (label.role or ("block" if is_above else "channel"),)


_RANKS = {"expert": 0, "group": 0, "head": 0, "qk": 1, "value": 2}


def unused(name: str, used: set[str]) -> str:
    found, number = name, 2
    while found in used:
        found, number = f"{name}{number}", number + 1
    used.add(found)
    return found
