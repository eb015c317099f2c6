"""Rotations: beside sd-mecha's where that rotates, and by what a rotation is where it does not."""

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
from remelt.methods import METHODS
from remelt.testing import MethodConformance

pytestmark = pytest.mark.filterwarnings("ignore:Casting complex values")  # sd-mecha's
rotate = METHODS["rotate"]
TALL = ((12, 5), (40, 20), (33, 32), (4, 3, 3, 3), (64, 5, 1, 1))
WIDE = ((4, 6), (10, 40), (20, 25), (3, 2, 4, 4), (30, 40))
SHAPES = (*TALL, (16, 16), *WIDE)
INTENDED = {
    ("rotate", "wide"): "sd-mecha's transform of wide matrices is no rotation: it leaves what should have moved",
    ("rotate", "opposite"): "a half turn has no real principal power: sd-mecha drops the imaginary part of one",
    ("rotate", "close"): "sd-mecha does not turn what is equal in float16; remelt does",
}
"""Where the two are meant to differ, and why; a test for each says what remelt gives there."""


@pytest.fixture(scope="module")
def theirs() -> Callable[..., Tensor]:
    svd = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.svd")

    def call(a: Tensor, b: Tensor, *, alpha: float = 0.0, **values: float) -> Tensor:
        function = svd.rotate.__wrapped__
        result: Tensor = function(
            {"w": a.clone()}, {"w": b.clone()}, alpha=torch.tensor(alpha, dtype=torch.float64), key="w", **values
        )
        return result

    return call


def drawn(*shape: int, count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def matrix(tensor: Tensor) -> Tensor:
    """Rows as the method takes them, in float64."""
    height = tensor.shape[0] * (tensor.shape[1] if tensor.dim() == 4 and tensor[0, 0].numel() > 1 else 1)
    return tensor.double().reshape(height, -1)


def gap(found: Tensor, due: Tensor) -> float:
    return float((found.double() - due.double()).abs().max()) if due.numel() else 0.0


@pytest.mark.parametrize("shape", TALL, ids=str)
@pytest.mark.parametrize("alignment", [0.0, 0.3, 0.5, 0.9, 1.0, 2.0, -1.0])
@pytest.mark.parametrize(("alpha", "centralization"), [(0.0, 1.0), (0.3, 0.5), (1.0, 0.0)])
def test_tall_matrices_agree_with_sd_mecha(
    theirs: Callable[..., Tensor], shape: tuple[int, ...], alignment: float, alpha: float, centralization: float
) -> None:
    values = {"alignment": alignment, "alpha": alpha, "centralization": centralization}
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        for scale in (1.0, 1e-4, 1e4):
            a, b = (scale * tensor for tensor in drawn(*shape, dtype=dtype))
            ours = rotate.on(a, b, **values)
            assert ours.dtype == dtype
            assert gap(ours, theirs(a, b, **values)) <= bound * float(torch.maximum(a.abs().max(), b.abs().max()))


def test_square_matrices_agree_with_sd_mecha_where_nothing_is_left_open(theirs: Callable[..., Tensor]) -> None:
    a, b = drawn(16, 16)
    for alignment in (0.3, 1.0):
        values = {"alignment": alignment, "centralization": 0.0}  # centred, they lack a direction
        assert gap(rotate.on(a, b, **values), theirs(a, b, **values)) < 1e-10


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (5,)], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_what_has_no_rows_is_a_weighted_sum(shape: tuple[int, ...], alpha: float) -> None:
    a, b = drawn(*shape)
    assert torch.equal(rotate.on(a, b, alpha=alpha), torch.lerp(a, b, alpha))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alignment", [0.2, 0.5, 1.0, 1.7])
