"""Axis groups by themselves: where windows lie, and what is wrong with a specification."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.archs.axes.draft import CHANNEL, Drafts
from remelt.archs.axis_groups import AxisGroup, Level, Window, faults, keys_of

HEADS = (Level("head", 2), Level("qk", 3, ("head",)), Level("value", 4, ("head",)))
FREE = (Level(CHANNEL, 4),)


@st.composite
def groups_with_a_window(draw: st.DrawFn) -> tuple[AxisGroup, Window]:
    """A chain of levels, each below all before it, and a packed window on all of them."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    names = [f"level{number}" for number in range(len(sizes))]
    levels = tuple(
        Level(name, size, tuple(names[:at])) for at, (name, size) in enumerate(zip(names, sizes, strict=True))
    )
    window = Window("w", 0, tuple(names), draw(st.integers(0, 3)), draw(st.integers(1, 3)))
    return AxisGroup("g", levels, (window,)), window


@given(groups_with_a_window())
def test_a_packed_window_takes_neighbouring_elements_from_its_offset_on(one: tuple[AxisGroup, Window]) -> None:
    group, window = one
    taken = (group.positions(window)[..., None] + np.arange(window.run)).ravel()
    size = window.run * math.prod(level.size for level in group.levels)
    assert taken.tolist() == list(range(window.offset, window.offset + size))
    assert group.size * window.run == size


@given(groups_with_a_window(), st.integers(0, 2), st.integers(0, 2))
def test_a_group_is_sound_only_where_it_has_each_element_once(
    one: tuple[AxisGroup, Window], before: int, after: int
) -> None:
    group, window = one
    end = window.offset + window.run * group.size
    shapes = {"w": (end + after,)}
    lacking = window.offset + after
    said = list(faults([group], shapes))
    if lacking and shapes["w"][0] > 1:
        assert said == [f"g: 'w' has {lacking} element{'s' * (lacking > 1)} of axis 0 that no group has"]
        rest = AxisGroup("rest", (Level("a", window.offset, fixed=True), Level("b", after, fixed=True)), tuple(
            Window("w", 0, (name,), start) for name, size, start in (("a", window.offset, 0), ("b", after, end)) if size
        ))  # fmt: skip
        assert list(faults([group, rest], shapes)) == []
    else:
        assert said == []


@given(groups_with_a_window())
def test_a_group_has_as_many_permutations_as_its_levels_allow(one: tuple[AxisGroup, Window]) -> None:
    group, _ = one
    count = 1
    for level in group.levels:
        count *= math.factorial(level.size) ** math.prod(group.shape(level.below))
    assert group.order() == pytest.approx(math.log(count))


def said(*groups: AxisGroup, **shapes: tuple[int, ...]) -> list[str]:
    return list(faults(groups, shapes))


def test_what_overlaps_is_a_fault() -> None:
    windows = (Window("w", 0, (CHANNEL,)), Window("w", 0, (CHANNEL,), offset=3))
    assert said(AxisGroup("g", FREE, windows), w=(7,)) == ["g: 'w' has 1 element of axis 0 that several windows have"]


def test_what_is_out_of_bounds_is_a_fault() -> None:
    group = AxisGroup("g", FREE, (Window("w", 0, (CHANNEL,), offset=1),))
    assert said(group, w=(4,))[0] == "g: 'w' has 4 elements on axis 0, but the window ends at 5"
    other = AxisGroup("g", FREE, (Window("w", 1, (CHANNEL,)),))
    assert said(other, w=(4,))[0] == "g: 'w' is [4]: it has no axis 1"


