"""The public names: every one is there, listed, documented, and none is missing."""

from __future__ import annotations

import inspect

import pytest

import remelt
from remelt.methods import METHODS
from remelt.recipe.method import Method


def test_every_public_name_is_there_and_documented() -> None:
    for name in remelt.__all__:
        value = getattr(remelt, name)
        if not name.startswith("__"):
            assert inspect.getdoc(value), name


def test_the_list_is_sorted_and_complete() -> None:
    assert list(remelt.__all__) == sorted(remelt.__all__)
    assert set(remelt._HOME_OF) | {"__version__"} == set(remelt.__all__)


def test_every_merge_method_is_a_public_name() -> None:
    ours = {name for name, method in METHODS.items() if method.function.__module__.startswith("remelt.methods.")}
    public = {name for name in remelt.__all__ if isinstance(getattr(remelt, name), Method)}
    assert public == ours


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'mrege'"):
        remelt.mrege  # noqa: B018
