"""What a recipe means does not depend on what it is run with, on a number's value, or on how its models are spelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import tensor

import remelt as rm
from remelt.api.merging import prepare_merges, run_prepared
from remelt.api.options import MergeOptions
from remelt.api.recipes import Source

NAN = float("nan")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(**models: dict[str, Any]) -> None:
    for name, tensors in models.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, f"{name}.safetensors")


def together(*recipes: Any, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Several recipes in one run, to memory."""
    sources = [Source(recipe, Path.cwd(), f"r{number}") for number, recipe in enumerate(recipes)]
    chosen = MergeOptions(**options)
    with prepare_merges(sources, [None] * len(sources), chosen) as prepared:
        *_, merged = run_prepared(prepared, chosen)
    return [merged.tensors[position] for position in range(len(recipes))]  # type: ignore[union-attr]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


def deep(layers: int, value: float) -> dict[str, torch.Tensor]:
    return {f"layers.{index}.mlp.weight": torch.full((2, 2), value) for index in range(layers)}


@pytest.mark.parametrize(
    ("models", "recipes", "options"),
    [
        pytest.param(
            {"i": {"x": tensor([7])}, "b": {"x": tensor([2.0])}, "c": {"x": tensor([4.0])}},
            [rm.fallback("i", "b"), rm.weighted_sum("b", "c")],
            {},
            id="an integer in another's model",
        ),
        pytest.param(
            {"n": {"x": tensor([NAN])}, "b": {"x": tensor([2.0])}, "c": {"x": tensor([4.0])}},
            [
                rm.weighted_sum("n", "b"),
                rm.weighted_sum("b", "c"),
                rm.weighted_sum("b", "c", alpha=rm.keys({"x": 0.25})),
            ],
            {"nonfinite": "missing"},
            id="NaN in another's model",
        ),
        pytest.param(
            {"a": deep(3, 0.0), "b": deep(3, 1.0), "d": deep(5, 2.0)},
            [rm.weighted_sum("a", "b", alpha=rm.depth([0, 1])), rm.model("b") | rm.model("d")],
            {},
            id="another's deeper model",
        ),
        pytest.param(
            {"a": {"z": tensor([9.0])}, "b": {"z": tensor([19.0])}, "c": {"y": tensor([1.0])}},
            [rm.n_average("a", "b", "c"), rm.n_average("b", "a", "c")],
            {"missing": "first"},
            id="another's order of models",
        ),
        pytest.param(
            {"a": deep(3, 0.0), "b": deep(3, 1.0), "c": deep(3, 5.0)},
            [
                rm.slerp("a", "b", alpha=rm.blocks({"layers.1": 0.2}) | 0.7),
                rm.weighted_sum("b", "c", alpha=rm.blocks({"layers.1": 1.0}) | 0.1),
                rm.add_difference("a", rm.model("c") - rm.model("b"), alpha=rm.blocks({"layers.2": 0.3}) | 0.0),
            ],
            {},
            id="block weights of several",
        ),
    ],
)
def test_recipes_run_together_give_what_each_gives_alone(models: Any, recipes: Any, options: Any) -> None:
    write(**models)
    for found, recipe in zip(together(*recipes, **options), recipes, strict=True):
        assert same(found, rm.merge(recipe, **options))


def test_recipes_run_together_read_each_tensor_once(folder: Path) -> None:
    write(a=deep(3, 0.0), b=deep(3, 1.0), c=deep(3, 5.0))
    recipes = [rm.weighted_sum("a", "b"), rm.weighted_sum("b", "c", alpha=rm.blocks({"layers.1": 0.3}) | 0.1)]
    sources = [Source(recipe, folder, f"r{number}") for number, recipe in enumerate(recipes)]
    with prepare_merges(sources, [None, None], MergeOptions()) as prepared:
        (group,) = prepared.groups
        assert group.plan.bytes_read == 3 * 3 * 16


def test_a_tensor_of_another_shape_never_stands_in_for_one_with_nan() -> None:
    write(
        a={"x": tensor([NAN, 0.0, 0.0, 0.0])},
        b={"x": tensor([1.0, NAN, 1.0, 1.0])},
        c={"x": tensor([7.0, 7.0]), "z": tensor([5.0, 6.0])},
    )
    found = rm.merge(rm.weighted_sum("a", "b") | rm.model("c"), nonfinite="missing")
    assert found["x"].shape == (4,)
    assert found["x"].isnan().any()


@pytest.mark.parametrize("spelled", [rm.model, str])
def test_the_first_model_is_the_leftmost_however_it_is_spelled(spelled: Any) -> None:
    write(a={"z": tensor([9.0])}, b={"z": tensor([19.0])}, c={"y": tensor([1.0])})
    recipe = rm.weighted_sum(spelled("a"), rm.weighted_sum(spelled("b"), spelled("c")))
    assert rm.merge(recipe, missing="first")["z"].item() == 9.0
    shared = rm.weighted_sum("b", "c")
    recipe = rm.weighted_sum(rm.weighted_sum(shared, spelled("a")), shared)
    assert rm.merge(recipe, missing="first")["z"].item() == 19.0