@pytest.mark.parametrize(
    ("levels", "window", "message"),
    [
        (FREE, Window("v", 0, (CHANNEL,)), "g: 'v' is not there"),
        (FREE, Window("w", 0, ("head",)), "g: the window on 'w' has a level head that the group has not"),
        (HEADS, Window("w", 0, ("qk",)), "g: the window on 'w' has level qk without head before it"),
        (
            (Level("qk", 4, ("head",)),),
            Window("w", 0, ()),
            "g: level qk is below head, which do not all stand before it",
        ),
        ((*FREE, *FREE), Window("w", 0, (CHANNEL,)), "g: two levels are named channel"),
        (
            (Level(CHANNEL, 4, cells=(2, 1)),),
            Window("w", 0, (CHANNEL,)),
            "g: the cells of level channel have 3 indices, but it has 4",
        ),
        (
            FREE,
            Window("w", 0, (CHANNEL,), strides=(1, 2)),
            "g: the window on 'w' has 2 strides for 1 levels",
        ),
    ],
)  # fmt: skip
def test_a_faulty_group_is_reported(levels: tuple[Level, ...], window: Window, message: str) -> None:
    assert said(AxisGroup("g", levels, (window,)), w=(4,))[0] == message


def test_two_groups_of_one_name_are_a_fault() -> None:
    group = AxisGroup("g", FREE, ())
    assert said(group, group) == ["two groups are named g"]


def test_items_are_tensors_that_differ_in_a_number_or_the_first_axis_of_one() -> None:
    levels = (Level("expert", 3), Level("hidden", 2, ("expert",)))
    apart, stacked = Window("e.{}.w", 0, ("expert", "hidden")), Window("all[{}]", 0, ("expert", "hidden"))
    group = AxisGroup("g", levels, (apart, stacked))
    assert keys_of(group, apart) == ("e.0.w", "e.1.w", "e.2.w")
    assert keys_of(group, stacked) == ("all",)
    shapes: dict[str, tuple[int, ...]] = {f"e.{number}.w": (2,) for number in range(3)}
    assert said(group, **shapes, all=(3, 2)) == []
    assert said(group, **shapes, all=(4, 2))[0] == "g: 'all' has 4 items, but expert has 3"


@pytest.mark.parametrize(
    ("levels", "structure"),
    [
        (FREE, "free"),
        ((Level(CHANNEL, 4, cells=(2, 2)),), "cells"),
        ((Level("group", 2), Level("member", 2, ("group",))), "groups"),
        (HEADS, "heads"),
        ((Level("expert", 2), Level("hidden", 2, ("expert",))), "experts"),
        ((Level(CHANNEL, 4, fixed=True),), "fixed"),
        ((Level(CHANNEL, 2, cells=(1, 1)),), "fixed"),
    ],
)
def test_a_group_is_called_by_its_structure(levels: tuple[Level, ...], structure: str) -> None:
    assert AxisGroup("g", levels, ()).structure == structure


@given(st.lists(st.tuples(st.sampled_from([2, 4, 8]), st.integers(0, 16)), min_size=1, max_size=3))
def test_no_cell_of_a_stream_is_divided_by_a_norm_that_reads_it(norms: list[tuple[int, int]]) -> None:
    """Norms have so many groups, of a signal in which the stream comes after so many other channels."""
    size = 16
    shapes = {f"norm{at}.weight": (64,) for at in range(len(norms))}
    drafts = Drafts(shapes)
    stream = drafts.free("stream", size)
    for at, (groups, offset) in enumerate(norms):
        stream.grouped_by(f"norm{at}", groups, offset)
    (group,) = drafts.finished()
    stretches = _stretches(group)
    assert sum(len(one) for one in stretches) == size
    for at, (groups, offset) in enumerate(norms):
        width = 64 // groups
        for stretch in stretches:
            assert len({(offset + channel) // width for channel in stretch}) == 1, norms[at]


def _stretches(group: AxisGroup) -> Iterable[range]:
    """What stays together: the members of a group, a cell, or all."""
    sizes = group.levels[0].cells or (group.levels[0].size,)
    if group.structure == "groups":
        sizes = (group.levels[1].size,) * group.levels[0].size
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
