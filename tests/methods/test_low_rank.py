"""Low rank: beside torch's singular values, sd-mecha, and the bounds that are promised."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.methods.low_rank import _factors
from remelt.testing import MethodConformance

truncate_rank = METHODS["truncate_rank"]
randomised = METHODS["truncate_rank_randomised"]
kronecker = METHODS["truncate_kronecker"]

SHAPES = ((1, 1), (1, 7), (7, 1), (5, 9), (9, 5), (16, 16), (6, 4, 3, 3), (4, 6, 1, 1), (3, 4, 5))
WITHOUT_RANK = ((), (0,), (5,), (0, 4), (4, 0))
INTENDED = {
    ("truncate_kronecker", "shape (4, 0)"): "nothing to factorise: sd-mecha takes the logarithm of 0",
    ("truncate_kronecker", "several products are equally near"): "the decomposition chooses",
    ("truncate_rank", "not finite"): "sd-mecha's decomposition raises",
}
"""Where the two are meant to differ, and why."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gap(found: Tensor, due: Tensor) -> float:
    return float((found.double() - due.double()).abs().max()) if due.numel() else 0.0


def theirs(module: str, name: str) -> Callable[..., Tensor]:
    found = pytest.importorskip(f"sd_mecha.extensions.builtin.merge_methods.{module}")
    function: Callable[..., Tensor] = getattr(found, name).__wrapped__
    return function


@pytest.mark.parametrize("shape", [*SHAPES, *WITHOUT_RANK], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 2, 4, 100])
@pytest.mark.parametrize("method", ["gram", "svd"])
def test_truncation_agrees_with_sd_mecha(shape: tuple[int, ...], rank: int, method: str) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for scale in (1.0, 1e-4, 1e-15, 1e4):
            delta = scale * drawn(*shape, dtype=dtype)
            due = theirs("svd", "truncate_rank")(delta.clone(), rank=rank, use_approximate_basis=False)
            found = truncate_rank.on(delta, rank=rank, method=method)
            assert found.dtype == dtype
            assert gap(found, due) <= bound * float(delta.abs().max() if delta.numel() else 0.0)


@pytest.mark.parametrize("method", ["gram", "svd"])
def test_truncation_of_structured_differences_agrees_with_sd_mecha(method: str) -> None:
    column, row = drawn(12, 1), drawn(1, 20, seed=1)
    for delta in (column @ row, column @ row + 1e-3 * drawn(12, 20), torch.zeros(12, 20).double()):
        for rank in (1, 3):
            due = theirs("svd", "truncate_rank")(delta.clone(), rank=rank, use_approximate_basis=False)
            assert gap(truncate_rank.on(delta, rank=rank, method=method), due) < 1e-10


@pytest.mark.parametrize("share", [0.01, 0.25, 0.3, 0.5, 0.99, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(5, 9), (6, 4, 3, 3)], ids=str)
def test_a_share_is_sd_mechas_ratio(shape: tuple[int, ...], share: float) -> None:
    rank = int(theirs("svd", "get_rank_from_ratio")(drawn(*shape), ratio=share))
    for method in (truncate_rank, randomised):
        assert torch.equal(method.on(drawn(*shape), share=share), method.on(drawn(*shape), rank=rank))


def test_the_gram_matrix_is_exact_to_a_millionth() -> None:
    left, right = torch.linalg.qr(drawn(60, 60)).Q, torch.linalg.qr(drawn(200, 60, seed=1)).Q
    for base in (0.99, 0.9, 0.7):
        delta = (left * base ** torch.arange(60)) @ right.T
        for rank in (1, 8, 30):
            due = (left[:, :rank] * base ** torch.arange(rank)) @ right[:, :rank].T
            for matrix, truth in ((delta, due), (delta.T, due.T)):
                assert gap(truncate_rank.on(matrix, rank=rank), truth) < 1e-6 * float(due.abs().max())