def test_a_rotation_keeps_the_products_of_rows(shape: tuple[int, ...], alignment: float) -> None:
    a, b = drawn(*shape)
    found = matrix(rotate.on(a, b, alignment=alignment, centralization=0.0))
    assert gap(found @ found.T, matrix(a) @ matrix(a).T) < 1e-9
    centred = matrix(rotate.on(a, b, alignment=alignment))
    means = torch.lerp(matrix(a).mean(0), matrix(b).mean(0), alignment)
    assert gap(centred.mean(0), means) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_alignment_comes_as_near_as_a_rotation_can(shape: tuple[int, ...]) -> None:
    a, b = drawn(*shape)
    x, y = matrix(a), matrix(b)
    least = x.square().sum() + y.square().sum() - 2.0 * torch.linalg.svdvals(x.T @ y).sum()
    found = matrix(rotate.on(a, b, centralization=0.0)) - y
    assert abs(float(found.square().sum() - least)) < 1e-9 * float(least)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_ends_are_the_models(shape: tuple[int, ...]) -> None:
    a, b = drawn(*shape)
    assert gap(rotate.on(a, b, alignment=0.0, alpha=0.0), a) < 1e-10
    assert gap(rotate.on(a, b, alignment=1.0, alpha=1.0), b) < 1e-10


@pytest.mark.parametrize("shape", [(12, 5), (16, 16), (10, 40), (20, 25)], ids=str)
def test_powers_follow_one_another(shape: tuple[int, ...]) -> None:
    a, b = drawn(*shape)
    values = {"centralization": 0.0}
    step = [rotate.on(a, b, alignment=share, **values) for share in (0.0, 0.25, 0.5, 0.75)]
    gram = [one @ other.T for one, other in itertools.pairwise(step)]
    for found in gram[1:]:  # <a Q^t, a Q^(t + 1/4)> is the same for all t
        assert gap(found, gram[0]) < 1e-9
    assert gap(rotate.on(a, b, alignment=1e-9, **values), a) < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_equal_is_not_turned(shape: tuple[int, ...]) -> None:
    (a,) = drawn(*shape, count=1)
    for alignment in (0.3, 0.5, 1.0):
        assert gap(rotate.on(a, a, alignment=alignment), a) < 1e-11
        assert gap(rotate.on(a, 3.0 * a, alignment=alignment, centralization=0.0), a) < 1e-11


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zero_tells_no_direction(shape: tuple[int, ...]) -> None:
    (a,) = drawn(*shape, count=1)
    zero = torch.zeros_like(a)
    for alignment in (0.3, 1.0):
        assert gap(rotate.on(a, zero, alignment=alignment, centralization=0.0), a) < 1e-12
        assert gap(rotate.on(zero, a, alignment=alignment, centralization=0.0), zero) == 0.0


@pytest.mark.parametrize("shape", [(10, 6), (6, 6), (6, 10), (3, 40)], ids=str)
@pytest.mark.parametrize("alignment", [0.25, 0.5, 1.0])
def test_a_half_turn_goes_in_planes(shape: tuple[int, ...], alignment: float) -> None:
    """Opposite tensors: every direction turns by the same angle, so that <a, a Q^t> is cos(pi t) |a|^2.

    But one that is left over, if their number is odd.
    """
    (a,) = drawn(*shape, count=1)
    found = rotate.on(a, -a, alignment=alignment, centralization=0.0)
    assert gap(found @ found.T, a @ a.T) < 1e-9
    if alignment == 1.0:
        assert gap(found, -a) < 1e-11
    elif min(shape) % 2 == 0:
        assert abs(float((found * a).sum() / a.square().sum()) - math.cos(math.pi * alignment)) < 1e-9


def test_opposite_tensors_are_turned_where_sd_mecha_shrinks_them(theirs: Callable[..., Tensor]) -> None:
    (a,) = drawn(10, 6, count=1)
    values = {"alignment": 0.5, "centralization": 0.0}
    other = theirs(a, -a, **values)
    assert float(other.norm() / a.norm()) < 0.99  # by how much differs from one CPU to another
    assert abs(float(rotate.on(a, -a, **values).norm() / a.norm()) - 1.0) < 1e-9


@pytest.mark.parametrize("shape", [(4, 6), (20, 10), (3, 3)], ids=str)
def test_reflections_are_no_obstacle(shape: tuple[int, ...]) -> None:
    (a,) = drawn(*shape, count=1)
    mirror = torch.eye(shape[1], dtype=torch.float64)
    mirror[0, 0] = -1.0
    b = a @ mirror
    assert gap(rotate.on(a, b, centralization=0.0), b) < 1e-11
    found = rotate.on(a, b, alignment=0.5, centralization=0.0)
    assert gap(found @ found.T, a @ a.T) < 1e-10


