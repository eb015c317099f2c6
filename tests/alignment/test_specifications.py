"""Specifications of known archs on models that run: permuting them changes nothing, and mistakes are seen."""

from __future__ import annotations

import itertools
import random

import pytest
from spoiled import model, movable, one_of_each_structure, with_a_window_of_another, with_other, with_two_joined
from spoiled import without_a_window as without

from remelt.alignment.checking import check_numerically
from remelt.alignment.instances import INSTANCES
from remelt.archs.axis_groups import AxisGroup, Window, faults

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ARCHS = sorted(INSTANCES)
SEEN = 1e-6
"""A relative change that no rounding in float64 explains."""


def error(arch: str, *groups: AxisGroup) -> float:
    """What permuting only these does to the outputs."""
    instance, _ = model(arch)
    return check_numerically(groups, instance.tensors, instance.function, alone=False).together


@pytest.mark.parametrize("arch", ARCHS)
def test_all_groups_at_once_leave_the_outputs_as_they_are(arch: str) -> None:
    instance, groups = model(arch)
    report = check_numerically(groups, instance.tensors, instance.function, seed=1, alone=False)
    assert report.passed
    assert report.together < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_each_group_by_itself_leaves_the_outputs_as_they_are(arch: str) -> None:
    instance, groups = model(arch)
    report = check_numerically(groups, instance.tensors, instance.function, seed=2)
    assert report.passed
    assert len(report.alone) == len(movable(groups))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_groups_of_an_instance_have_all_its_axes(arch: str) -> None:
    instance, groups = model(arch)
    assert list(faults(groups, instance.shapes)) == []


@pytest.mark.parametrize("arch", ARCHS)
def test_a_dropped_window_is_seen_by_both_checks(arch: str) -> None:
    instance, groups = model(arch)
    for group in one_of_each_structure(groups):
        spoiled = without(group)
        assert any(
            said.startswith(group.name) or "no group has" in said
            for said in faults(with_other(groups, spoiled), instance.shapes)
        )
        assert error(arch, spoiled) > SEEN, group.name


@pytest.mark.parametrize("arch", ARCHS)
def test_two_of_a_level_taken_for_one_are_seen(arch: str) -> None:
    _, groups = model(arch)
    joined = [one for group in one_of_each_structure(groups) if (one := with_two_joined(group)) is not None]
    if not joined:
        assert {group.structure for group in movable(groups)} <= {"free", "cells", "experts", "heads"}
        pytest.skip("there are no two heads or groups of equal rank to be taken for one")
    for one in joined:
        assert error(arch, one) > SEEN, one.name


@pytest.mark.parametrize("arch", ARCHS)
def test_two_groups_joined_by_a_window_are_seen(arch: str) -> None:
    instance, groups = model(arch)
    pairs = itertools.combinations((group for group in movable(groups) if len(group.windows) > 1), 2)
    joined = next(both for pair in pairs if (both := with_a_window_of_another(*pair)) is not None)
    assert list(faults(with_other(groups, *joined), instance.shapes)) == []
    assert error(arch, *joined) > SEEN


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_a_window_that_is_dropped_from_any_group_is_seen(arch: str) -> None:
    instance, groups = model(arch)
    chosen = random.Random(0)
    for group in movable(groups):
        place = chosen.randrange(len(group.windows))
        spoiled, dropped = without(group, place), group.windows[place]
        if dropped.axis < 2:  # on further ones, shapes do not tell channels from a kernel's places
            assert list(faults(with_other(groups, spoiled), instance.shapes)), dropped
        if not is_idle(dropped):
            assert error(arch, spoiled) > SEEN, dropped


def is_idle(window: Window) -> bool:
    """Whether the tensor changes nothing: a bias of keys, or queries of a text that SD3's last block does not put out.

    The former adds the same number to all weights of a query, which its softmax takes away.
    """
    idle = "joint_blocks.2.context_block.attn" in window.key and window.offset == 0 and "ln_k" not in window.key
    return "qk" in window.levels and (idle or window.key.endswith("bias"))
