"""The vocabulary of specifications: groups that gain windows as a model's parts are walked through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from remelt.archs.axis_groups import AxisGroup, Level, Shapes, Window

CHANNEL = "channel"
HEAD, QUERY, QK, VALUE = "head", "query", "qk", "value"
GROUP, MEMBER = "group", "member"
EXPERT, HIDDEN = "expert", "hidden"
_OF_NORMS = ("weight", "bias", "running_mean", "running_var")


@dataclass
class Draft:
    """A group that is being written. Methods take modules by name; tensors that a model lacks are passed over."""

    name: str
    levels: tuple[Level, ...]
    shapes: Shapes
    crosses: str = ""
    windows: list[Window] = field(default_factory=list)
    partitions: list[tuple[int, int]] = field(default_factory=list)
    """Of a stream: the groups of each GroupNorm that reads it, as their size and how much of the first lies before."""
    _known: set[Window] = field(default_factory=set, repr=False, compare=False)

    def window(
        self,
        key: str,
        axis: int,
        levels: Sequence[str] = (),
        offset: int = 0,
        run: int = 1,
        strides: Sequence[int] = (),
    ) -> Draft:
        """A window, if the tensor is there; by default of all levels."""
        wanted = tuple(levels) or tuple(level.name for level in self.levels)
        one = Window(key, axis, wanted, offset, run, tuple(strides))
        if one.chooses and not one.is_stacked:
            present = one.key_of(0) in self.shapes
        else:
            present = one.tensor in self.shapes
        if present and one not in self._known:
            self._known.add(one)
            self.windows.append(one)
        return self

    def made_by(self, module: str, levels: Sequence[str] = (), offset: int = 0, run: int = 1) -> Draft:
        """The rows of a linear map or convolution, with its bias."""
        self.window(f"{module}.weight", 0, levels, offset, run)
        return self.window(f"{module}.bias", 0, levels, offset, run)

    def read_by(self, module: str, levels: Sequence[str] = (), offset: int = 0, run: int = 1) -> Draft:
        """The columns of a linear map or convolution."""
        return self.window(f"{module}.weight", 1, levels, offset, run)

    def normalised_by(self, module: str, levels: Sequence[str] = (), offset: int = 0) -> Draft:
        """The numbers of a normalisation, statistics included."""
        for name in _OF_NORMS:
            self.window(f"{module}.{name}", 0, levels, offset)
        return self

    def grouped_by(self, module: str, groups: int, offset: int = 0) -> Draft:
        """A GroupNorm, of which this stream is the part from ``offset`` on."""
        self.normalised_by(module, offset=offset)
        width = self.shapes[f"{module}.weight"][0] // groups
        self.partitions.append((width, offset % width))
        return self

    @property
    def size(self) -> int:
        """Indices of the first level, the whole of a stream."""
        return self.levels[0].size

    def finished(self) -> AxisGroup:
        """The group. A stream that GroupNorms read has groups where all divide it alike, cells where they differ."""
        # Groups of one channel each, and one that has the whole stream, allow what none would.
        partitions = {one for one in self.partitions if one[0] > 1 and len(self._divided(one)) > 1}
        if not partitions:
            return AxisGroup(self.name, self.levels, tuple(self.windows), self.crosses)
        cells = self._cells(partitions)
        if partitions == {(cells[0], 0)} and self.size % cells[0] == 0:
            levels = (Level(GROUP, len(cells)), Level(MEMBER, cells[0], below=(GROUP,)))
            regular = tuple(
                Window(one.key, one.axis, (GROUP, MEMBER), one.offset, one.run, one.strides) for one in self.windows
            )
            return AxisGroup(self.name, levels, regular, self.crosses)
        (level,) = self.levels
        return AxisGroup(self.name, (Level(level.name, level.size, cells=cells),), tuple(self.windows), self.crosses)

    def _divided(self, partition: tuple[int, int]) -> tuple[int, ...]:
        """Where the groups of one GroupNorm end in this stream."""
        width, before = partition
        return (*range(width - before, self.size, width), self.size)

    def _cells(self, partitions: Iterable[tuple[int, int]]) -> tuple[int, ...]:
        """The common refinement of the GroupNorms that read this stream."""
        ends = sorted({end for one in partitions for end in self._divided(one)})
        return tuple(end - start for start, end in zip((0, *ends), ends, strict=False))


class Drafts:
    """The groups of one model, in the order in which they are begun."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.all: list[Draft] = []

    def _begin(self, name: str, levels: tuple[Level, ...], crosses: str = "") -> Draft:
        self.all.append(Draft(name, levels, self.shapes, crosses))
        return self.all[-1]

    def free(self, name: str, size: int, crosses: str = "") -> Draft:
        """Channels that are permuted freely, as far as no GroupNorm reads them."""
        return self._begin(name, (Level(CHANNEL, size),), crosses)

    def fixed(self, name: str, size: int) -> Draft:
        """Channels that mean something outside: pixels, latents, words, classes."""
        return self._begin(name, (Level(CHANNEL, size, fixed=True),))

    def attention(
        self,
        name: str,
        heads: int,
        size: int,
        *,
        value_size: int | None = None,
        queries: int = 1,
        rotary: bool = False,
        shared_norm: bool = False,
    ) -> Draft:
        """The heads of an attention: ``heads`` of keys and values, each with ``queries`` of queries, ``size`` wide.

        Levels ``head``, ``query`` (where there are several), ``qk`` and ``value``. Rotary embeddings fix ``qk``; norms
        of queries and keys that all heads share have one ``qk`` for all.
        """
        levels = [Level(HEAD, heads)]
        if queries > 1:
            levels.append(Level(QUERY, queries, below=(HEAD,)))
        levels.append(Level(QK, size, below=() if shared_norm or rotary else (HEAD,), fixed=rotary))
        levels.append(Level(VALUE, value_size or size, below=(HEAD,)))
        return self._begin(name, tuple(levels))

    def of_levels(self, name: str, levels: tuple[Level, ...]) -> Draft:
        """A tree of levels of another kind."""
        return self._begin(name, levels)

    def experts(self, name: str, count: int, hidden: int) -> Draft:
        """Experts behind a router, each with hidden channels of its own: levels ``expert`` and ``hidden``."""
        return self._begin(name, (Level(EXPERT, count), Level(HIDDEN, hidden, below=(EXPERT,))))

    def finished(self) -> tuple[AxisGroup, ...]:
        """All groups that have windows."""
        return tuple(draft.finished() for draft in self.all if draft.windows)