def test_wide_matrices_are_turned_where_sd_mecha_does_not_keep_their_size(theirs: Callable[..., Tensor]) -> None:
    a, b = drawn(10, 40)
    for alignment in (0.5, 0.7, 1.0):
        values = {"alignment": alignment, "centralization": 0.0}
        ours, other = rotate.on(a, b, **values), theirs(a, b, **values)
        assert abs(float(ours.norm() / a.norm()) - 1.0) < 1e-12
        assert float(other.norm() / a.norm()) > 1.1
    assert float((ours - b).norm()) < float((other - b).norm())


def test_small_steps_of_a_fine_tune_are_turned_where_sd_mecha_does_not_look(theirs: Callable[..., Tensor]) -> None:
    a, noise = drawn(40, 20)
    b = a + 1e-8 * noise
    assert torch.equal(theirs(a, b, alignment=1.0), a)
    assert float((rotate.on(a, b) - b).norm()) < float((a - b).norm())


def test_values_that_are_not_finite_give_a_weighted_sum() -> None:
    for shape in ((12, 5), (5, 12)):
        a, b = drawn(*shape)
        a[1, 2] = math.inf
        found = rotate.on(a, b, alignment=0.3, alpha=0.25)
        assert torch.equal(found.isfinite(), a.isfinite())
        assert torch.equal(found[a.isfinite()], torch.lerp(a, b, 0.25)[a.isfinite()])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    alignment=st.floats(-2.0, 2.0),
    seed=st.integers(0, 100),
    rank=st.integers(0, 3),
)
def test_any_rotation_of_deficient_matrices_keeps_products(
    rows: int, columns: int, alignment: float, seed: int, rank: int
) -> None:
    a, b = drawn(rows, columns, seed=seed)
    (y,) = drawn(rows, columns, count=1, seed=seed + 1)
    b = b[:, :rank] @ y[:rank] if rank < min(rows, columns) else b
    found = rotate.on(a, b, alignment=alignment, centralization=0.0)
    assert gap(found @ found.T, a @ a.T) < 1e-8
    assert gap(rotate.on(2.0 * a, 5.0 * b, alignment=alignment, centralization=0.0), 2.0 * found) < 1e-5


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_merge_gives_what_the_method_gives(monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    a, b = ({"tall": x, "wide": y} for x, y in zip(drawn(12, 5), drawn(5, 12), strict=True))
    recipe = rotate(rm.model(a), rm.model(b), alignment=0.3, alpha=0.1)
    found = rm.merge(recipe, threads=2, compute_dtype="float64")
    for key in a:
        assert gap(found[key], rotate.on(a[key], b[key], alignment=0.3, alpha=0.1)) < 1e-12


def test_directions_are_found_once_for_all_alignments() -> None:
    models = [rm.model({"tall": x, "wide": y}) for x, y in zip(drawn(12, 5), drawn(5, 12), strict=True)]
    cache = rm.Cache()
    held = []
    for alignment in (0.3, 0.7, 1.0):
        recipe = rotate(*models, alignment=alignment)
        found, due = (rm.merge(recipe, **options) for options in ({"cache": cache}, {}))
        assert all(torch.equal(found[key], due[key]) for key in due)
        held.append(cache.held)
    assert held[0] == held[-1] > 0


def test_a_plan_warns_of_powers_of_large_matrices() -> None:
    a = rm.model({"w": torch.empty(3000, 4000, dtype=torch.float16)})
    (warning,) = rm.plan(rotate(a, a, alignment=0.5), memory="8GiB").warnings
    assert "rotate takes about" in warning
    assert "faster: alignment=1 and alpha=0" in warning
    assert rm.plan(rotate(a, a, alignment=0.5), memory="8GiB").seconds > rm.plan(rotate(a, a), memory="8GiB").seconds


class TestConformance(MethodConformance):
    @pytest.fixture
    def method(self) -> Any:
        return rotate

    @pytest.fixture(params=[{}, {"alignment": 0.3, "alpha": 0.2}, {"alignment": 2.0}], ids=str)
    def values(self, request: pytest.FixtureRequest) -> Any:
        return request.param
