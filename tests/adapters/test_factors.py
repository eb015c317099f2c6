"""Factors of differences are as near as any of their rank, and as few as a share of the energy allows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from remelt.adapters.extraction import lokr_factors, lokr_shapes, lora_factors, lora_shapes, measured
from remelt.adapters.extraction import measured_kronecker as kronecker
from remelt.adapters.factors import Factors, chosen_rank, factors_of, joined, nearest_factor, truncated

SIDES = [(24, 24), (12, 40), (40, 12), (1, 9), (9, 1), (300, 6)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(found: Factors) -> Tensor:
    return found.up @ found.down


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("rank", [1, 3, 500])
def test_factors_are_the_nearest_of_their_rank(sides: tuple[int, int], rank: int) -> None:
    delta = drawn(*sides)
    u, values, vh = torch.linalg.svd(delta, full_matrices=False)
    found = factors_of(delta, rank, None)
    kept = min(rank, *sides)
    assert found.rank == kept
    best = (u[:, :kept] * values[:kept]) @ vh[:kept]
    assert (product(found) - best).abs().max() <= 1e-9 * values[0]
    assert found.energy == pytest.approx(float(delta.square().sum()), rel=1e-12)
    assert found.share == pytest.approx(float(values[:kept].square().sum() / values.square().sum()), rel=1e-12)


@pytest.mark.parametrize("sides", SIDES)
def test_both_factors_carry_the_same_weight(sides: tuple[int, int]) -> None:
    found = factors_of(drawn(*sides), 2, None)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_the_rank_is_the_least_that_keeps_the_energy(energy: float) -> None:
    delta = drawn(30, 50)
    squares = torch.linalg.svdvals(delta).square()
    least = next(count for count in range(1, 31) if squares[:count].sum() >= energy * squares.sum() * (1 - 1e-14))
    found = factors_of(delta, None, energy)
    assert found.rank == least
    terms = [(drawn(30, 12), drawn(12, 50)), (drawn(30, 9, seed=1), drawn(9, 50, seed=1))]
    whole = sum(up @ down for up, down in terms)
    assert truncated(terms, None, energy).rank == factors_of(whole, None, energy).rank


def test_nothing_has_one_column_of_zeros() -> None:
    found = factors_of(torch.zeros(5, 7), 3, None)
    assert (found.rank, found.energy, found.share) == (1, 0.0, 1.0)
    assert not product(found).any()


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("rank", [2, 30])
def test_a_sum_of_products_is_truncated_to_the_nearest(sides: tuple[int, int], rank: int) -> None:
    terms = [(drawn(sides[0], size, seed=size), drawn(size, sides[1], seed=-size)) for size in (4, 1, 7)]
    whole: Tensor = sum(up @ down for up, down in terms)  # type: ignore[assignment]
    values = torch.linalg.svdvals(whole)
    found = truncated(terms, rank, None)
    left = float(values[rank:].square().sum())
    assert float((whole - product(found)).square().sum()) == pytest.approx(left, rel=1e-9, abs=1e-20 * found.energy)
    assert (1.0 - found.share) * found.energy == pytest.approx(left, abs=1e-9 * found.energy)
    assert (product(joined(terms)) - whole).abs().max() <= 1e-12 * values[0]
    assert joined(terms).rank == 12


def test_ranks_that_are_round_off_are_not_kept() -> None:
    terms = [(drawn(30, 3), drawn(3, 20)), (drawn(30, 3), drawn(3, 20))]
    assert truncated(terms, 6, None).rank == 3
    assert chosen_rank(torch.tensor([1.0, 1e-8, 1e-30]), 3, None) == 2


def test_no_product_of_the_full_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = Tensor.__matmul__

    def watched(one: Tensor, other: Tensor) -> Tensor:
        found = plain(one, other)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    terms = [(drawn(400, 5), drawn(5, 500)), (drawn(400, 6, seed=1), drawn(6, 500, seed=1))]
    truncated(terms, 4, None)
    joined(terms)
    assert 400 * 11 <= max(sizes) <= 500 * 11


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (8, 12, 1, 1), (8, 12, 3, 3), (40, 3, 3, 3), (6, 8, 5)])
def test_a_difference_of_a_rank_is_that_of_its_parts(shape: tuple[int, ...]) -> None:
    delta = (drawn(shape[0], 3) @ drawn(3, math.prod(shape[1:]))).reshape(shape)
    parts = lora_factors.on(delta, rank=3)
    assert {part: tuple(one.shape) for part, one in parts.items()} == lora_shapes(shape, 3)
    assert float(parts["alpha"]) == 3.0
    made = (parts["up"].flatten(1) @ parts["down"].flatten(1)).reshape(shape)
    assert (made - delta).abs().max() <= 1e-7 * delta.abs().max()
    squares = measured.on(delta)["squares"]
    torch.testing.assert_close(
        squares, torch.linalg.svdvals(delta.flatten(1)).square(), rtol=1e-9, atol=1e-9 * float(squares[0])
    )


def test_a_rank_that_is_not_there_is_filled_with_zeros() -> None:
    parts = lora_factors.on(drawn(4, 6), rank=9)
    assert {part: tuple(one.shape) for part, one in parts.items()} == lora_shapes((4, 6), 9)
    assert not parts["up"][:, 4:].any()
    assert not parts["down"][4:].any()


@pytest.mark.parametrize(("shape", "factor"), [((12, 20), -1), ((12, 20), 4), ((8, 12, 3, 3), 2), ((7, 5), 8)])
def test_a_lokr_is_the_nearest_kronecker_product(shape: tuple[int, ...], factor: int) -> None:
    delta = drawn(*shape)
    sides = lokr_shapes(shape, factor)
    (rows, columns), inner = sides["w1"], sides["w2"]
    blocks = [
        delta[i * inner[0] : (i + 1) * inner[0], j * inner[1] : (j + 1) * inner[1]].flatten()
        for i in range(rows)
        for j in range(columns)
    ]
    u, values, vh = torch.linalg.svd(torch.stack(blocks), full_matrices=False)
    best = torch.zeros_like(delta)
    for place, block in enumerate(blocks):
        i, j = divmod(place, columns)
        nearest = (u[place, 0] * values[0] * vh[0]).reshape(inner)
        assert block.shape == vh[0].shape
        best[i * inner[0] : (i + 1) * inner[0], j * inner[1] : (j + 1) * inner[1]] = nearest
    parts = lokr_factors.on(delta, factor=factor)
    assert {part: tuple(one.shape) for part, one in parts.items()} == {**sides, "alpha": ()}
    w1 = parts["w1"].reshape(rows, columns, *(1 for _ in inner[2:]))
    torch.testing.assert_close(torch.kron(w1, parts["w2"]), best, rtol=0.0, atol=1e-7 * float(values[0]))
    squares = kronecker.on(delta, factor=factor)["squares"]
    torch.testing.assert_close(squares, values.square()[: len(squares)], rtol=1e-9, atol=1e-12 * float(values[0]) ** 2)


@pytest.mark.parametrize("wanted", [-1, 1, 2, 3, 4, 5, 8, 16, 1000])
def test_sizes_are_divided_as_lycoris_does(wanted: int) -> None:
    general = pytest.importorskip("lycoris.functional.general")
    sizes = [*range(1, 130), 250, 320, 360, 512, 768, 1024, 1280, 49408]
    assert [nearest_factor(size, wanted) for size in sizes] == [
        general.factorization(size, wanted)[0] for size in sizes
    ]
