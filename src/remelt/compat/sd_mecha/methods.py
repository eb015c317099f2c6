"""sd-mecha's merge methods and the functions that it builds of them, as recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from remelt.compat.sd_mecha.recipes import Hyper, RecipeNodeOrValue, node, plain
from remelt.errors import RecipeError
from remelt.recipe.node import Call, Model, Node, Parameter, Value
from remelt.text.eras.methods import VERSION_0_1, OldMethod

_IGNORED = ("device", "dtype", "cache")
"""Arguments of every method of sd-mecha 0: where and in what it computed. An option of the merge says that today."""
Function = Callable[..., Node]


def _made(name: str, method: OldMethod) -> Function:
    """A function of the field's arguments that makes a call of the method's name today."""

    def made(*args: RecipeNodeOrValue, **named: Any) -> Node:
        operands: list[Node] = []
        values: dict[str, Any] = {}
        positional = [(method.at(place), given) for place, given in enumerate(args)]
        for argument, given in [*positional, *named.items()]:
            if argument is None:
                raise RecipeError(f"{name} takes {method.fixed} models and {', '.join(method.values)}, but got more")
            if argument in method.operands:
                operands.append(node(given))
            elif argument in method.values:
                values[argument] = given
            elif argument not in _IGNORED:
                raise RecipeError(f"{name} has no argument {argument!r}")
        kwargs = []
        for argument in method.values:
            value = plain(values.get(argument))
            if value is not None and argument not in method.dropped:
                kwargs.append((argument, value if isinstance(value, Node) else Value(value)))
        return Call(method.name, tuple(operands), tuple(kwargs))

    made.__name__ = made.__qualname__ = name
    made.__doc__ = (
        f"``{name}`` of {', '.join(method.operands)}{'; ' if method.values else ''}{', '.join(method.values)}."
    )
    return made


def _method(name: str) -> Function:
    return _made(name, VERSION_0_1[name])


weighted_sum = _method("weighted_sum")
n_average = _method("n_average")
slerp = _method("slerp")
subtract = _method("subtract")
scale = _method("scale")
perpendicular_component = _method("perpendicular_component")
geometric_sum = _method("geometric_sum")
multiply_quotient = _method("multiply_quotient")
train_difference_mask = _method("train_difference_mask")
clamp = _method("clamp")
add_cosine_a = cosine_add_a = _method("add_cosine_a")
add_cosine_b = cosine_add_b = _method("add_cosine_b")
crossover = _method("crossover")
ties_sum = _method("ties_sum")
ties_sum_extended = _method("ties_sum_extended")
ties_sum_with_dropout = _method("ties_sum_with_dropout")
model_stock = model_stock_for_tensor = _method("model_stock")
geometric_median = _method("geometric_median")
fallback = _method("fallback")
pick_component = _method("pick_component")
omit_component = _method("omit_component")
_add_difference = _method("add_difference")
_dropout = _method("dropout")
_rotate = _method("rotate")
_tensor_sum, _top_k_tensor_sum = _method("tensor_sum"), _method("top_k_tensor_sum")


def _dropped(name: str, operands: str, values: str) -> Function:
    """A method that sd-mecha 1 no longer has."""
    return _made(name, OldMethod(name, tuple(operands.split()), False, tuple(values.split())))


train_difference = _dropped("train_difference", "a b c", "alpha")
distribution_crossover = _dropped("distribution_crossover", "a b c", "alpha tilt")


def cast(a: RecipeNodeOrValue, device: object = None, dtype: object = None) -> Node:
    """The model in another element type, a name or one of torch's."""
    if dtype is None:
        return node(a)
    return Call("cast", (node(a),), (("dtype", Value(str(dtype).removeprefix("torch."))),))


def add_difference(
    a: RecipeNodeOrValue,
    b: RecipeNodeOrValue,
    c: RecipeNodeOrValue | None = None,
    *,
    alpha: Hyper = 1.0,
    clamp_to_ab: bool | None = None,
    **ignored: object,
) -> Node:
    """``a + alpha * b`` for a difference ``b``, or ``a + alpha * (b - c)``.

    With ``clamp_to_ab`` the result of three models stays between the first two; unless it says, it does so where a
    `RecipeMerger` merges it, as in sd-mecha 0.
    """
    if c is None:
        if clamp_to_ab:
            raise RecipeError("add_difference is clamped between two models: it needs a third, from which b differs")
        return _add_difference(a, b, alpha=alpha)
    first, second, third = node(a), node(b), node(c)
    if clamp_to_ab is None:  # the merger's era tells: see `finished`
        value = plain(alpha)
        return Call(
            "add_difference", (first, second, third), (("alpha", value if isinstance(value, Node) else Value(value)),)
        )
    result = _add_difference(first, subtract(second, third), alpha=alpha)
    return clamp(result, first, second) if clamp_to_ab else result


