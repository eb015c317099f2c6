"""The check of specifications: what it reports, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from remelt.alignment.checking import CheckReport, Tensors, check_numerically, check_specification, check_statically
from remelt.archs.axis_groups import AxisGroup, Level, Window
from remelt.errors import RefusedError

HIDDEN = AxisGroup(
    "hidden",
    (Level("channel", 8),),
    (Window("up.weight", 0, ("channel",)), Window("up.bias", 0, ("channel",)), Window("down.weight", 1, ("channel",))),
)
PIXELS = AxisGroup("pixels", (Level("channel", 4, fixed=True),), (Window("up.weight", 1, ("channel",)),))
CLASSES = AxisGroup("classes", (Level("channel", 3, fixed=True),), (Window("down.weight", 0, ("channel",)),))
GROUPS = (HIDDEN, PIXELS, CLASSES)
SPOILED = AxisGroup("hidden", HIDDEN.levels, HIDDEN.windows[:-1])


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up.weight": (8, 4), "up.bias": (8,), "down.weight": (3, 8)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} | {"steps": torch.tensor(7)}


def network(given: Tensors) -> tuple[Tensor, ...]:
    """Two layers, in float64, as the check asks."""
    images = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)
    assert given["steps"].dtype == torch.int64
    return (torch.relu(images @ given["up.weight"].T + given["up.bias"]) @ given["down.weight"].T,)


def test_a_sound_specification_passes() -> None:
    report = check_specification("a network", GROUPS, tensors(), network)
    assert report.passed
    assert report.broken == ()
    assert list(report.alone) == ["hidden"]
    assert report.worst == ("hidden", report.alone["hidden"])
    assert report.together < 1e-14


def test_a_group_that_changes_the_outputs_is_named() -> None:
    report = check_numerically((SPOILED, PIXELS), tensors(), network)
    assert not report.passed
    assert report.broken == ("hidden",)
    assert report.worst[1] == report.together > 0.01


def test_all_at_once_may_be_tried_without_each_alone() -> None:
    report = check_numerically((SPOILED,), tensors(), network, alone=False)
    assert (report.alone, report.worst, report.broken) == ({}, ("", 0.0), ())
    assert not report.passed


def test_other_seeds_try_other_permutations() -> None:
    errors = {check_numerically((SPOILED,), tensors(), network, seed=seed).together for seed in range(3)}
    assert len(errors) == 3
    again = check_numerically((SPOILED,), tensors(), network, seed=1)
    assert again == check_numerically((SPOILED,), tensors(), network, seed=1)


@pytest.mark.parametrize("output", [math.nan, 0.0])
def test_outputs_that_tell_nothing_do_not_pass(output: float) -> None:
    report = check_numerically(GROUPS, tensors(), lambda given: (network(given)[0] * output,))
    assert report.together == math.inf
    assert not report.passed


def test_a_function_without_outputs_does_not_pass() -> None:
    assert not check_numerically(GROUPS, tensors(), lambda given: ()).passed


def test_the_worst_of_several_outputs_counts() -> None:
    report = check_numerically((SPOILED,), tensors(), lambda given: (torch.ones(3), *network(given)))
    assert report.together == check_numerically((SPOILED,), tensors(), network).together


def test_groups_are_broken_in_the_order_of_what_they_change() -> None:
    assert CheckReport({"a": 1e-3, "b": 1e-15, "c": 0.5}, 0.6).broken == ("c", "a")


def refusal(groups: tuple[AxisGroup, ...], given: dict[str, Tensor]) -> str:
    with pytest.raises(RefusedError) as refused:
        check_specification("a network", groups, given, network)
    return str(refused.value)


def test_a_specification_that_lacks_an_axis_is_refused_by_name() -> None:
    assert refusal((SPOILED, PIXELS, CLASSES), tensors()) == (
        "the axis groups of a network fail their check: "
        "classes: 'down.weight' has 8 elements of axis 1 that no group has\n"
        "hint: a model whose parts are not all known cannot be aligned; nothing was written"
    )


def test_of_many_faults_the_first_are_told() -> None:
    with pytest.raises(RefusedError) as refused:
        check_statically("nothing known", (), {f"layer{number}": (2, 2) for number in range(4)})
    assert refused.value.message.endswith("'layer2' has 2 elements of axis 0 that no group has; and 3 more")


def test_a_specification_that_changes_the_function_is_refused_by_the_names_of_its_groups() -> None:
    own = AxisGroup("own", HIDDEN.levels, HIDDEN.windows[-1:])
    report = check_numerically((SPOILED, own), tensors(), network)
    first, second = report.broken
    assert refusal((SPOILED, own, PIXELS, CLASSES), tensors()) == (
        f"the axis groups of a network fail their check: {first} changes the outputs by {report.alone[first]:.1e}; "
        f"{second} changes the outputs by {report.alone[second]:.1e}\n"
        "hint: permutations may change them by 1e-10 at most"
    )


def test_groups_that_break_it_only_together_are_refused_as_such() -> None:
    first, second = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([3.0, 9.0, 27.0, 81.0])
    order = torch.arange(4, dtype=torch.float64)

    def moved_both(given: Tensors) -> tuple[Tensor, ...]:
        return (1 + ((given["a"] - first) @ order) * ((given["b"] - second) @ order),)

    groups = [AxisGroup(name, (Level("channel", 4),), (Window(name, 0, ("channel",)),)) for name in "ab"]
    with pytest.raises(RefusedError) as refused:
        check_specification("a pair", groups, {"a": first, "b": second}, moved_both)
    assert "a pair fail their check: all groups at once change the outputs by " in refused.value.message
