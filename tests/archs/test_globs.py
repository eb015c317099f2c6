"""Globs are held against keys as `fnmatch` holds them."""

from __future__ import annotations

from fnmatch import fnmatchcase

from hypothesis import given
from hypothesis import strategies as st

from remelt.archs.arch import Globs
from remelt.archs.facts import layout


@given(globs=st.lists(st.text("ab.*?[]!", max_size=6), max_size=3), text=st.text("ab.[]\n", max_size=6))
def test_globs_match_what_fnmatch_matches(globs: list[str], text: str) -> None:
    assert Globs.of(tuple(globs)).match(text) == any(fnmatchcase(text, glob) for glob in globs)


def test_copied_keys_are_known_without_the_structure_of_the_others() -> None:
    keys = ["a.0.weight", "a.1.weight", "a.position_ids", "rope.inv_freq"]
    found = layout(keys, None)
    assert found.copied == {"a.position_ids", "rope.inv_freq"}
    assert {key for key in keys if found.facts(key).copied} == found.copied
