"""sd-mecha's merge methods and the functions that it builds of them, as recipes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from remelt.compat.sd_mecha.recipes import Hyper, RecipeNodeOrValue, node, plain
from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.recipe.node import Call, Node, Value
from remelt.recipe.walk import topological
from remelt.text.eras.methods import HEADERLESS, MISSING, OLDEST, VERSION_0_1, OldMethod, differences

_IGNORED = ("device", "dtype", "cache")
"""Arguments of every method of sd-mecha 0: where and in what it computed. An option of the merge says that today."""
Function = Callable[..., Node]


def _made(name: str, method: OldMethod) -> Function:
    """A function of the field's arguments that makes a call of the method's name today."""

    def made(*args: RecipeNodeOrValue, **named: Any) -> Node:
        kept = [(argument, given) for argument, given in named.items() if argument not in _IGNORED]
        operands, values = method.bind(args, kept)
        given = {argument: _value(value) for argument, value in values.items() if value is not None}
        return method.call([node(one) for one in operands], given)

    made.__name__ = made.__qualname__ = name
    made.__doc__ = (
        f"``{name}`` of {', '.join(method.operands)}{'; ' if method.values else ''}{', '.join(method.values)}."
    )
    return made


def _value(given: object) -> Node:
    """An argument that is no operand, as a node."""
    value = plain(given)
    return value if isinstance(value, Node) else Value(value)


def _passed_over(name: str, given: Mapping[str, object], known: Collection[str]) -> None:
    """Refuse what a function neither takes nor may pass over."""
    for argument in given:
        if argument not in _IGNORED:
            raise RecipeError(f"{name} has no argument {argument!r}", hint=nearest_hint(argument, known))


def _method(name: str) -> Function:
    return _made(name, VERSION_0_1[name])


def _dropped(name: str) -> Function:
    """A method that sd-mecha 1 no longer has."""
    return _made(name, (HEADERLESS if name in HEADERLESS else OLDEST)[name])


def _missing(name: str) -> Function:
    """A method that is known, and not here yet."""

    def missing(*args: object, **named: object) -> Node:
        raise RecipeError(f"{name} of sd-mecha is not in remelt yet", hint=MISSING[name])

    missing.__name__ = missing.__qualname__ = name
    missing.__doc__ = f"``{name}`` is refused: {MISSING[name]}."
    return missing


weighted_sum = _method("weighted_sum")
n_average = _method("n_average")
slerp = _method("slerp")
subtract = _method("subtract")
scale = _method("scale")
perpendicular_component = _method("perpendicular_component")
geometric_sum = _method("geometric_sum")
multiply_quotient = _method("multiply_quotient")
train_difference_mask = _method("train_difference_mask")
add_opposite_mask = _method("add_opposite_mask")
add_strict_opposite_mask = _method("add_strict_opposite_mask")
clamp = _method("clamp")
clip = _dropped("clip")
add_cosine_a = cosine_add_a = _method("add_cosine_a")
add_cosine_b = cosine_add_b = _method("add_cosine_b")
top_k_tensor_sum = _method("top_k_tensor_sum")
ties_sum = _method("ties_sum")
ties_sum_extended = _method("ties_sum_extended")
ties_sum_with_dropout = _method("ties_sum_with_dropout")
model_stock = model_stock_for_tensor = _method("model_stock")
geometric_median = _method("geometric_median")
truncate_rank = _method("truncate_rank")
truncate_kronecker = _method("truncate_kronecker")
fallback = _method("fallback")
pick_component = _method("pick_component")
omit_component = _method("omit_component")
stack = _method("stack")
exchange_ema = _method("exchange_ema")
balance_attention = _method("balance_attention")
rebasin = _method("rebasin")
train_difference = _dropped("train_difference")
add_opposite = _dropped("add_opposite")
clamped_add_opposite = _dropped("clamped_add_opposite")
select_max_delta = _dropped("select_max_delta")
distribution_crossover = _dropped("distribution_crossover")
randperm = _missing("randperm")
omit_non_finite = _missing("omit_non_finite")
get_dtype = _missing("get_dtype")
get_device = _missing("get_device")
get_rank_from_ratio = _missing("get_rank_from_ratio")
_add_difference = _method("add_difference")
_dropout = _method("dropout")
_rotate = _method("rotate")
_tensor_sum, _top_k_tensor_sum = _method("tensor_sum"), top_k_tensor_sum
_crossover = _method("crossover")
_ties_with_dare = _dropped("ties_sum_with_dropout")


def cast(a: RecipeNodeOrValue, device: object = None, dtype: object = None) -> Node:
    """The model in another element type, a name or one of torch's."""
    if dtype is None:
        return node(a)
    return Call("cast", (node(a),), (("dtype", Value(str(dtype).removeprefix("torch."))),))


def crossover(*args: RecipeNodeOrValue, **named: Any) -> Node:
    """Low frequencies of one model, high ones of another; ``alpha`` was a ``mean`` once."""
    if "mean" in named and "alpha" not in named:
        named["alpha"] = named.pop("mean")
    return _crossover(*args, **named)