def spectra() -> dict[str, Tensor]:
    places = torch.arange(1, 257, dtype=torch.float64)
    return {
        "of a random matrix": torch.linalg.svdvals(drawn(256, 512)),
        "slow": places**-0.25,
        "as the inverse": places**-1.0,
        "geometric": 0.95**places,
        "flat": torch.ones(256).double(),
        "of rank 10": (places <= 10).double(),
    }


@pytest.mark.parametrize("name", list(spectra()))
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_randomised_truncation_is_within_one_percent(name: str, rank: int) -> None:
    values = spectra()[name]
    left, right = torch.linalg.qr(drawn(256, 256)).Q, torch.linalg.qr(drawn(512, 256, seed=1)).Q
    delta = (left * values) @ right.T
    least = float(values[rank:].square().sum().sqrt())
    for matrix in (delta, delta.T):
        for dtype in (torch.float64, torch.float32):
            found = randomised.on(matrix.to(dtype), rank=rank)
            assert found.dtype == dtype
            assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) <= rank
            assert float((matrix - found).norm()) <= 1.01 * least + 1e-5


@pytest.mark.parametrize("shape", [*SHAPES, *WITHOUT_RANK], ids=str)
@pytest.mark.parametrize("rank", [0, 2, 100])
def test_the_randomised_truncation_of_small_tensors_is_exact(shape: tuple[int, ...], rank: int) -> None:
    assert gap(randomised.on(drawn(*shape), rank=rank), truncate_rank.on(drawn(*shape), rank=rank)) < 1e-12


def test_seeds_matter_and_keys_do_not() -> None:
    delta = drawn(64, 80)
    values = {"rank": 4, "iterations": 0, "oversampling": 0}
    first = randomised.on(delta, seed=1, **values)
    assert torch.equal(first, randomised.on(delta, seed=1, **values))
    assert gap(first, randomised.on(delta, seed=2, **values)) > 1e-3
    assert gap(randomised.on(torch.zeros(64, 80), rank=4), torch.zeros(64, 80)) == 0.0


@pytest.mark.parametrize("method", [truncate_rank, randomised, kronecker], ids=lambda method: method.name)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_as_it_is(method: Any, value: float) -> None:
    delta = drawn(40, 60)
    delta[3, 5] = value
    for tensor in (delta, delta.T.contiguous()):
        torch.testing.assert_close(method.on(tensor), tensor, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(truncate_rank.on(delta, method="svd"), delta, rtol=0, atol=0, equal_nan=True)


def test_other_methods_are_refused() -> None:
    with pytest.raises(RecipeError, match="truncate_rank: method is 'gram' or 'svd', but got 'lanczos'"):
        truncate_rank.on(drawn(4, 5), method="lanczos")


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        (truncate_rank, {"rank": -1}),
        (truncate_rank, {"share": -0.5}),
        (randomised, {"iterations": -1}),
        (randomised, {"oversampling": -3}),
        (kronecker, {"ratio": 1.5}),
    ],
    ids=str,
)
def test_numbers_that_nothing_can_be_meant_by_are_refused_before_anything_is_read(method: Any, wrong: Any) -> None:
    (name,) = wrong
    with pytest.raises(RecipeError, match=rf"{method.name}: {name} is (0 or more|from 0 to 1), but got"):
        rm.plan(method(rm.model("nowhere") - rm.model("neither"), **wrong))


@pytest.mark.parametrize(
    "shape", [(4, 6), (6, 4), (7, 5), (12, 8, 3, 3), (16, 16), (1, 6), (5, 1), (8, 8, 1, 1)], ids=str
)
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_kronecker_products_agree_with_sd_mecha(shape: tuple[int, ...], ratio: float) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for scale in (1.0, 1e-4, 1e4):
            delta = scale * drawn(*shape, dtype=dtype)
            due = theirs("kronecker", "truncate_kronecker")(
                delta.clone(), kronecker_ratio=ratio, use_approximate_basis=False
            )
            assert gap(kronecker.on(delta, ratio=ratio), due) <= bound * float(delta.abs().max())


