"""The known names nearest to a mistyped one."""

from __future__ import annotations

from remelt.core.nearest import nearest, nearest_hint


def test_the_best_comes_first_whatever_the_case() -> None:
    assert nearest("ALPHA", ["alpha2", "alpha", "beta"])[0] == "alpha"
    assert nearest("in00", ["IN00", "OUT00"])[0] == "IN00"


def test_names_that_differ_only_by_case_are_told_once() -> None:
    assert nearest("delibrate", ["Deliberate", "deliberate"]) == ["Deliberate"]


def test_no_more_are_told_than_asked_for() -> None:
    known = [f"model{number}" for number in range(20)]
    assert len(nearest("model", known)) == 3
    assert len(nearest("model", known, count=1)) == 1


def test_nothing_is_told_where_nothing_resembles() -> None:
    assert nearest("xyz", ["alpha"]) == []
    assert nearest_hint("xyz", ["alpha"]) is None
    assert nearest_hint("xyz", []) is None


def test_the_hint_offers_all_of_them() -> None:
    assert nearest_hint("slrp", ["slerp"]) == "did you mean 'slerp'?"
    assert nearest_hint("ab", ["ac", "ad"]) is None
    assert nearest_hint("abcd", ["abce", "abcf"]) == "did you mean 'abcf' or 'abce'?"


def test_names_far_behind_the_best_are_not_offered() -> None:
    assert nearest("weigthed_sum", ["ties_sum", "weighted_sum"]) == ["weighted_sum"]
