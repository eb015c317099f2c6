"""What stands beside the weights that a specification walks through: running averages, schedules, strangers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from remelt.archs.arch import Arch, Globs
from remelt.archs.axis_groups import AxisGroup, Level, Shapes, Window, keys_of
from remelt.archs.facts import NEVER_MERGED


def with_averages(groups: Iterable[AxisGroup], shapes: Shapes, arch: Arch) -> tuple[AxisGroup, ...]:
    """The groups with the same windows on the running averages that a file keeps of its tensors (EMA)."""
    shadow = arch.shadow
    if shadow is None or not any(key.startswith(shadow.prefix) for key in shapes):
        return tuple(groups)

    def averages(window: Window) -> Iterator[Window]:
        for start in shadow.of:
            name = shadow.prefix + window.key.removeprefix(start).replace(".", "")
            if window.key.startswith(start) and name in shapes:
                yield replace(window, key=name)

    return tuple(
        replace(group, windows=(*group.windows, *(one for window in group.windows for one in averages(window))))
        for group in groups
    )


def left_as_they_are(groups: Iterable[AxisGroup], shapes: Shapes, arch: Arch | None) -> AxisGroup | None:
    """A fixed group of the tensors that no group has and that are no weights of the model.

    Those are what the arch says is never merged, and what is of none of its components. Others stay without a group,
    which the static check reports.
    """
    known = {key for group in groups for window in group.windows for key in keys_of(group, window)}
    strangers = [key for key in shapes if key not in known and (_is_beside(arch, key))]
    windows = [Window(key, axis, (str(size),)) for key in strangers for axis, size in enumerate(shapes[key])]
    if not windows:
        return None
    sizes = dict.fromkeys(size for key in strangers for size in shapes[key])
    return AxisGroup("beside", tuple(Level(str(size), size, fixed=True) for size in sizes), tuple(windows))


def _is_beside(arch: Arch | None, key: str) -> bool:
    if arch is None:
        return Globs.of(NEVER_MERGED).match(key)
    canonical = arch.canonical(key)
    return Globs.of((*NEVER_MERGED, *arch.copied)).match(canonical) or arch.component_of(canonical) is None