@pytest.mark.parametrize("ratio", [-1.0, 0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0, 3.0])
def test_factors_are_those_of_sd_mecha(ratio: float) -> None:
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.kronecker")
    sides = (1, 2, 3, 4, 6, 7, 12, 30, 64, 77)
    for shape in (*itertools.product(sides, sides), (320, 4, 3, 3), (1280, 640, 3, 3), (5120, 1280), (13, 1, 5)):
        rows, inner_rows, columns, inner_columns = _factors(shape, ratio)
        assert (rows, inner_rows, columns, inner_columns) == module.kron_dims_from_ratio(torch.Size(shape), ratio)


@pytest.mark.parametrize("shape", WITHOUT_RANK, ids=str)
def test_what_is_no_matrix_is_no_product(shape: tuple[int, ...]) -> None:
    assert torch.equal(kronecker.on(drawn(*shape)), drawn(*shape))


@settings(max_examples=30, deadline=None)
@given(rows=st.sampled_from([2, 3, 4]), columns=st.sampled_from([2, 3, 5]), seed=st.integers(0, 50))
def test_a_kronecker_product_is_its_own_nearest(rows: int, columns: int, seed: int) -> None:
    product = torch.kron(drawn(rows, columns, seed=seed), drawn(rows, columns, seed=seed + 1))
    assert gap(kronecker.on(product, ratio=0.5), product) < 1e-12


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(0, 9), seed=st.integers(0, 50))
def test_truncating_twice_is_truncating_once(rows: int, columns: int, rank: int, seed: int) -> None:
    once = truncate_rank.on(drawn(rows, columns, seed=seed), rank=rank)
    assert gap(truncate_rank.on(once, rank=rank), once) < 1e-11
    assert gap(truncate_rank.on(-3.0 * drawn(rows, columns, seed=seed), rank=rank), -3.0 * once) < 1e-11


@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize("name", ["truncate_rank", "truncate_rank_randomised", "truncate_kronecker"])
def test_a_merge_gives_what_the_method_gives(monkeypatch: pytest.MonkeyPatch, executor: str, name: str) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    base = {"w": drawn(60, 90), "kernel": drawn(8, 6, 3, 3), "bias": drawn(9), "empty": drawn(4, 0)}
    tuned = {key: tensor + 0.1 * drawn(*tensor.shape, seed=1) for key, tensor in base.items()}
    delta = rm.model(tuned) - rm.model(base)
    found = rm.merge(rm.model(base) + METHODS[name](delta), threads=2, compute_dtype="float64")
    for key, tensor in base.items():
        assert gap(found[key], tensor + METHODS[name].on(tuned[key] - tensor)) < 1e-12


def test_directions_are_found_once_for_all_ranks() -> None:
    delta = rm.model({"w": drawn(60, 90)}) - rm.model({"w": drawn(60, 90, seed=1)})
    cache = rm.Cache()
    held = []
    for rank in (1, 8, 30):
        found, due = (rm.merge(truncate_rank(delta, rank=rank), **options) for options in ({"cache": cache}, {}))
        assert torch.equal(found["w"], due["w"])
        held.append(cache.held)
    assert held[0] == held[-1] > 0


@pytest.mark.parametrize(
    ("method", "faster"), [(truncate_rank, "truncate_rank_randomised"), (kronecker, "a ratio nearer to 0 or 1")]
)
def test_a_plan_warns_of_large_decompositions(method: Any, faster: str) -> None:
    a, b = (rm.model({"w": torch.empty(8000, 8500, dtype=torch.float16)}, name=name) for name in "ab")
    told = "\n".join(rm.plan(method(a - b), memory="8GiB").warnings)
    assert f"{method.name} takes about" in told
    assert f"faster: {faster}" in told
    assert "takes about" not in "\n".join(rm.plan(randomised(a - b), memory="8GiB").warnings)


class TestConformance(MethodConformance):
    @pytest.fixture(params=["truncate_rank", "truncate_rank_randomised", "truncate_kronecker"])
    def method(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture(params=[{}, {"method": "svd", "rank": 3}], ids=str)
    def values(self, request: pytest.FixtureRequest, method: str) -> Any:
        return request.param if method == "truncate_rank" else {}
