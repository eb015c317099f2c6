"""What tests of specifications share: small models with their axis groups, and mistakes that may be made in them."""

from __future__ import annotations

import functools
from dataclasses import replace

from remelt.alignment.instances import INSTANCES
from remelt.alignment.instances.instance import Instance
from remelt.archs.axes.draft import EXPERT, QUERY
from remelt.archs.axes.find import axis_groups
from remelt.archs.axis_groups import AxisGroup

Groups = tuple[AxisGroup, ...]


@functools.cache
def model(arch: str) -> tuple[Instance, Groups]:
    """The smallest instance of an arch and its axis groups, made once."""
    instance = INSTANCES[arch]()
    return instance, axis_groups(instance.arch, instance.shapes, instance.heads)


def movable(groups: Groups) -> list[AxisGroup]:
    """Those that may be permuted."""
    return [group for group in groups if not group.is_fixed]


def one_of_each_structure(groups: Groups) -> list[AxisGroup]:
    """The widest group with several windows of every structure: free, cells, groups, heads, experts."""
    several = sorted((group for group in movable(groups) if len(group.windows) > 1), key=lambda group: group.size)
    return list({group.structure: group for group in several}.values())


def with_other(groups: Groups, *others: AxisGroup) -> Groups:
    """The groups with others in place of those of the same names."""
    by_name = {group.name: group for group in others}
    return tuple(by_name.get(group.name, group) for group in groups)


def without_a_window(group: AxisGroup, place: int = -1) -> AxisGroup:
    """A group that lacks one of its windows."""
    kept = list(group.windows)
    del kept[place]
    return replace(group, windows=tuple(kept))


def with_two_joined(group: AxisGroup) -> AxisGroup | None:
    """Two neighbouring heads, two groups of a GroupNorm, or two experts taken for one, as with a wrong count of them.

    None where the group has no such levels, or an odd number of them.
    """
    first, *others = group.levels
    if not others or first.size % 2 or first.name == EXPERT:
        return None
    inner = [level.name for level in others if first.name in level.below and level.name != QUERY]
    wider = [replace(level, size=2 * level.size) if level.name in inner else level for level in others]
    return replace(group, levels=(replace(first, size=first.size // 2), *wider))


def with_a_window_of_another(group: AxisGroup, other: AxisGroup) -> tuple[AxisGroup, AxisGroup] | None:
    """Two groups of the same levels, the first joined with the last window of the second, which nothing static shows.

    None where their levels differ.
    """
    if group.levels != other.levels:
        return None
    return replace(group, windows=(*group.windows, other.windows[-1])), without_a_window(other)
