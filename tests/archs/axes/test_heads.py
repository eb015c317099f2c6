"""How many heads an attention has."""

from __future__ import annotations

import pytest

from remelt.archs.axes.heads import HeadRule
from remelt.errors import RefusedError


@pytest.mark.parametrize(
    ("rule", "width", "heads"),
    [
        (HeadRule(count=8), 1280, 8),
        (HeadRule(size=64), 1280, 20),
        (HeadRule(count=1), 512, 1),
        (HeadRule(5, 64), 320, 5),
    ],
)
def test_a_rule_tells_the_heads_of_a_width(rule: HeadRule, width: int, heads: int) -> None:
    assert rule.heads(width) == heads


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (HeadRule(count=3), "an attention of 64 channels cannot have 3 heads"),
        (HeadRule(size=24), "an attention of 64 channels cannot have heads of 24 channels"),
        (HeadRule(), "an attention of 64 channels cannot have heads of no known number"),
    ],
)
def test_heads_that_do_not_divide_a_width_are_refused(rule: HeadRule, said: str) -> None:
    with pytest.raises(RefusedError) as refused:
        rule.heads(64)
    assert str(refused.value) == f"{said}\nhint: say how many heads it has, or how wide they are"
