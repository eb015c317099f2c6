"""Regions and permutations: beside sd-mecha, and supermerger's rule written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.core.random import Random
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.testing import MethodConformance

tensor_sum, top_k, randperm = METHODS["tensor_sum"], METHODS["top_k_tensor_sum"], METHODS["randperm"]

SHAPES = ((), (0,), (0, 4), (4, 0), (1,), (10,), (131,), (16, 33), (7, 3, 3, 3))
WIDTHS = (0.0, 0.1, 0.25, 0.5, 0.73, 1.0, 1.7, -0.2, -1.0)
OFFSETS = (0.0, 0.2, 0.5, 0.9, 1.0, 2.3, -0.4, -1.25)
INTENDED = {
    ("tensor_sum", "int"): "supermerger cuts rows down to whole numbers, sd-mecha and remelt round them",
    ("tensor_sum", "in place"): "sd-mecha writes into its inputs",
    ("top_k_tensor_sum", "float64"): "sd-mecha ranks magnitudes in float32 and compares them in float64",
}
"""Where remelt is meant to differ from others, and why; the tests say where that shows."""


def drawn(*shape: int, count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def theirs(name: str) -> Callable[..., Tensor]:
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.slicing")
    function = getattr(module, name).__wrapped__

    def call(a: Tensor, b: Tensor, **values: float) -> Tensor:
        result: Tensor = function(a.clone(), b.clone(), **values)
        return result

    return call


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_regions_agree_with_sd_mecha(width: float, offset: float) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            a, b = drawn(*shape, dtype=dtype)
            due = theirs("tensor_sum")(a, b, width=width, offset=offset)
            assert torch.equal(tensor_sum.on(a, b, width=width, offset=offset), due)


def by_supermerger(a: Tensor, b: Tensor, alpha: float, beta: float) -> Tensor:
    """Its rule for "tensor", row by row."""
    rows = len(a)
    if alpha + beta <= 1:
        taken = range(int(rows * beta), int(rows * (alpha + beta)))
    else:
        outside = range(int(rows * (alpha + beta - 1)), int(rows * beta))
        taken = [row for row in range(rows) if row not in outside]  # type: ignore[assignment]
    return torch.stack([b[row] if row in taken else a[row] for row in range(rows)])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_regions_of_whole_rows_are_those_of_supermerger(alpha: float, beta: float) -> None:
    for shape in ((8,), (16, 5), (4, 3, 3, 3)):
        a, b = drawn(*shape)
        assert torch.equal(tensor_sum.on(a, b, width=alpha, offset=beta), by_supermerger(a, b, alpha, beta))
    a, b = drawn(10)
    assert not torch.equal(tensor_sum.on(a, b, width=0.39), by_supermerger(a, b, 0.39, 0.0))  # 4 rows of 10, not 3


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_regions_of_columns_are_those_of_supermerger(alpha: float, beta: float) -> None:
    for shape in ((3, 104), (3, 104, 2, 2)):
        a, b = drawn(*shape)
        due = by_supermerger(a.transpose(0, 1), b.transpose(0, 1), alpha, beta).transpose(0, 1)
        assert torch.equal(tensor_sum.on(a, b, width=alpha, offset=beta, along="columns"), due)
    for shape in ((8,), (16, 100), (4, 3, 3, 3), ()):  # few columns, or none: rows in their stead
        a, b = drawn(*shape)
        rows = tensor_sum.on(a, b, width=alpha, offset=beta)
        assert torch.equal(tensor_sum.on(a, b, width=alpha, offset=beta, along="columns"), rows)


def test_regions_are_of_rows_or_of_columns() -> None:
    told = "tensor_sum: along is 'rows' or 'columns', but got 'lines'"
    with pytest.raises(RecipeError, match=told):
        rm.merge(tensor_sum({"w": torch.ones(3)}, {"w": torch.ones(3)}, along="lines"))
    with pytest.raises(RecipeError, match=told):
        tensor_sum.on(torch.ones(3), torch.ones(3), along="lines")


@settings(max_examples=100, deadline=None)
@given(width=st.floats(0.0, 1.0), offset=st.floats(-2.0, 2.0), rows=st.integers(1, 40), turns=st.integers(-3, 3))
def test_a_region_and_the_rest_make_a_whole(width: float, offset: float, rows: int, turns: int) -> None:
    a, b = torch.zeros(rows, 2), torch.ones(rows, 2)
    taken = tensor_sum.on(a, b, width=width, offset=offset)[:, 0]
    assert abs(float(taken.sum()) - width * rows) <= 1.0
    assert int((taken != taken.roll(1)).sum()) <= 2  # one run of rows, around the end
    swapped = tensor_sum.on(b, a, width=width, offset=offset)[:, 0]
    assert torch.equal(taken + swapped, torch.ones(rows))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_sizes_in_another_order_agree_with_sd_mecha(width: float, offset: float) -> None:
    for shape in SHAPES:
        a, b = drawn(*shape)
        pairs = [(a, b), (a, a), (a, -a), (1e-15 * a, 1e15 * b), (a.round(), b.round()), (torch.zeros_like(a), b)]
        for x, y in pairs:
            due = theirs("top_k_tensor_sum")(x, y, width=width, offset=offset)
            assert torch.equal(top_k.on(x, y, width=width, offset=offset), due)


def test_magnitudes_are_ranked_as_they_are_in_double_precision() -> None:
    a, b = drawn(131, dtype=torch.float64)
    different = 0
    for width in (0.2, 0.5, 0.7):
        ours = top_k.on(a, b, width=width)
        assert torch.equal(ours.float(), top_k.on(a.float(), b.float(), width=width))
        different += not torch.equal(ours, theirs("top_k_tensor_sum")(a, b, width=width))
    assert different


def by_rank(a: Tensor, b: Tensor, width: float) -> list[float]:
    """The formula, element by element, from the least magnitude on."""
    values, ordered = a.tolist(), sorted(a.tolist())
    limit = sorted(abs(value) for value in values)[round(width * len(values)) - 1]
    ranks = sorted(range(len(values)), key=b.tolist().__getitem__)
    result = list(values)
    for rank, place in enumerate(ranks):
        if abs(ordered[rank]) <= limit:
            result[place] = ordered[rank]
    return result


@settings(max_examples=50, deadline=None)
@given(size=st.integers(2, 30), seed=st.integers(0, 100), width=st.sampled_from([0.5, 0.8, 1.0]))
def test_sizes_in_another_order_follow_the_formula(size: int, seed: int, width: float) -> None:
    a, b = drawn(size, seed=seed)
    found = top_k.on(a, b, width=width)
    assert found.tolist() == by_rank(a, b, width)
    if width == 1.0:
        assert torch.equal(found.sort().values, a.sort().values)
        assert torch.equal(found.argsort(), b.argsort())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_permutation_moves_rows_and_nothing_else(shape: tuple[int, ...]) -> None:
    (a,) = drawn(*shape, count=1)
    found = randperm.on(a, seed=3, random=Random(3, "randperm", "w", 0, a.numel()))
    assert found.shape == a.shape
    if a.dim():
        assert sorted(map(str, found.tolist())) == sorted(map(str, a.tolist()))


def test_permutations_differ_by_key_and_by_seed() -> None:
    model = rm.model({"x": torch.arange(50.0), "y": torch.arange(50.0)})
    first, again, other = (rm.merge(randperm(model, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first["x"], again["x"])
    assert not torch.equal(first["x"], first["y"])
    assert not torch.equal(first["x"], other["x"])


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_merge_gives_what_the_methods_give(monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    a, b = ({"w": x, "bias": x[0], "number": x[0, 0]} for x in drawn(20, 30))
    for method, values in ((tensor_sum, {"width": 0.3, "offset": 0.8}), (top_k, {"width": 0.4, "offset": 0.3})):
        found = rm.merge(method(rm.model(a), rm.model(b), **values), threads=2)
        for key in a:
            assert torch.equal(found[key], method.on(a[key], b[key], **values))


class TestConformance(MethodConformance):
    @pytest.fixture(params=["tensor_sum", "top_k_tensor_sum", "randperm"])
    def method(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture(params=[{}, {"along": "columns", "width": 0.4, "offset": 0.8}], ids=str)
    def values(self, request: pytest.FixtureRequest, method: str) -> Any:
        return request.param if method == "tensor_sum" else {}
