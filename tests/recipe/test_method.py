"""Declarations of merge methods: what is told of them, and those that contradict themselves."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

import remelt as rm
from remelt.core.random import Random
from remelt.errors import RecipeError
from remelt.recipe.method import (
    AnySpace,
    Delta,
    Flag,
    Group,
    Integer,
    Mask,
    Number,
    Reduction,
    Same,
    Shortcut,
    Sums,
    Tensors,
    Text,
    Weight,
    merge_method,
)
from remelt.recipe.node import Call


def total(a: Tensor, b: Tensor, *more: Tensor, power: float, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"total": ((a - b).double().abs() ** power).sum(), "rounds": torch.tensor(float(len(sums)))}


@merge_method(cut="element", name="renamed", reductions=(total,), shortcuts=(Shortcut("alpha", 0.0, "a"),))
def specimen(
    a: Weight,
    b: Delta,
    *more: Same,
    alpha: Mask = 0.5,
    power: Number = 2.0,
    count: Integer = 3,
    exact: Flag = False,
    mode: Text = "fast",
    sums: Sums,
) -> Weight:
    """Nothing that is of use.

    >>> 1
    1
    """
    return a + alpha * b + sums["total"].to(a.dtype)


@merge_method
def plain(a: Same, *, key: str, seed: Integer = 0, random: Random) -> Same:
    return a


def test_a_declaration_tells_of_every_argument() -> None:
    kinds = {parameter.name: parameter.kind for parameter in specimen.parameters}
    assert kinds == {
        "a": "weight",
        "b": "delta",
        "more": "same",
        "alpha": "mask",
        "power": "number",
        "count": "integer",
        "exact": "flag",
        "mode": "text",
    }
    assert specimen.returns == "weight"
    assert specimen.given == {"sums"}
    assert [parameter.name for parameter in specimen.tensor_parameters] == ["a", "b", "more"]
    assert [parameter.name for parameter in specimen.parameters if parameter.is_numeric] == ["alpha", "power"]
    assert [parameter.name for parameter in specimen.parameters if parameter.required] == ["a", "b"]
    assert specimen.documentation.startswith("Nothing that is of use.\n\n>>> 1")
    assert specimen.__doc__ == specimen.function.__doc__


def test_a_signature_is_written_as_a_call() -> None:
    assert specimen.signature == ("renamed(a, b, *more, alpha=0.5, power=2.0, count=3, exact=False, mode='fast')")
    assert repr(rm.weighted_sum) == "<merge method weighted_sum(a, b, *, alpha=0.5)>"
    assert rm.clamp.signature == "clamp(a, *bounds, stiffness=0.0)"


def test_the_engine_gives_what_the_signature_asks_for() -> None:
    assert plain.name == "plain"
    assert plain.declaration.cut == "tensor"
    assert plain.given == {"key", "random"}
    assert plain.signature == "plain(a, *, seed=0)"


def test_a_method_called_with_nodes_is_a_call_and_on_tensors_a_result() -> None:
    call = specimen("a", "b", "c", power=1.0)
    assert isinstance(call, Call)
    assert call.method == "renamed"
    found = specimen.on(tensor([1.0, 2.0]), tensor([3.0, 2.0]), tensor([0.0, 0.0]), power=1.0, alpha=0.5)
    assert found.tolist() == [4.5, 5.0]


def test_a_method_pickles_as_itself_even_under_another_name() -> None:
    assert pickle.loads(pickle.dumps(specimen)) is specimen
    assert pickle.loads(pickle.dumps(rm.slerp)) is rm.slerp


def test_a_method_that_its_module_does_not_hold_says_so_when_unpickled() -> None:
    @merge_method
    def inner(a: Same) -> Same:
        return a

    with pytest.raises(RecipeError, match=r"module .*test_method holds no merge method 'inner'\nhint: keep a method"):
        pickle.loads(pickle.dumps(inner))


def keys_of(layout: Mapping[str, Any]) -> list[Group]:
    return []


def unannotated(a, alpha: Number = 0.5) -> Same:  # type: ignore[no-untyped-def]
    return a


def wrongly_annotated(a: Same, alpha: float = 0.5) -> Same:
    return a


def without_result(a: Same):  # type: ignore[no-untyped-def]
    return a


def takes_anything(a: Same, **rest: Number) -> Same:
    return a


def without_tensors(alpha: Mask = 0.5) -> Mask:
    return alpha


def one(a: Same, *, alpha: Number = 0.5, mode: Text = "x") -> Same:
    return a


def summed(a: Same, *, sums: Sums) -> Same:
    return a


def any_space(a: AnySpace) -> AnySpace:
    return a


def positional_number(a: Tensors, strength: Number = 0.5) -> Tensors:
    return a


def keyword_tensor(a: Tensors, *, b: Tensors) -> Tensors:
    return a


def masked_model(a: Tensors, *, mask: Mask = 0.5) -> Tensors:
    return a


def positional_seed(a: Same, seed: Integer = 0, *, random: Random) -> Same:
    return a


def broken_seed(a: Same, *, seed: Number = 0.0, random: Random) -> Same:
    return a


KINDS = "use Same, Weight, Delta, Mask, Number, Integer, Flag, Text, Sums, Random, Place of remelt.recipe.method"
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (unannotated, {}, f"method unannotated: the annotation of 'a' says no kind\nhint: {KINDS}"),
    (wrongly_annotated, {}, "method wrongly_annotated: the annotation of 'alpha' says no kind"),
    (without_result, {}, "method without_result: the annotation of 'return' says no kind"),
    (takes_anything, {}, r"method takes_anything: a merge method names its arguments, but takes \*\*rest"),
    (without_tensors, {}, "method without_tensors: at least one argument must be a tensor"),
    (one, {"cut": "column"}, "method one: cut is element, row, tensor or model, but got 'column'"),
    (one, {"cut": "model"}, "method one: cut 'model' and a function `keys` belong together"),
    (one, {"limits": {"beta": (0.0, 1.0)}}, r"method one: limits and identities name no argument: \['beta'\]"),
    (one, {"cut": "element", "workspace": lambda shapes, values: 0.0}, "a `workspace` by shape is for cut 'tensor'"),
    (one, {"keys": keys_of}, "method one: cut 'model' and a function `keys` belong together"),
    (one, {"cut": "element", "reductions": (total,)}, "reductions and an argument `sums: Sums` belong together"),
    (summed, {"cut": "element"}, "reductions and an argument `sums: Sums` belong together"),
    (one, {"cut": "element", "conclusion": total}, "method one: a conclusion needs reductions"),
    (
        summed,
        {"cut": "element", "reductions": (total,), "reduces": bool},
        "method summed: where reductions may be left out, a conclusion says what stands for them",
    ),
    (summed, {"reductions": (total,)}, "only a method of cut 'element' or 'row' is streamed after reductions"),
    (
        summed,
        {"cut": "row", "reductions": (Reduction(total, sampled=True),)},
        "rounds of cut 'row' are of all rows of one tensor: none is sampled or across",
    ),
    (summed, {"cut": "row", "reductions": (Reduction(total, across=True),)}, "none is sampled or across"),
    (any_space, {}, "method any_space: arguments of any space need a `mass` rule"),
    (one, {"shortcuts": (Shortcut("beta", 0.0, "a"),)}, "the shortcut at beta=0.0 names no argument"),
    (one, {"shortcuts": (Shortcut("alpha", 1.0, "b"),)}, "the shortcut at alpha=1.0 names no argument"),
    (one, {"casts": "dtype"}, "method one: casts names no argument: 'dtype'"),
    (
        positional_number,
        {"cut": "model", "keys": keys_of},
        r"numbers go by keyword: not so 'strength'\nhint: def f\(a: Tensors, b: Tensors, \*, strength: Number = 0.5\)",
    ),
    (keyword_tensor, {"cut": "model", "keys": keys_of}, "numbers go by keyword: not so 'b'"),
    (masked_model, {"cut": "model", "keys": keys_of}, "numbers go by keyword: not so 'mask'"),
    (positional_seed, {}, r"the seed of random numbers goes by keyword\nhint: \*, seed: Integer = 0"),
    (broken_seed, {}, "the seed of random numbers goes by keyword"),
]


@pytest.mark.parametrize(
    ("function", "declared", "message"), REFUSED, ids=[f"{f.__name__} {', '.join(d)}" for f, d, _ in REFUSED]
)
def test_a_declaration_that_contradicts_itself_is_refused(
    function: Any, declared: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        merge_method(**declared)(function)


def test_a_declaration_of_cut_model_is_accepted() -> None:
    def good(a: Tensors, *rest: Tensors, strength: Number = 0.5) -> Tensors:
        return a

    good.__annotations__ = {"a": Tensors, "rest": Tensors, "strength": Number, "return": Tensors}
    declared = merge_method(cut="model", keys=keys_of)(good)
    assert declared.signature == "good(a, *rest, strength=0.5)"
