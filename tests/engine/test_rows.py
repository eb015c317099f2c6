"""Methods by row: streamed in tiles of whole rows, whatever the shape, the threads, or what stands around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.core.random import Random
from remelt.errors import MethodError, RecipeError
from remelt.methods import METHODS
from remelt.planning import cost
from remelt.recipe.method import Integer, Mask, Same, Sums, merge_method
from remelt.testing import MethodConformance


@merge_method(cut="row")
def centred(a: Same, *, alpha: Mask = 1.0) -> Same:
    """Rows less their means.

    Formula: a - alpha * mean of its row

    Spaces: any. Source: this test.

    >>> centred.on(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    return a - alpha * a.mean(1, keepdim=True)


@merge_method(cut="row")
def drawn(a: Same, *, seed: Integer = 0, random: Random) -> Same:
    """Rows with random numbers added.

    Formula: a + u

    Spaces: any. Source: this test.

    >>> drawn.on(torch.zeros(1, 2), random=Random(0, "drawn", "x", 0, 2)).shape
    torch.Size([1, 2])
    """
    return a + torch.from_numpy(random.uniform()).to(a.dtype).reshape(a.shape)


def column_sums(a: Tensor) -> dict[str, Tensor]:
    return {"column": a.double().sum(0)}


def row_extremes(a: Tensor) -> dict[str, Tensor]:
    """One number of each row: nothing but whole rows give it."""
    return {"spread": (a.amax(1) - a.amin(1)).double().sum()}


@merge_method(cut="row", vectors="column", reductions=(column_sums,), held=lambda shape: 8 * math.prod(shape[1:]))
def without_columns(a: Same, *, sums: Sums) -> Same:
    """Columns less their sums.

    Formula: a - the sum of its column

    Spaces: any. Source: this test.

    >>> without_columns.on(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    tensor([[-5., -5.],
            [-1., -3.]])
    """
    return a - sums["column"].to(a)


@merge_method(cut="row", reductions=(row_extremes,), conclusion=lambda sums: {"share": 1e-3 * float(sums["spread"])})
def spread(a: Same, *, sums: Sums) -> Same:
    """A tensor plus a thousandth of the spreads of its rows.

    Formula: a + 0.001 (sum over rows of max - min)

    Spaces: any. Source: this test.

    >>> spread.on(torch.tensor([[1.0, 2.0], [5.0, 5.0]]))
    tensor([[1.0010, 2.0010],
            [5.0010, 5.0010]])
    """
    return a + sums["share"]


@merge_method(cut="row")
def lossy(a: Same) -> Same:
    return a[:1]


SPECIMENS = True


class TestConformance(MethodConformance):
    @pytest.fixture(params=[centred, drawn, without_columns, spread], ids=lambda method: method.name)
    def method(self, request: pytest.FixtureRequest) -> Any:
        return request.param


def by_rows(tensor: Tensor) -> Tensor:
    width = cost.width_of_rows(tensor.shape)
    rows = tensor.reshape(-1, width)
    return (rows - rows.mean(1, keepdim=True)).reshape(tensor.shape)


SHAPES = ((), (0,), (0, 4), (4, 0), (5,), (70_001,), (3, 5), (1000, 7), (33, 3, 3, 3), (3, 300_000), (1, 2**18 + 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_shape_is_cut_into_its_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = rm.merge(METHODS["centred"](rm.model({"w": tensor})), threads=2)["w"]
    torch.testing.assert_close(found, by_rows(tensor.float()).to(dtype))


@settings(max_examples=30)
@given(
    rows=st.integers(1, 200), width=st.integers(1, 300), tile=st.sampled_from([2**12, 2**14]), threads=st.integers(1, 4)
)
def test_no_tile_or_thread_changes_a_bit(rows: int, width: int, tile: int, threads: int) -> None:
    tensor = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "TILE", tile)
        patch.setattr("remelt.engine.units.SLICE", tile)
        found = rm.merge(METHODS["centred"](rm.model({"w": tensor})), threads=threads)["w"]
    whole = rm.merge(METHODS["centred"](rm.model({"w": tensor})), threads=1)["w"]
    assert torch.equal(found, whole)
    torch.testing.assert_close(found, by_rows(tensor))


def test_slices_for_threads_end_with_rows(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    tensor = torch.randn(6007, 2011, generator=torch.Generator().manual_seed(0)).half()
    path = write_model(tmp_path / "a", {"w": tensor})
    out = rm.merge(METHODS["centred"](rm.model(path)), tmp_path / "out", threads=3)
    found = rm.merge(rm.model(out))["w"]
    torch.testing.assert_close(found, by_rows(tensor.float()).half(), rtol=1e-3, atol=1e-3)


def test_a_plan_holds_tiles_of_rows_not_the_tensor() -> None:
    a = rm.model({"w": torch.zeros(2**14, 2**10)})
    plan = rm.plan(METHODS["centred"](a), threads=1, memory="128MiB")
    assert plan.tasks[0].divisible
    assert plan.peak_memory - 2**26 < 2**24


def test_rows_stand_among_other_methods() -> None:
    drawn_from = torch.Generator().manual_seed(0)
    a, b = (torch.randn(515, 1021, generator=drawn_from) for _ in range(2))
    one, other = rm.model({"w": a}), rm.model({"w": b})
    centre = METHODS["centred"]
    before = rm.merge(centre(rm.slerp(one, other, alpha=0.3)), threads=2)["w"]
    torch.testing.assert_close(before, by_rows(METHODS["slerp"].on(a, b, alpha=0.3)))
    after = rm.merge(rm.slerp(centre(one), centre(other), alpha=0.3), threads=2)["w"]
    torch.testing.assert_close(after, METHODS["slerp"].on(by_rows(a), by_rows(b), alpha=0.3))
    masked = rm.merge(centre(one, alpha=rm.model({"w": torch.full_like(a, 0.5)}, space="param")))["w"]
    torch.testing.assert_close(masked, a - 0.5 * a.mean(1, keepdim=True))


def test_random_rows_do_not_depend_on_tiles() -> None:
    a = rm.model({"w": torch.zeros(997, 1009)})
    whole = rm.merge(METHODS["drawn"](a), threads=1)["w"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "TILE", 2**12)
        assert torch.equal(rm.merge(METHODS["drawn"](a), threads=2)["w"], whole)
    assert 0.49 < float(whole.mean()) < 0.51


def test_a_method_that_loses_rows_is_told() -> None:
    with pytest.raises(MethodError, match=r"lossy is declared to work by row, but made \[1, 5\] of 15 of w"):
        rm.merge(METHODS["lossy"](rm.model({"w": torch.ones(3, 5)})))


def test_rows_keep_their_shape() -> None:
    def grows(a: Same) -> Same:
        return a

    with pytest.raises(RecipeError, match="a method of cut 'row' keeps the shape of its operands"):
        merge_method(cut="row", shape=lambda shapes, values: shapes[0])(grows)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_columns_are_summed_up_in_every_shape(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = rm.merge(METHODS["without_columns"](rm.model({"w": tensor})), threads=2, compute_dtype="float64")["w"]
    torch.testing.assert_close(found, tensor - (tensor.sum(0) if tensor.dim() else tensor))


@settings(max_examples=20)
@given(rows=st.integers(1, 300), width=st.integers(1, 300), tile=st.sampled_from([2**12, 2**14]), data=st.data())
def test_no_tile_thread_or_slice_changes_a_bit_of_sums(rows: int, width: int, tile: int, data: st.DataObject) -> None:
    method, threads = data.draw(st.sampled_from([without_columns, spread])), data.draw(st.integers(1, 4))
    tensor = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    recipe = METHODS[method.name](rm.model({"w": tensor}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("remelt.engine.units.FOLD", 2**16)
        whole = rm.merge(recipe, threads=1)["w"]
        patch.setattr(cost, "TILE", tile)
        assert torch.equal(rm.merge(recipe, threads=threads)["w"], whole)
    torch.testing.assert_close(whole, method.on(tensor), rtol=1e-4, atol=1e-4)


def test_threads_share_the_sums_of_a_large_tensor() -> None:
    tensor = torch.randn(6007, 2011, generator=torch.Generator().manual_seed(0))
    recipe = METHODS["without_columns"](rm.model({"w": tensor}))
    assert rm.plan(recipe, threads=3).tasks[0].divisible
    found = [rm.merge(recipe, threads=threads)["w"] for threads in (1, 3)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], tensor - tensor.double().sum(0).float(), rtol=1e-4, atol=1e-4)


def test_sums_of_rows_stand_beside_other_sums() -> None:
    """In one pass the chunks of one of them would end where the other's rows do."""
    drawn_from = torch.Generator().manual_seed(0)
    a, b = (torch.randn(515, 1021, generator=drawn_from) for _ in range(2))
    one, other = rm.model({"w": a}), rm.model({"w": b})
    mixed = rm.weighted_sum(rm.slerp(one, other, alpha=0.3), METHODS["spread"](other), alpha=0.5)
    found = [rm.merge(mixed, threads=threads)["w"] for threads in (1, 3)]
    assert torch.equal(*found)
    assert torch.equal(
        found[0], rm.merge(rm.weighted_sum(rm.slerp(one, other, alpha=0.3), METHODS["spread"](other)))["w"]
    )
    torch.testing.assert_close(found[0], (METHODS["slerp"].on(a, b, alpha=0.3) + spread.on(b)) / 2.0)
    above = rm.merge(METHODS["spread"](METHODS["without_columns"](METHODS["centred"](one))), threads=2)["w"]
    torch.testing.assert_close(above, spread.on(without_columns.on(by_rows(a))), rtol=1e-4, atol=1e-4)
    below = rm.merge(rm.slerp(METHODS["without_columns"](one), other, alpha=0.3), threads=2)["w"]
    torch.testing.assert_close(below, METHODS["slerp"].on(without_columns.on(a), b, alpha=0.3), rtol=1e-4, atol=1e-4)


def test_the_sums_of_columns_are_in_the_plan() -> None:
    wide, narrow = ({"w": torch.zeros(shape)} for shape in ((4, 2**20), (2**20, 4)))
    peaks = [rm.plan(METHODS["without_columns"](rm.model(one)), threads=1).peak_memory for one in (wide, narrow)]
    assert peaks[0] - peaks[1] >= 4 * 8 * 2**20


def test_a_vector_that_is_a_column_is_held_in_tiles() -> None:
    a = rm.model({"w": torch.zeros(2**24)})
    peak = rm.plan(METHODS["without_columns"](a), threads=1, memory="1GiB").peak_memory - 2**26
    assert peak < 2**24
    found = rm.merge(METHODS["without_columns"](rm.model({"w": torch.ones(300_001)})), threads=3)["w"]
    assert torch.equal(found, torch.full((300_001,), -300_000.0))
