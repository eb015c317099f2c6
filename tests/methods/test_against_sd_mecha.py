"""Each method beside that of sd-mecha of the same name, on random and structured tensors; where they part, why."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from remelt.methods import METHODS

EPSILON = torch.finfo(torch.float32).eps
SHAPES = ((), (0,), (1,), (131,), (16, 33), (4, 3, 3, 3), (200, 300))
ROUND_OFF = {
    "weighted_sum": (0, "the same operation"),
    "subtract": (0, "the same operation"),
    "clamp": (4, "sd-mecha takes the mean of the stacked bounds, remelt of their sum"),
    "add_difference": (2, "sd-mecha uses one fused operation, remelt a product and a sum"),
    "n_average": (8, "sd-mecha keeps a running mean, remelt adds up and divides once"),
    "ties_sum": (4, "sd-mecha adds a stack of tensors up, remelt one after the other"),
    "slerp": (64, "sd-mecha takes norms and products in float32, remelt in float64"),
    "perpendicular_component": (64, "sd-mecha takes the norm and the product in float32, remelt in float64"),
}
"""How many units in the last place of the largest operand the two may differ by, and why."""


@functools.cache
def theirs(name: str) -> Callable[..., Any]:
    """The plain function of sd-mecha's method."""
    sd_mecha = pytest.importorskip("sd_mecha")
    if name == "add_difference":  # the package's own name for it is a wrapper of nodes
        method = sd_mecha.extensions.merge_methods.resolve(name)
    else:
        method = getattr(sd_mecha, name)
    function: Callable[..., Any] = method.__wrapped__
    return function


def by_sd_mecha(name: str, *tensors: Tensor, **values: float) -> Tensor:
    """The result of sd-mecha's method: some take a mapping by key, all take numbers as tensors, but for clamp's."""
    numbers: dict[str, Any] = (
        dict(values) if name in ("clamp", "ties_sum") else {k: torch.tensor(v) for k, v in values.items()}
    )
    if name in ("weighted_sum", "n_average", "add_difference"):
        result = theirs(name)(*({"w": tensor.clone()} for tensor in tensors), **numbers, key="w")
    else:
        result = theirs(name)(*(tensor.clone() for tensor in tensors), **numbers)
    assert isinstance(result, Tensor)
    return result


def drawn(count: int, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def structured(count: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Random tensors of every shape, and such as lie in special ways to each other."""
    for shape in SHAPES:
        yield f"shape {shape}", drawn(count, shape)
    first, *others = drawn(count, (16, 33))
    for scale, name in ((1e-15, "tiny"), (1e15, "huge"), (1e-4, "as small as the steps of a fine-tune")):
        yield name, [tensor * scale for tensor in drawn(count, (16, 33), seed=1)]
    yield "equal", [first] * count
    yield "zero", [torch.zeros_like(first)] * count
    yield "first zero", [torch.zeros_like(first), *others]
    yield "second zero", [first, torch.zeros_like(first), *others[1:]]
    yield "opposite", [first * (-1.0) ** number for number in range(count)]
    yield "parallel", [first * (number + 1.0) for number in range(count)]
    yield "close", [first + 1e-3 * other for other in [torch.zeros_like(first), *others]]
    yield "of unlike size", [tensor * 10.0**number for number, tensor in enumerate([first, *others])]


INTENDED = {
    ("slerp", "opposite"): "there is no one arc between opposite tensors: sd-mecha divides by a sine of round-off",
    ("slerp", "shape ()"): "tensors of one element are parallel or opposite",
    ("slerp", "shape (1,)"): "as above",
    ("clamp", "parallel"): "where one bound is the mean of all, round-off decides on which side sd-mecha counts it",
}
"""Where the two are meant to differ, and why; the tests after the first say what remelt gives there."""
CASES = [
    *(("weighted_sum", 2, {"alpha": alpha}) for alpha in (0.0, 1e-10, 0.1, 0.3, 0.5, 0.7, 1.0, -0.5, 1.5)),
    *(("n_average", count, {}) for count in (1, 2, 3, 7)),
    *(("add_difference", 2, {"alpha": alpha}) for alpha in (0.0, 0.3, 1.0, -1.0, 2.0)),
    ("subtract", 2, {}),
    *(("slerp", 2, {"alpha": alpha}) for alpha in (0.1, 0.3, 0.5, 0.9)),
    ("perpendicular_component", 2, {}),
    *(("ties_sum", count, {"k": k}) for count in (1, 2, 3, 5) for k in (0.0, 0.2, 0.7, 1.0)),
    *(("clamp", count, {"stiffness": stiffness}) for count in (2, 3, 4, 6) for stiffness in (0.0, 0.3, 1.0)),
]


@pytest.mark.parametrize(("name", "count", "values"), CASES, ids=[f"{n}-{c}-{v}" for n, c, v in CASES])
def test_results_agree_with_sd_mecha_to_round_off(name: str, count: int, values: dict[str, float]) -> None:
    units, reason = ROUND_OFF[name]
    for what, tensors in structured(count):
        ours, due = METHODS[name].on(*tensors, **values), by_sd_mecha(name, *tensors, **values)
        assert ours.dtype == due.dtype == torch.float32
        assert ours.shape == due.shape
        if tensors[0].numel() and (name, what) not in INTENDED:
            gap, largest = gap_of(ours, due), max(float(tensor.abs().max()) for tensor in tensors)
            assert gap <= units * EPSILON * largest, f"{what}: {gap / (EPSILON * largest):.1f} units; {reason}"


def gap_of(found: Tensor, due: Tensor) -> float:
    return float((found.double() - due.double()).abs().max())


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("what", ["opposite", "parallel", "equal", "zero", "shape ()", "shape (1,)"])
def test_slerp_is_a_line_where_there_is_no_one_arc(what: str, alpha: float) -> None:
    a, b = dict(structured(2))[what]
    assert gap_of(METHODS["slerp"].on(a, b, alpha=alpha), torch.lerp(a, b, alpha)) <= 4 * EPSILON * float(
        torch.maximum(a.abs().max(), b.abs().max())
    )


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_slerp_of_close_tensors_is_nearer_to_the_truth_than_sd_mechas(alpha: float) -> None:
    a, b = dict(structured(2))["close"]
    truth = METHODS["slerp"].on(a.double(), b.double(), alpha=alpha)
    ours = gap_of(METHODS["slerp"].on(a, b, alpha=alpha), truth)
    assert ours <= 2 * EPSILON * float(a.abs().max())
    assert ours <= gap_of(by_sd_mecha("slerp", a, b, alpha=alpha), truth)


def test_clamp_counts_a_bound_that_is_the_mean_on_both_sides() -> None:
    bounds = [torch.tensor([value]) for value in (2.0, 4.0, 6.0)]
    for given, due in ((0.0, 4.0), (4.0, 4.0), (9.0, 4.0)):
        assert METHODS["clamp"].on(torch.tensor([given]), *bounds, stiffness=1.0).item() == due


@pytest.mark.parametrize(("name", "what"), INTENDED, ids=[f"{name} {what}" for name, what in INTENDED])
def test_every_intended_difference_is_one(name: str, what: str) -> None:
    gaps = []
    for count, values in ((count, values) for other, count, values in CASES if other == name):
        for label, tensors in structured(count):
            if label == what:
                gaps.append(gap_of(METHODS[name].on(*tensors, **values), by_sd_mecha(name, *tensors, **values)))
    assert max(gaps) > 64 * EPSILON
