"""What repeated merges share: found once, never mixed up, bit for bit what is found anew, and within its size."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import remelt as rm
from remelt.engine.tally import Tally, together
from remelt.errors import BudgetError, RecipeError
from remelt.methods import METHODS
from remelt.planning.cost import FOLD
from remelt.recipe.method import Number, Prepared, Same, merge_method

CALLS: list[float] = []


def decomposition(a: Tensor, b: Tensor, *, strength: float) -> Mapping[str, Tensor]:
    CALLS.append(strength)
    return {"mean": strength * (a + b).mean().reshape(1)}


@merge_method(cut="tensor", prepares=decomposition)
def prepared_mix(a: Same, b: Same, *, strength: Number = 1.0, alpha: Number = 0.5, prepared: Prepared) -> Same:
    return a + alpha * prepared["mean"]


SPECIMENS = True
SIZES = {"layers.0.x.w": 1000, "layers.1.x.w": 300_000, "large": 2 * FOLD + 77, "empty": 0}


def tensors(seed: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {key: torch.randn(size, generator=drawn) for key, size in SIZES.items()}


@pytest.fixture(params=["files", "memory"])
def models(request: pytest.FixtureRequest, tmp_path: Path, write_model: Callable[..., Path]) -> list[Any]:
    made = [tensors(seed) for seed in range(3)]
    if request.param == "memory":
        return [rm.model(one) for one in made]
    return [rm.model(write_model(tmp_path / str(seed), one)) for seed, one in enumerate(made)]


def read(recipe: Any, **options: Any) -> tuple[dict[str, Tensor], int]:
    """What is merged, and how many bytes of inputs were read for it."""
    from remelt.api.merging import Merged, prepare_merges, run_prepared
    from remelt.api.options import MergeOptions
    from remelt.api.recipes import load_recipe

    chosen = MergeOptions(threads=2, **options)
    with prepare_merges([load_recipe(recipe)], [None], chosen) as prepared:
        (*_, merged) = run_prepared(prepared, chosen)
    assert isinstance(merged, Merged)
    tally: Tally = together(merged.tallies)
    return merged.tensors[0], tally.read


RECIPES: dict[str, Callable[[Any, Any, Any, float], Any]] = {
    "slerp": lambda a, b, c, x: rm.slerp(a, b, alpha=x),
    "slerp by block": lambda a, b, c, x: rm.slerp(a, b, alpha=rm.keys({"layers.0.*": x}) | 0.5),
    "ties": lambda a, b, c, x: a + x * rm.ties_sum(b - a, c - a, k=0.2, weights=[1.0, x]),
    "both": lambda a, b, c, x: rm.weighted_sum(rm.slerp(a, b, alpha=0.3), rm.slerp(b, c, alpha=x), alpha=x),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_numbers_do_not_change_is_found_once(name: str, models: list[Any]) -> None:
    cache = rm.Cache("64MiB")
    _, first = read(RECIPES[name](*models, 0.3), cache=cache)
    for number in (0.3, 0.7):
        found, again = read(RECIPES[name](*models, number), cache=cache)
        due, _ = read(RECIPES[name](*models, number))
        assert all(torch.equal(found[key], due[key]) for key in SIZES)
        assert again <= 0.7 * first
    assert cache.hits >= 2 * (len(SIZES) - 1)


def test_other_models_and_other_numbers_are_not_mixed_up(models: list[Any]) -> None:
    a, b, c = models
    cache = rm.Cache()
    for recipe in (
        rm.slerp(a, b, alpha=0.3),
        rm.slerp(b, a, alpha=0.3),
        rm.slerp(a, c, alpha=0.3),
        rm.slerp(rm.scale(a - b, 0.5), c - b, alpha=0.3),
        rm.slerp(rm.scale(a - b, 0.25), c - b, alpha=0.3),
        a + rm.ties_sum(b - a, c - a, k=0.2),
        a + rm.ties_sum(b - a, c - a, k=[0.2, 0.3]),
        a + rm.ties_sum(c - a, b - a, k=[0.2, 0.3]),
    ):
        for _ in range(2):
            found, _ = read(recipe, cache=cache)
            due, _ = read(recipe)
            assert all(torch.equal(found[key], due[key]) for key in SIZES)


def test_a_model_that_changed_is_another(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    one, other = tensors(0), tensors(1)
    paths = [write_model(tmp_path / name, content) for name, content in (("a", one), ("b", other))]
    cache = rm.Cache()
    recipe = rm.slerp(*map(rm.model, paths), alpha=0.3)
    read(recipe, cache=cache)
    write_model(tmp_path / "new", tensors(2))
    os.replace(tmp_path / "new.safetensors", paths[0])
    found, _ = read(recipe, cache=cache)
    due, _ = read(recipe)
    assert all(torch.equal(found[key], due[key]) for key in SIZES)
    held = rm.model(one)
    read(rm.slerp(held, paths[1], alpha=0.3), cache=cache)
    one["large"].mul_(-1.0)
    found, _ = read(rm.slerp(held, paths[1], alpha=0.3), cache=cache)
    due, _ = read(rm.slerp(held, paths[1], alpha=0.3))
    assert all(torch.equal(found[key], due[key]) for key in SIZES)


def test_the_same_content_is_known_wherever_it_lies(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    paths = [write_model(tmp_path / name, tensors(seed)) for seed, name in enumerate(("a", "b"))]
    cache = rm.Cache()
    read(rm.slerp(*map(rm.model, paths), alpha=0.3), cache=cache)
    misses = cache.misses
    moved = [write_model(tmp_path / "elsewhere" / path.name, tensors(seed)) for seed, path in enumerate(paths)]
    found, _ = read(rm.slerp(*map(rm.model, moved), alpha=0.6), cache=cache)
    os.utime(paths[0])
    again, _ = read(rm.slerp(*map(rm.model, paths), alpha=0.6), cache=cache)
    held, _ = read(rm.slerp(rm.model(tensors(0)), rm.model(tensors(1)), alpha=0.6), cache=cache)
    assert cache.misses == misses
    assert all(torch.equal(found[key], one[key]) for one in (again, held) for key in SIZES)


def test_what_a_method_prepares_is_kept(models: list[Any]) -> None:
    cache = rm.Cache()
    mix = METHODS["prepared_mix"]
    CALLS.clear()
    for alpha in (0.1, 0.2, 0.3):
        found, _ = read(mix(models[0], models[1], alpha=alpha), cache=cache)
        due, _ = read(mix(models[0], models[1], alpha=alpha))
        assert all(torch.equal(found[key], due[key]) for key in SIZES if key != "empty")
    assert len(CALLS) == 4 * len(SIZES)
    read(mix(models[0], models[1], strength=2.0), cache=cache)
    assert len(CALLS) == 5 * len(SIZES)


@pytest.mark.parametrize(("k", "share"), [([0.2, 0.5], 0.55), (0.2, 0.55)])
def test_counts_over_the_whole_model_are_found_once(models: list[Any], k: Any, share: float) -> None:
    a, b, c = models
    cache = rm.Cache()

    def recipe(scaling: float, k: Any = k) -> Any:
        return a + scaling * rm.ties(b - a, c - a, k=k, trim="model")

    _, first = read(recipe(0.3), cache=cache)
    for scaling in (0.3, 0.7):
        found, again = read(recipe(scaling), cache=cache)
        due, _ = read(recipe(scaling))
        assert all(torch.equal(found[key], due[key]) for key in SIZES)
        assert again <= share * first  # one pass, no longer three
    for other in (recipe(0.3, 0.1), a + rm.ties(c - a, b - a, k=k, trim="model"), recipe(0.3, [0.5, 0.2])):
        found, _ = read(other, cache=cache)
        due, _ = read(other)
        assert all(torch.equal(found[key], due[key]) for key in SIZES)


def test_rotations_and_low_ranks_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = ({"w": torch.randn(48, 40), "v": torch.randn(24, 64)} for _ in range(3))
    calls: list[str] = []
    for name in ("eigh", "svd", "qr"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *args, name=name, real=real, **more: (calls.append(name), real(*args, **more))[1]
        )
    base, tuned = rm.model(a), rm.model(b)
    others = (tuned - base, rm.model(c) - base)
    for recipe in (
        lambda x: METHODS["rotate"](base, tuned, alignment=x, alpha=x / 2),
        lambda x: base + x * METHODS["truncate_kronecker"](others[0], ratio=0.4),
        lambda x: base + x * METHODS["truncate_rank_randomised"](others[1], rank=3),
        lambda x: base + METHODS["truncate_rank"](others[1], rank=round(10 * x)),
    ):
        cache = rm.Cache()
        rm.merge(recipe(0.3), cache=cache, threads=1)
        assert calls
        calls.clear()
        found = rm.merge(recipe(0.8), cache=cache, threads=1)
        assert not calls
        due = rm.merge(recipe(0.8), threads=1)
        assert all(torch.equal(found[key], due[key]) for key in a)
        calls.clear()


def test_what_was_not_used_for_longest_goes_first() -> None:
    cache = rm.Cache(10_000)
    for name in (b"a", b"b", b"c"):
        cache.put(name, {"x": torch.zeros(500)})
    assert cache.get(b"a") is not None
    cache.put(b"d", {"x": torch.zeros(500)})
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    cache.put(b"e", {"x": torch.zeros(5000)})  # larger than all of it
    assert cache.get(b"e") is None
    assert cache.held == 3 * (1024 + 2000) <= cache.size
    cache.clear()
    assert (cache.held, cache.get(b"a")) == (0, None)


def test_its_size_is_part_of_the_budget(models: list[Any]) -> None:
    with pytest.raises(BudgetError):
        read(rm.slerp(models[0], models[1], alpha=0.3), memory="1GiB", cache=rm.Cache("1GiB"))


def test_what_prepares_says_so_in_full() -> None:
    def whole(a: Same, *, prepared: Prepared) -> Same:
        return a

    with pytest.raises(
        RecipeError, match="`prepares`, an argument `prepared: Prepared` and cut 'tensor' or 'row' belong"
    ):
        merge_method(cut="tensor")(whole)
    with pytest.raises(RecipeError, match="belong together"):
        merge_method(cut="element", prepares=decomposition)(whole)
