"""Comparing specifications: what they permute counts, not what they call it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remelt.alignment.comparison import same_groups
from remelt.archs.axis_groups import AxisGroup, Level, Window

HEADS = AxisGroup(
    "heads",
    (Level("head", 2), Level("value", 3, ("head",))),
    (Window("v.weight", 0, ("head", "value")), Window("o.weight", 1, ("head", "value"))),
)
EXPERTS = AxisGroup(
    "experts",
    (Level("expert", 2), Level("hidden", 3, ("expert",))),
    (
        Window("router.weight", 0, ("expert",)),
        Window("up[{}]", 0, ("expert", "hidden")),
        Window("down[{}]", 1, ("expert", "hidden")),
    ),
)
APART = replace(
    EXPERTS,
    windows=(
        Window("router.weight", 0, ("expert",)),
        Window("{}.up", 0, ("expert", "hidden")),
        Window("{}.down", 1, ("expert", "hidden")),
    ),
)
SHARED = AxisGroup(
    "shared",
    (Level("head", 2), Level("qk", 2), Level("value", 2, ("head",))),
    (Window("q", 0, ("head", "qk")), Window("v", 0, ("head", "value"))),
)
FREE = AxisGroup("free", (Level("channel", 4),), (Window("a", 0, ("channel",)), Window("b", 1, ("channel",))))
OTHER = AxisGroup("other", (Level("channel", 4),), (Window("c", 0, ("channel",)),))


@pytest.mark.parametrize("group", [HEADS, EXPERTS, APART, SHARED, FREE])
def test_a_group_is_the_same_as_itself_under_other_names(group: AxisGroup) -> None:
    names = {level.name: f"{level.name}2" for level in group.levels}
    levels = [
        replace(one, name=names[one.name], below=tuple(names[name] for name in one.below)) for one in group.levels
    ]
    windows = [replace(one, levels=tuple(names[name] for name in one.levels)) for one in reversed(group.windows)]
    assert same_groups([group], [AxisGroup("renamed", tuple(levels), tuple(windows))]) == []


def test_what_is_fixed_does_not_count() -> None:
    fixed = AxisGroup("fixed", (Level("channel", 9, fixed=True),), (Window("z", 0, ("channel",)),))
    levels = (Level("head", 2), Level("qk", 2, fixed=True), Level("value", 2, ("head",)))
    rotary = replace(SHARED, levels=levels)
    runs = replace(SHARED, levels=(levels[0], levels[2]), windows=(Window("q", 0, ("head",), run=2), SHARED.windows[1]))
    assert same_groups([fixed, rotary], [runs]) == []


def test_groups_may_be_split_where_nothing_ties_them() -> None:
    both = AxisGroup(
        "both",
        (Level("one", 4), Level("two", 4)),
        (Window("a", 0, ("one",)), Window("b", 1, ("one",)), Window("c", 0, ("two",))),
    )
    assert same_groups([both], [FREE, OTHER]) == []
    tied = replace(FREE, windows=(*FREE.windows, *OTHER.windows))
    assert same_groups([tied], [FREE, OTHER]) == [
        "free of the first and free and other of the second have 24 and 576 permutations"
    ]


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (
            HEADS,
            replace(HEADS, levels=(Level("head", 2), Level("value", 3))),
            ["heads of the first and heads of the second have 72 and 12 permutations"],
        ),
        (
            HEADS,
            replace(HEADS, windows=tuple(replace(window, strides=(1, 2)) for window in HEADS.windows)),
            ["heads of the first and heads of the second have as many permutations, but not the same"],
        ),
        (
            HEADS,
            replace(HEADS, windows=HEADS.windows[:1]),
            [
                "'o.weight', axis 1: 6 of 6 move in the first (heads) only",
                "heads of the first and heads of the second have as many permutations, but not the same",
            ],
        ),
        (
            replace(FREE, levels=(Level("channel", 4, cells=(1, 3)),)),
            replace(FREE, levels=(Level("channel", 4, cells=(3, 1)),)),
            [
                "'a', axis 0: 1 of 4 move in the first (free) only",
                "'b', axis 1: 1 of 4 move in the first (free) only",
                "'a', axis 0: 1 of 4 move in the second (free) only",
                "'b', axis 1: 1 of 4 move in the second (free) only",
                "free of the first and free of the second have as many permutations, but not the same",
            ],
        ),
        (
            EXPERTS,
            replace(EXPERTS, levels=(Level("expert", 2), Level("hidden", 3, ("expert",), cells=(1, 2)))),
            ["experts of the first and experts of the second have 72 and 8 permutations"],
        ),
    ],
)  # fmt: skip
def test_differences_are_told(one: AxisGroup, other: AxisGroup, said: list[str]) -> None:
    assert same_groups([one], [other]) == said


def test_windows_that_choose_among_tensors_are_not_those_of_one_tensor() -> None:
    found = same_groups([APART], [EXPERTS])
    assert "'0.up', itself: 1 of 1 move in the first (experts) only" in found
    assert "'up', axis 0: 2 of 2 move in the second (experts) only" in found
