"""Binding: arguments of calls to parameters of methods, and the words in which a wrong one is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, tensor

import remelt as rm
from remelt.errors import RecipeError, Span
from remelt.recipe.method import Flag, Integer, Mask, Method, Number, Numbers, Same, Sums, Text, merge_method
from remelt.recipe.node import Call, Model, Value
from remelt.recipe.signature import bind, name_models, reduce_tile

A, B, MASK = rm.model("a"), rm.model("b"), rm.model("m", space="param")
BLOCKS = rm.blocks(IN00=0.2) | 0.5


@merge_method(cut="element")
def mixed(
    a: Same,
    b: Same,
    *,
    alpha: Mask = 0.5,
    power: Number = 2.0,
    count: Integer = 1,
    exact: Flag = False,
    mode: Text = "fast",
    limit: Number = None,  # type: ignore[assignment]
) -> Same:
    return a


@merge_method(cut="element")
def strict(a: Same, mode: Text) -> Same:
    return a


def values(method: Method[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(bind(method, method(*args, **kwargs)).values)


def test_defaults_fill_what_a_call_leaves_out() -> None:
    assert values(mixed, A, B) == {
        "alpha": 0.5,
        "power": 2.0,
        "count": 1,
        "exact": False,
        "mode": "fast",
        "limit": None,
    }


def test_values_are_taken_as_the_function_takes_them() -> None:
    given = values(mixed, A, B, alpha=1, power=BLOCKS, count=7, exact=True, mode="slow", limit=3)
    assert given == {"alpha": 1.0, "power": BLOCKS, "count": 7, "exact": True, "mode": "slow", "limit": 3.0}
    assert isinstance(given["alpha"], float)
    assert values(mixed, A, B, alpha=rm.search(0, 1))["alpha"] == rm.search(0, 1)


def test_operands_come_in_the_order_of_the_function() -> None:
    bound = bind(mixed, Call("mixed", (A,), (("alpha", MASK), ("b", B))))
    assert [(parameter.name, node) for parameter, node in bound.operands] == [("a", A), ("b", B), ("alpha", MASK)]
    assert "alpha" not in dict(bound.values)
    several = bind(rm.n_average, rm.n_average(A, B, A))
    assert [(parameter.name, node) for parameter, node in several.operands] == [("models", n) for n in (A, B, A)]


def test_a_text_is_a_model_only_where_a_model_is_due() -> None:
    bound = bind(strict, strict("x.safetensors", "y"))
    assert [repr(node) for _, node in bound.operands] == ["model('x.safetensors')"]
    assert bound.values == (("mode", "y"),)


def test_texts_that_mean_models_can_be_written_so() -> None:
    call = Call("strict", (Value("x"), Value("x")))
    named = name_models(strict, call)
    assert [repr(child) for child in named.children] == ["model('x')", "'x'"]
    assert name_models(strict, named) is named


REFUSED: list[tuple[Any, str]] = [
    (lambda: mixed(A), "mixed needs 'b'\nhint: mixed\\(a, b, \\*, alpha=0.5"),
    (lambda: mixed(), "mixed needs 'a'"),
    (lambda: rm.n_average(), r"n_average needs at least one model\nhint: n_average\(\*models, weights=1.0\)"),
    (lambda: mixed(A, B, 0.3), "mixed takes 2 positional arguments, but got 3\nhint: .*; the rest goes by name"),
    (lambda: rm.cast(A, "fp16", "x"), "cast takes 2 positional arguments, but got 3"),
    (lambda: mixed(A, B, alhpa=0.3), r"mixed has no argument 'alhpa'\nhint: did you mean 'alpha'\? mixed\("),
    (lambda: mixed(A, B, zzz=0.3), r"mixed has no argument 'zzz'\nhint: mixed\(a, b"),
    (lambda: mixed(A, B, a=B), "mixed got 'a' twice"),
    (lambda: rm.n_average(A, models=B), "n_average has no argument 'models'"),
    (lambda: mixed(A, 0.5), "mixed needs a model for 'b', but got 0.5"),
    (lambda: mixed(A, B, alpha="m"), r"mixed needs a number, block weights or a tensor for 'alpha', but got 'm'"),
    (lambda: mixed(A, B, alpha="m"), r'a mask from a file is model\("m", space="param"\)'),
    (lambda: mixed(A, B, alpha="model('m')"), r"a mask from a file is model\('m'\), without quotes around it"),
    (lambda: mixed(A, B, alpha=True), "mixed needs a number, block weights or a tensor for 'alpha', but got True"),
    (lambda: mixed(A, B, alpha=None), "mixed needs a number, block weights or a tensor for 'alpha', but got None"),
    (lambda: mixed(A, B, power="2"), "mixed needs a number or block weights for 'power', but got '2'"),
    (lambda: mixed(A, B, power=A), "mixed needs a number or block weights for 'power', but got a model"),
    (lambda: mixed(A, B, power=A - B), "mixed needs a number or block weights for 'power', but got a computed tensor"),
    (lambda: mixed(A, B, power=float("nan")), "a recipe's numbers are finite, but got nan"),
    (lambda: mixed(A, B, count=1.0), "mixed needs a whole number for 'count', but got 1.0"),
    (lambda: mixed(A, B, count=True), "mixed needs a whole number for 'count', but got True"),
    (lambda: mixed(A, B, count=BLOCKS), "mixed needs a whole number for 'count', but got blocks"),
    (lambda: mixed(A, B, exact=1), "mixed needs True or False for 'exact', but got 1"),
    (lambda: mixed(A, B, mode=1), "mixed needs a text for 'mode', but got 1"),
    (lambda: mixed(A, B, mode=A), "mixed needs a text for 'mode', but got a model"),
    (lambda: mixed(A, B, exact=A), "mixed needs True or False for 'exact', but got a model"),
    (
        lambda: rm.ties_sum(A, B, k=[0.5]),
        "'k' has a number for each model, but got 1 number for 2 models\nhint: one number alone stands for all of them",
    ),
    (lambda: rm.ties_sum(A, k=[]), "'k' has a number for each model, but got 0 numbers for 1 model"),
    (
        lambda: rm.ties_sum(A, B, k=[0.5, "x"]),
        r"ties_sum needs a number, block weights, or a list of them, for 'k', but got \(0.5, 'x'\)",
    ),
    (lambda: rm.ties_sum(A, k=B), "ties_sum needs numbers for 'k', but got a model"),
]


def test_numbers_are_one_for_each_model() -> None:
    assert values(rm.ties_sum, A, B)["k"] == (1.0, 1.0)
    assert values(rm.ties_sum, A, B, k=0.25)["k"] == (0.25, 0.25)
    assert values(rm.ties_sum, A, B, k=[1, BLOCKS])["k"] == (1.0, BLOCKS)
    assert values(rm.ties_sum, A, B, k=BLOCKS)["k"] == (BLOCKS, BLOCKS)


def test_numbers_need_models_beside_them() -> None:
    def lonely(a: Same, *, weights: Numbers = 1.0) -> Same:
        return a

    with pytest.raises(RecipeError, match="numbers for each model go with \\*models, but 'weights' has none beside it"):
        merge_method(cut="element")(lonely)


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_a_method_does_not_take_is_refused(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_none_is_taken_where_it_is_the_default() -> None:
    assert values(mixed, A, B, limit=None)["limit"] is None


def test_an_error_points_at_the_argument_in_the_text() -> None:
    line = "weighted_sum(a, b, alhpa=0.3)"
    span, place = Span("x.mecha", line, 1, 1, len(line)), Span("x.mecha", line, 1, 20, 5)
    call = Call("weighted_sum", (Model("a"), Model("b")), (("alhpa", Value(0.3)),), span, (("alhpa", place),))
    with pytest.raises(RecipeError) as caught:
        bind(rm.weighted_sum, call)
    assert str(caught.value) == (
        "x.mecha:1:20: weighted_sum has no argument 'alhpa'\n"
        f"    {line}\n                       ^^^^^\n"
        "hint: did you mean 'alpha'? weighted_sum(a, b, *, alpha=0.5)"
    )
    with pytest.raises(RecipeError) as caught:
        bind(rm.weighted_sum, Call("weighted_sum", (Model("a"),), span=span))
    assert caught.value.span is span


def weighted(a: Tensor, *, power: float, scale: float = 10.0, sums: Any) -> dict[str, Tensor]:
    return {"total": (a.double() ** power).sum() * scale + len(sums)}


@merge_method(cut="element", reductions=(weighted,))
def powered(a: Same, *, power: Number = 2.0, other: Number = 1.0, sums: Sums) -> Same:
    return a * float(sums["total"])


def test_a_reduction_gets_the_values_that_it_asks_for() -> None:
    (reduction,) = powered.declaration.reductions
    assert reduce_tile(powered, reduction, [tensor([2.0])], {"power": 3.0, "other": 9.0}, {})["total"] == 80
    assert reduce_tile(powered, reduction, [tensor([2.0])], {}, {"x": 1})["total"] == 41
    assert powered.on(tensor([2.0]), power=1.0).tolist() == [40.0]
