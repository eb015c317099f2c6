"""Tall matrices are streamed: to the same bits for any tile and thread, near what whole tensors give, and cached."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.check.program import Apply
from remelt.core.tensor_info import batch_of_rows
from remelt.methods import METHODS
from remelt.planning import cost

TALL = ((6000, 48), (4096, 33), (64, 20, 3, 3), (9000, 2), (400, 3, 5))
TRUNCATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("truncate_rank", {"rank": 5}),
    ("truncate_rank", {"share": 0.25}),
    ("truncate_rank_randomised", {"rank": 1}),
    ("truncate_rank_randomised", {"rank": 3}),
    ("truncate_rank_randomised", {"rank": 30}),
)


def drawn(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers in which some directions matter more than others."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator).flatten(1)
    return (rows * torch.linspace(3.0, 0.5, rows.shape[1]) ** 2).reshape(shape).to(dtype)


def recipe_of(name: str, values: dict[str, Any], *models: Any) -> Any:
    return METHODS[name](*(rm.model(one, space="delta") for one in models), **values)


def cuts_of(recipe: Any) -> list[str]:
    """How each call of a plan is cut."""
    from remelt.api.options import MergeOptions
    from remelt.api.prepare import prepare
    from remelt.api.recipes import load_recipe

    with prepare([load_recipe(recipe)], [None], MergeOptions(), METHODS) as prepared:
        (group,) = prepared.groups
        tasks = group.plan.tasks
        return [
            one.method.declaration.cut
            for planned in tasks
            for one in planned.task.program.instructions
            if isinstance(one, Apply)
        ]


@pytest.mark.parametrize("shape", TALL, ids=str)
@pytest.mark.parametrize(("name", "values"), TRUNCATIONS, ids=str)
def test_truncations_are_those_of_whole_tensors(shape: tuple[int, ...], name: str, values: dict[str, Any]) -> None:
    tensor = drawn(shape)
    found = rm.merge(recipe_of(name, values, {"w": tensor}), threads=2)["w"]
    due = METHODS[name].on(tensor, **values)
    left, least = (float((tensor - one).double().norm()) for one in (found, due))
    assert abs(left - least) <= 1e-5 * float(tensor.norm()) + (0.01 * least if "randomised" in name else 0.0)
    if "randomised" not in name:
        torch.testing.assert_close(found, due, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [*TALL[:3], (300, 40, 1, 1)], ids=str)
@pytest.mark.parametrize("alignment", [0.0, 0.4, 1.0, 2.0])
@pytest.mark.parametrize(("alpha", "centralization"), [(0.0, 1.0), (0.3, 0.5), (1.0, 0.0)])
def test_rotations_are_those_of_whole_tensors(
    shape: tuple[int, ...], alignment: float, alpha: float, centralization: float
) -> None:
    a, b = drawn(shape, 1), drawn(shape, 2) + 0.5
    values = {"alignment": alignment, "alpha": alpha, "centralization": centralization}
    found = rm.merge(recipe_of("rotate", values, {"w": a}, {"w": b}), threads=2)["w"]
    torch.testing.assert_close(found, METHODS["rotate"].on(a, b, **values), atol=2e-5, rtol=1e-5)


def test_a_rotation_within_few_directions_moves_nothing_beside_them() -> None:
    directions = torch.linalg.qr(torch.randn(24, 5, generator=torch.Generator().manual_seed(3))).Q
    a, b = (drawn((400, 5), seed) @ directions.T for seed in (1, 2))
    for alignment in (0.5, 1.0):
        found = rm.merge(recipe_of("rotate", {"alignment": alignment}, {"w": a}, {"w": b}))["w"]
        torch.testing.assert_close(found, METHODS["rotate"].on(a, b, alignment=alignment), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "values", "shape", "cut"),
    [
        ("truncate_rank", {"rank": 4}, (400, 100), "row"),
        ("truncate_rank", {"rank": 4}, (399, 100), "tensor"),
        ("truncate_rank", {"rank": 4}, (100, 400), "tensor"),
        ("truncate_rank", {"rank": 4, "method": "svd"}, (400, 100), "tensor"),
        ("truncate_rank", {"rank": 0}, (400, 100), "tensor"),
        ("truncate_rank", {"rank": 100}, (400, 100), "tensor"),
        ("truncate_rank", {"rank": 4}, (400,), "tensor"),
        ("truncate_rank_randomised", {"rank": 4}, (400, 100), "row"),
        ("truncate_rank_randomised", {"rank": 60}, (400, 100), "row"),
        ("truncate_rank_randomised", {"share": 1.0}, (400, 100), "tensor"),
        ("rotate", {"alignment": 0.5}, (400, 100), "row"),
        ("rotate", {"alignment": 0.5}, (16, 16, 3, 3), "row"),
        ("rotate", {"alignment": 0.5}, (16, 16, 1, 1), "tensor"),
        ("rotate", {"alignment": 0.0}, (400, 100), "tensor"),
    ],
    ids=str,
)
def test_only_tall_ones_are_streamed(name: str, values: dict[str, Any], shape: tuple[int, ...], cut: str) -> None:
    models = [{"w": drawn(shape, seed)} if len(shape) > 1 else {"w": torch.zeros(shape)} for seed in range(2)]
    assert cuts_of(recipe_of(name, values, *models[: 2 if name == "rotate" else 1])) == [cut]


def test_numbers_that_differ_by_key_are_taken_as_they_come() -> None:
    model = {f"layers.{layer}.up.weight": drawn((300, 20), layer) for layer in range(3)}
    share = rm.keys({"layers.0.*": 0.1, "layers.1.*": 0.0, "layers.2.*": 1.0})
    found = rm.merge(METHODS["truncate_rank"](rm.model(model, space="delta"), rank=7, share=share))
    for (key, tensor), values in zip(model.items(), ({"share": 0.1}, {"rank": 7}, {"share": 1.0}), strict=True):
        torch.testing.assert_close(found[key], METHODS["truncate_rank"].on(tensor, **values), atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 2000),
    width=st.integers(2, 40),
    tile=st.sampled_from([2**12, 2**14, 2**17]),
    threads=st.integers(1, 4),
    name=st.sampled_from(["truncate_rank", "truncate_rank_randomised", "rotate"]),
)
def test_no_tile_or_thread_changes_a_bit(height: int, width: int, tile: int, threads: int, name: str) -> None:
    height += 4 * width
    models = [{"w": drawn((height, width), seed)} for seed in range(2 if name == "rotate" else 1)]
    values: dict[str, Any] = {"alignment": 0.3, "alpha": 0.2} if name == "rotate" else {"rank": 1}
    whole = rm.merge(recipe_of(name, values, *models), threads=1)["w"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "TILE", tile)
        found = rm.merge(recipe_of(name, values, *models), threads=threads)["w"]
    assert torch.equal(found, whole)


@pytest.mark.parametrize("name", ["truncate_rank", "truncate_rank_randomised", "rotate"])
def test_threads_share_a_large_one(name: str, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    shape = (2 * cost.FOLD // 64 + 777, 64)
    models = [write_model(tmp_path / str(seed), {"w": drawn(shape, seed, torch.float16)}) for seed in range(2)]
    recipe = recipe_of(name, {} if name == "rotate" else {"rank": 6}, *models[: 2 if name == "rotate" else 1])
    found = [rm.merge(recipe, threads=threads)["w"] for threads in (1, 3)]
    assert torch.equal(*found)
    planned = rm.plan(recipe, output=tmp_path / "out.safetensors", threads=2)
    assert planned.peak_memory < 64 * 2**20 < 2 * 4 * shape[0] * shape[1]


@pytest.mark.parametrize(("name", "one", "other"), [
    ("truncate_rank", {"rank": 3}, {"rank": 9}),
    ("rotate", {"alignment": 0.3}, {"alignment": 0.8, "alpha": 0.4}),
])  # fmt: skip
def test_what_was_found_serves_other_numbers(
    monkeypatch: pytest.MonkeyPatch, name: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    calls: list[str] = []
    for function in (torch.linalg.eigh, torch.linalg.svd):

        def counted(*args: Any, real: Any = function, **more: Any) -> Any:
            calls.append(real.__name__)
            return real(*args, **more)

        monkeypatch.setattr(torch.linalg, function.__name__.removeprefix("linalg_"), counted)
    models = [{"w": drawn((600, 24), seed)} for seed in range(2 if name == "rotate" else 1)]
    cache = rm.Cache()
    rm.merge(recipe_of(name, one, *models), cache=cache)
    assert calls
    calls.clear()
    found = rm.merge(recipe_of(name, other, *models), cache=cache)["w"]
    assert not calls
    assert torch.equal(found, rm.merge(recipe_of(name, other, *models))["w"])


@pytest.mark.parametrize("name", ["truncate_rank", "truncate_rank_randomised"])
def test_what_is_not_finite_stays_as_it_is(name: str) -> None:
    tensor = drawn((300, 20))
    tensor[7, 3] = float("inf")
    found = rm.merge(recipe_of(name, {"rank": 2}, {"w": tensor}), nonfinite="keep")["w"]
    assert torch.equal(found, tensor)


def test_batches_are_powers_of_two_and_bounded() -> None:
    for width in range(1, 40_000, 7):
        rows = batch_of_rows(width)
        assert rows & (rows - 1) == 0
        assert rows >= 8
        assert rows * width <= max(2**22, 8 * width)


def test_what_makes_a_call_survives_pickling() -> None:
    from remelt.methods import tall

    for method in (tall._rotate_tall, tall._rotate_tall_in_part, tall._truncate_tall, tall._truncate_tall_randomised):
        assert pickle.loads(pickle.dumps(method)) is method