@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0])
def test_a_mismatch_of_shapes_is_never_hidden(alpha: float) -> None:
    write(a={"x": torch.ones(2)}, b={"x": torch.ones(3)}, d={"x": torch.ones(2)})
    mixed = rm.weighted_sum("a", "b", alpha=alpha)
    for recipe in (mixed, mixed | rm.model("d"), rm.weighted_sum(mixed, "d", alpha=0.0)):
        with pytest.raises(rm.CheckError, match=r"x is \[3\], but \[2\] in a.safetensors"):
            rm.merge(recipe)
    with pytest.raises(rm.CheckError, match=r"x is \[3\], but \[2\] in a.safetensors"):
        rm.merge(mixed, fallback="d")


@pytest.mark.parametrize("order", ["ib", "bi"])
def test_integers_are_not_mixed_with_floating_point_numbers_whatever_their_order(order: str) -> None:
    write(i={"x": tensor([1, 2]), "y": torch.ones(2)}, b={"x": torch.ones(2), "y": torch.ones(2)})
    with pytest.raises(rm.CheckError) as caught:
        rm.merge(rm.weighted_sum(*order))
    assert "i.safetensors" in str(caught.value)
    assert "x is I64, but holds floating-point numbers in b.safetensors: weighted_sum mixes no integers" in str(
        caught.value
    )
    found = rm.merge(rm.fallback(*order))
    assert found["x"].dtype is (torch.int64 if order == "ib" else torch.float32)


def test_integers_behind_a_fallback_are_copied_where_all_of_a_call_are() -> None:
    write(i={"x": tensor([1])}, j={"x": tensor([5])}, b={"x": torch.ones(1), "y": torch.ones(1)})
    found = rm.merge(rm.weighted_sum("i", "j") | rm.model("b"))
    assert found["x"].equal(tensor([1]))


def test_a_mask_may_be_of_integers() -> None:
    write(a={"x": torch.zeros(4)}, b={"x": torch.ones(4)}, mask={"x": tensor([0, 1, 1, 0])})
    found = rm.merge(rm.weighted_sum("a", "b", alpha=rm.model("mask", space="param")))
    assert found["x"].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_the_element_type_never_depends_on_a_number() -> None:
    write(
        a={"x": torch.zeros(2).half(), "y": torch.zeros(2).half()},
        b={"x": torch.full((2,), 0.1), "y": torch.full((2,), 0.1)},
    )
    found = rm.merge(rm.weighted_sum("a", "b", alpha=rm.keys({"x": 1.0}) | 0.5))
    assert {key: value.dtype for key, value in found.items()} == {"x": torch.float16, "y": torch.float16}
    assert found["x"].equal(torch.full((2,), 0.1).half())


def test_what_is_only_copied_keeps_its_type() -> None:
    from remelt.archs.shapes import sd1_shapes

    shapes = sd1_shapes(32, extras=True)
    tensors = {k: torch.ones(v.shape) if v.dtype.is_float else torch.zeros(v.shape).long() for k, v in shapes.items()}
    write(a=tensors, b={key: 2 * value for key, value in tensors.items()})
    rm.merge(rm.weighted_sum("a", "b"), output="o.safetensors", dtype="fp16")
    found = load_file("o.safetensors")
    assert found["alphas_cumprod"].dtype is torch.float32
    assert found["alphas_cumprod"].eq(1).all()
    assert found["model.diffusion_model.out.2.weight"].dtype is torch.float16


def test_numbers_that_add_up_but_for_round_off_make_a_weight() -> None:
    write(**{name: {"x": torch.ones(2)} for name in "abcd"})
    a, b, c, d = (rm.model(name) for name in "abcd")
    mixed = 0.7 * a + 0.2 * b + 0.1 * c
    for recipe in (mixed | d, a + rm.scale(mixed - d, alpha=rm.keys({"x": 0.5}) | 0.1), rm.weighted_sum(mixed, d)):
        assert torch.allclose(rm.merge(recipe)["x"], torch.ones(2))
    write(e={"x": torch.ones(2), "z": torch.ones(1)})
    assert set(rm.merge(0.7 * a + 0.2 * b + 0.1 * rm.model("e"), missing="first")) == {"x", "z"}


def test_infinities_that_arithmetic_makes_are_refused_by_key() -> None:
    write(a={"x": tensor([3e38])}, b={"x": tensor([-3e38])}, w={"x": tensor([1e300], dtype=torch.float64)})
    a, b = rm.model("a"), rm.model("b")
    for recipe in (rm.add_difference(a, a - b), rm.add_difference(a, a - b, alpha=1e30)):
        with pytest.raises(rm.NonFiniteError, match="result: x overflows F32"):
            rm.merge(recipe)
        assert rm.merge(recipe, nonfinite="keep")["x"].isinf().all()
    with pytest.raises(
        rm.NonFiniteError, match=r"x overflows torch.float32 arithmetic; --compute-dtype float64 does not"
    ):
        rm.merge(rm.weighted_sum("w", "w"))
    assert rm.merge(rm.weighted_sum("w", rm.model("w")), compute_dtype="float64")["x"].item() == 1e300


def test_a_plan_counts_the_look_for_nan() -> None:
    write(a={"x": torch.ones(1000)}, b={"x": torch.ones(1000)})
    recipe = rm.weighted_sum("a", "b")
    assert rm.plan(recipe, nonfinite="missing").bytes_read == 2 * rm.plan(recipe).bytes_read