def add_perpendicular(
    a: RecipeNodeOrValue, b: RecipeNodeOrValue, c: RecipeNodeOrValue, *, alpha: Hyper = 1.0, **ignored: object
) -> Node:
    """``a`` and that part of ``b - c`` which stands at a right angle to ``a - c``."""
    first, third = node(a), node(c)
    return _add_difference(first, perpendicular_component(subtract(first, third), subtract(b, third)), alpha=alpha)


def _deltas(base: Node, models: tuple[RecipeNodeOrValue, ...]) -> list[Node]:
    """Each model's difference from the base; what is a difference already stays."""
    return [one if _is_delta(one) else subtract(one, base) for one in map(node, models)]


def _is_delta(one: Node) -> bool:
    if isinstance(one, (Model, Parameter)):
        return one.space == "delta"
    return isinstance(one, Call) and one.method in ("subtract", "scale", "ties_sum", "perpendicular_component")


def add_difference_ties(
    base: RecipeNodeOrValue, *models: RecipeNodeOrValue, alpha: Hyper = 1.0, k: float = 1.0, **ignored: object
) -> Node:
    """TIES merging of models that were trained from one base."""
    first = node(base)
    return _add_difference(first, ties_sum(*_deltas(first, models), k=k), alpha=alpha)


def add_difference_ties_extended(
    base: RecipeNodeOrValue, *models: RecipeNodeOrValue, alpha: Hyper = 1.0, k: float = 0.2, **named: Any
) -> Node:
    """TIES merging with the choices of `ties_sum_extended`."""
    first = node(base)
    return _add_difference(first, ties_sum_extended(*_deltas(first, models), k=k, **named), alpha=alpha)


def add_ties_with_dare(base: RecipeNodeOrValue, *models: RecipeNodeOrValue, alpha: Hyper = 1.0, **named: Any) -> Node:
    """TIES merging of deltas of which a random part was dropped."""
    first = node(base)
    return _add_difference(first, ties_sum_with_dropout(*_deltas(first, models), **named), alpha=alpha)


def ties_with_dare(
    base: RecipeNodeOrValue, *models: RecipeNodeOrValue, alpha: Hyper = 0.5, k: float = 0.2, **named: Any
) -> Node:
    """The same, with what sd-mecha 0 assumed."""
    return add_ties_with_dare(base, *models, alpha=alpha, k=k, **named)


def n_model_stock(base: RecipeNodeOrValue, *models: RecipeNodeOrValue, **named: Any) -> Node:
    """Model Stock of models that were trained from one base."""
    first = node(base)
    return _add_difference(first, model_stock(*_deltas(first, models), **named), alpha=1.0)


model_stock_n_models = n_model_stock


def dropout(
    a: RecipeNodeOrValue, *models: RecipeNodeOrValue, probability: float = 0.9, alpha: Hyper = 0.5, **named: Any
) -> Node:
    """DARE: the models' differences from ``a``, of which a random part is dropped."""
    first = node(a)
    deltas = [subtract(one, first) for one in models]
    return _add_difference(first, _dropout(*deltas, probability=probability, **named), alpha=alpha)


def _around(c: RecipeNodeOrValue | None, a: RecipeNodeOrValue, b: RecipeNodeOrValue, merged: Function) -> Node:
    """A method of two models, or of their differences from a third, to which its result is added."""
    if c is None:
        return merged(node(a), node(b))
    third = node(c)
    return _add_difference(third, merged(subtract(a, third), subtract(b, third)), alpha=1.0)


def rotate(
    a: RecipeNodeOrValue,
    b: RecipeNodeOrValue,
    c: RecipeNodeOrValue | None = None,
    *,
    alignment: Hyper = 1.0,
    alpha: Hyper = 0.0,
    **ignored: object,
) -> Node:
    """``a`` turned towards ``b``, neuron by neuron."""
    return _around(c, a, b, lambda x, y: _rotate(x, y, alignment=alignment, alpha=alpha))


def copy_region(
    a: RecipeNodeOrValue,
    b: RecipeNodeOrValue,
    c: RecipeNodeOrValue | None = None,
    *,
    width: Hyper = 1.0,
    offset: Hyper = 0.0,
    top_k: bool = False,
    **ignored: object,
) -> Node:
    """``a`` with a region of ``b``."""
    method = _top_k_tensor_sum if top_k else _tensor_sum
    return _around(c, a, b, lambda x, y: method(x, y, width=width, offset=offset))


tensor_sum = copy_region
