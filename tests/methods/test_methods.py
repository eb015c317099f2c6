"""What each method gives, with exact values; what it refuses, in its words."""

from __future__ import annotations

import doctest
import importlib
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor

import remelt as rm
from remelt.errors import RecipeError
from remelt.methods import METHODS

FAMILIES = sorted({method.function.__module__.rpartition(".")[2] for method in METHODS.values()})
NUMBERS = st.floats(-100, 100, width=32)


def exactly(found: Any, *due: float) -> bool:
    assert isinstance(found, Tensor)
    return torch.equal(found, tensor(due, dtype=found.dtype))


def test_importing_the_methods_does_not_import_torch() -> None:
    code = "import sys, remelt.methods; assert 'torch' not in sys.modules; remelt.methods.METHODS['add']"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' in sys.modules"], check=True)


def test_the_registry_holds_the_first_methods() -> None:
    assert set(METHODS) >= {
        *("add", "subtract", "scale", "multiply", "weighted_sum", "n_average", "add_difference", "slerp"),
        *("perpendicular_component", "clamp", "fallback", "cast", "pick_component", "omit_component"),
    }
    for name, method in METHODS.items():
        assert method.name == name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_examples_of_a_family_run(family: str) -> None:
    module = importlib.import_module(f"remelt.methods.{family}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_states_formula_spaces_and_source(name: str) -> None:
    lines = METHODS[name].documentation.splitlines()
    for word in ("Formula: ", "Spaces: ", "Source: "):
        assert any(line.startswith(word) for line in lines), word


def test_a_weighted_sum_moves_a_towards_b() -> None:
    a, b = tensor([0.0, 8.0]), tensor([4.0, 0.0])
    assert exactly(rm.weighted_sum.on(a, b, alpha=0.25), 1.0, 6.0)
    assert exactly(rm.weighted_sum.on(a, b), 2.0, 4.0)
    assert exactly(rm.weighted_sum.on(a, b, alpha=2.0), 8.0, -8.0)
    assert exactly(rm.weighted_sum.on(a, b, alpha=tensor([0.0, 1.0])), 0.0, 0.0)


@given(NUMBERS, NUMBERS)
def test_a_weighted_sum_ends_exactly_at_its_operands(a: float, b: float) -> None:
    x, y = tensor([a]), tensor([b])
    assert torch.equal(rm.weighted_sum.on(x, y, alpha=0.0), x)
    assert torch.equal(rm.weighted_sum.on(x, y, alpha=1.0), y)


def test_an_average_of_any_number_of_models() -> None:
    given_models = [tensor([1.0, 2.0]), tensor([3.0, 2.0]), tensor([8.0, -4.0]), tensor([0.0, 0.0])]
    assert exactly(rm.n_average.on(*given_models), 3.0, 0.0)
    assert exactly(rm.n_average.on(given_models[2]), 8.0, -4.0)
    with pytest.raises(RecipeError, match="n_average needs at least one model"):
        rm.n_average()


def test_a_difference_is_added_in_proportion() -> None:
    a, b = tensor([1.0, 1.0]), tensor([2.0, -2.0])
    assert exactly(rm.add_difference.on(a, b), 3.0, -1.0)
    assert exactly(rm.add_difference.on(a, b, alpha=-0.5), 0.0, 2.0)
    assert exactly(rm.add_difference.on(a, b, alpha=tensor([1.0, 0.0])), 3.0, 1.0)


def test_the_operators_are_methods() -> None:
    a, b = tensor([1.0, 2.0]), tensor([4.0, -3.0])
    assert exactly(rm.add.on(a, b), 5.0, -1.0)
    assert exactly(rm.subtract.on(a, b), -3.0, 5.0)
    assert exactly(rm.scale.on(a, -2.0), -2.0, -4.0)
    assert exactly(rm.scale.on(a, tensor([0.0, 1.0])), 0.0, 2.0)
    assert exactly(rm.multiply.on(a, b), 4.0, -6.0)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_slerp_of_unit_tensors_stays_on_the_circle(alpha: float) -> None:
    found = rm.slerp.on(tensor([1.0, 0.0]), tensor([0.0, 1.0]), alpha=alpha)
    assert torch.allclose(found, tensor([math.cos(alpha * math.pi / 2), math.sin(alpha * math.pi / 2)]), atol=1e-7)


def test_slerp_takes_norms_linearly() -> None:
    found = rm.slerp.on(tensor([2.0, 0.0]), tensor([0.0, 6.0]), alpha=0.5)
    assert torch.allclose(found, tensor([4.0, 4.0]) / math.sqrt(2.0))


@pytest.mark.parametrize(
    ("a", "b"),
    [((1.0, 2.0), (-1.0, -2.0)), ((1.0, 2.0), (2.0, 4.0)), ((0.0, 0.0), (1.0, 2.0)), ((0.0, 0.0), (0.0, 0.0))],
)
def test_slerp_is_a_line_where_no_arc_is_meant(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    found = rm.slerp.on(tensor(a), tensor(b), alpha=0.25)
    assert torch.allclose(found, torch.lerp(tensor(a), tensor(b), 0.25), rtol=1e-6)


def test_the_perpendicular_component_has_nothing_of_the_direction() -> None:
    assert exactly(rm.perpendicular_component.on(tensor([2.0, 0.0]), tensor([3.0, 4.0])), 0.0, 4.0)
    assert exactly(rm.perpendicular_component.on(tensor([1.0, 1.0]), tensor([5.0, 5.0])), 0.0, 0.0)
    assert exactly(rm.perpendicular_component.on(tensor([0.0, 0.0]), tensor([3.0, 4.0])), 0.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    assert abs(float((rm.perpendicular_component.on(a, b) * a).sum())) < 1e-9


def test_clamp_keeps_within_the_bounds() -> None:
    low, high = tensor([0.0, 3.0, 0.0]), tensor([1.0, 2.0, 1.0])
    assert exactly(rm.clamp.on(tensor([5.0, 2.5, -1.0]), low, high), 1.0, 2.5, 0.0)
    assert exactly(rm.clamp.on(tensor([5.0]), tensor([1.0])), 1.0)
    with pytest.raises(RecipeError, match="clamp needs at least one model"):
        rm.clamp("a")


def test_clamp_with_stiffness_keeps_nearer_to_the_mean_of_the_bounds() -> None:
    bounds = [tensor([value]) for value in (0.0, 4.0, 6.0, 10.0)]
    assert exactly(rm.clamp.on(tensor([99.0]), *bounds, stiffness=1.0), 6.0)
    assert exactly(rm.clamp.on(tensor([99.0]), *bounds, stiffness=0.5), 8.0)
    assert exactly(rm.clamp.on(tensor([-99.0]), *bounds, stiffness=1.0), 4.0)
    assert exactly(rm.clamp.on(tensor([-99.0]), *bounds, stiffness=0.5), 2.0)


def test_plumbing_changes_no_number() -> None:
    a, b = tensor([1.0, 1 / 3]), tensor([2.0, 2.0])
    assert rm.fallback.on(a, b) is a
    assert rm.cast.on(a, "fp16") is a
    assert rm.pick_component.on(a, "vae") is a
    assert rm.omit_component.on(a, "ema") is a


def test_a_cast_rounds_and_gives_the_result_its_type() -> None:
    third = rm.model({"w": tensor([1 / 3])})
    cast = rm.merge(rm.cast(third, "fp16"))["w"]
    assert cast.dtype == torch.float16
    assert torch.equal(cast, tensor([1 / 3]).half())


def test_fallback_and_components_choose_keys() -> None:
    both = {"encoder.layers.0.w": tensor([1.0]), "encoder.layers.1.w": tensor([1.0])}
    more = {**{key: value * 2 for key, value in both.items()}, "decoder.layers.0.w": tensor([2.0])}
    more["decoder.layers.1.w"] = tensor([2.0])
    joined = rm.merge(rm.model(both) | rm.model(more))
    assert {key: float(value) for key, value in joined.items()} == {
        **dict.fromkeys(both, 1.0),
        **dict.fromkeys(set(more) - set(both), 2.0),
    }
    assert set(rm.merge(rm.pick_component(rm.model(more), "decoder"))) == set(more) - set(both)
    assert set(rm.merge(rm.omit_component(rm.model(more), "decoder"))) == set(both)


MASS = [
    ("add", (1.0, 0.0), {}, 1.0),
    ("add", (0.5, 0.5), {}, 1.0),
    ("add", (None, None), {}, None),
    ("subtract", (1.0, 1.0), {}, 0.0),
    ("subtract", (1.0, 0.0), {}, 1.0),
    ("scale", (1.0,), {"alpha": 0.25}, 0.25),
    ("scale", (0.0,), {"alpha": rm.blocks(IN00=0.5)}, 0.0),
    ("scale", (None,), {}, None),
    ("multiply", (0.0, None), {}, 0.0),
    ("multiply", (None, 0.0), {}, 0.0),
    ("multiply", (None, None), {}, None),
    ("fallback", (0.0, 0.0), {}, 0.0),
    ("cast", (None,), {}, None),
]


@pytest.mark.parametrize(("name", "masses", "values", "due"), MASS)
def test_masses_follow_affine_arithmetic(name: str, masses: Any, values: Any, due: float | None) -> None:
    rule = METHODS[name].declaration.mass
    assert rule is not None
    assert rule(masses, values) == due


REFUSED = [
    ("add", (1.0, 1.0), {}, "a weight cannot be added to a weight: a delta is due"),
    ("add", (1.0, None), {}, "a param cannot be added to a weight or a delta, nor taken from one"),
    ("subtract", (None, 0.0), {}, "a param cannot be added to a weight or a delta, nor taken from one"),
    ("scale", (1.0,), {"alpha": rm.blocks(IN00=0.5)}, "only a delta can be scaled by block or by a mask"),
    ("scale", (1.0,), {}, "only a delta can be scaled by block or by a mask"),
    ("multiply", (0.0, 1.0), {}, "two models cannot be multiplied: one side must be a number or a param"),
    ("multiply", (1.0, None), {}, "only a delta can be multiplied by a param"),
    ("fallback", (1.0, 0.0), {}, "fallback needs operands of one space"),
]


@pytest.mark.parametrize(("name", "masses", "values", "message"), REFUSED)
def test_masses_that_cannot_be_meant_are_refused(name: str, masses: Any, values: Any, message: str) -> None:
    rule = METHODS[name].declaration.mass
    assert rule is not None
    with pytest.raises(RecipeError, match=message):
        rule(masses, values)