def add_difference(
    a: RecipeNodeOrValue,
    b: RecipeNodeOrValue,
    c: RecipeNodeOrValue | None = None,
    *,
    alpha: Hyper = 1.0,
    clamp_to_ab: bool | None = None,
    **named: object,
) -> Node:
    """``a + alpha * b`` for a difference ``b``, or ``a + alpha * (b - c)``.

    With ``clamp_to_ab`` the result of three models stays between the first two; unless it says, it does so where a
    `RecipeMerger` merges it, as in sd-mecha 0.
    """
    _passed_over("add_difference", named, ("alpha", "clamp_to_ab"))
    if c is None:
        if clamp_to_ab:
            raise RecipeError("add_difference is clamped between two models: it needs a third, from which b differs")
        return _add_difference(a, b, alpha=alpha)
    first, second, third = node(a), node(b), node(c)
    if clamp_to_ab is None:  # the merger's era tells: see `finished`
        return Call("add_difference", (first, second, third), (("alpha", _value(alpha)),))
    result = _add_difference(first, subtract(second, third), alpha=alpha)
    return clamp(result, first, second) if clamp_to_ab else result


def add_perpendicular(
    a: RecipeNodeOrValue, b: RecipeNodeOrValue, c: RecipeNodeOrValue, *, alpha: Hyper = 1.0, **named: object
) -> Node:
    """``a`` and that part of ``b - c`` which stands at a right angle to ``a - c``."""
    _passed_over("add_perpendicular", named, ("alpha",))
    first, third = node(a), node(c)
    return _add_difference(first, perpendicular_component(subtract(first, third), subtract(b, third)), alpha=alpha)


def _deltas(base: Node, models: tuple[RecipeNodeOrValue, ...]) -> list[Node]:
    """Each model's difference from the base; what is a difference already stays."""
    return [one if is_delta(one) else subtract(one, base) for one in map(node, models)]


def is_delta(one: Node) -> bool:
    """Whether a recipe gives a difference of models, by what its methods declare."""
    returns = {name: method.returns for name, method in METHODS.items()}
    return differences(topological(one), returns)[id(one)]


def add_difference_ties(
    base: RecipeNodeOrValue, *models: RecipeNodeOrValue, alpha: Hyper = 1.0, k: float = 1.0, **named: object
) -> Node:
    """TIES merging of models that were trained from one base."""
    _passed_over("add_difference_ties", named, ("alpha", "k"))
    first = node(base)
    return _add_difference(first, ties_sum(*_deltas(first, models), k=k), alpha=alpha)


def add_difference_ties_extended(
    base: RecipeNodeOrValue, *models: RecipeNodeOrValue, alpha: Hyper = 1.0, k: float = 0.2, **named: Any
) -> Node:
    """TIES merging with the choices of `ties_sum_extended`."""
    first = node(base)
    return _add_difference(first, ties_sum_extended(*_deltas(first, models), k=k, **named), alpha=alpha)


def add_ties_with_dare(
    base: RecipeNodeOrValue, *models: RecipeNodeOrValue, alpha: Hyper = 1.0, k: float = 1.0, **named: Any
) -> Node:
    """TIES merging of deltas of which a random part was dropped."""
    first = node(base)
    return _add_difference(first, ties_sum_with_dropout(*_deltas(first, models), k=k, **named), alpha=alpha)


def ties_with_dare(base: RecipeNodeOrValue, *models: RecipeNodeOrValue, alpha: Hyper = 0.5, **named: Any) -> Node:
    """The same, with what sd-mecha 0 assumed, and its switches."""
    first = node(base)
    return _add_difference(first, _ties_with_dare(*_deltas(first, models), **named), alpha=alpha)


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
    alignment: Hyper | None = None,
    alpha: Hyper | None = None,
    beta: Hyper | None = None,
    **named: Any,
) -> Node:
    """``a`` turned towards ``b``, neuron by neuron; with ``beta``, ``alpha`` is the alignment, as it first was."""
    if beta is not None:
        if alignment is not None:
            raise RecipeError("rotate takes alignment and alpha, or alpha and beta as it first did, not all of them")
        alignment, alpha = alpha, beta
    turn, pull = 1.0 if alignment is None else alignment, 0.0 if alpha is None else alpha
    return _around(c, a, b, lambda x, y: _rotate(x, y, alignment=turn, alpha=pull, **named))


def copy_region(
    a: RecipeNodeOrValue,
    b: RecipeNodeOrValue,
    c: RecipeNodeOrValue | None = None,
    *,
    width: Hyper = 1.0,
    offset: Hyper = 0.0,
    top_k: bool = False,
    **named: object,
) -> Node:
    """``a`` with a region of ``b``."""
    _passed_over("copy_region", named, ("width", "offset", "top_k"))
    method = _top_k_tensor_sum if top_k else _tensor_sum
    return _around(c, a, b, lambda x, y: method(x, y, width=width, offset=offset))


tensor_sum = copy_region
