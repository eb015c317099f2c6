"""Methods of older recipes that are several of today's, one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from remelt.errors import RecipeError, Span
from remelt.recipe.blocks import BlockWeights, Rule, Search, Weight
from remelt.recipe.node import Call, Literal, Node, Value

Composed = Callable[[Sequence[Node], Mapping[str, Node], Span | None], Call]
"""Makes today's calls of operands, of values by their names of that time, and of the place in the text."""


def ties_extended(deltas: Sequence[Node], values: Mapping[str, Node], span: Span | None) -> Call:
    """``ties_sum_extended`` of version 0.1.0, whose ``apply_stock`` leaves the stock away."""
    k = values.get("k", Value(0.2))
    by_mass = bool(_constant(values, "vote_sgn", False))
    median = bool(_constant(values, "apply_median", False))
    if not median and _constant(values, "apply_stock", False):
        return Call("ties_sum", tuple(deltas), (("k", k), ("vote_sgn", Value(by_mass))), span=span)
    trimmed = tuple(Call("trim", (delta,), (("k", k),), span=span) for delta in deltas)
    name = "ties_with_median" if median else "ties_with_stock"
    return Call(name, trimmed, (("by_count", Value(not by_mass)),), span=span)


def aligned(models: Sequence[Node], values: Mapping[str, Node], span: Span | None) -> Call:
    """``rebasin`` of sd-mecha 1: the first model, permuted towards the second."""
    model, reference = models
    return Call("rebasin", (model,), (("to", reference),), span=span)


def ties_with_dropout(deltas: Sequence[Node], values: Mapping[str, Node], span: Span | None) -> Call:
    """``ties_sum_with_dropout``: a random part of each delta is dropped, then TIES, then what is left is enlarged."""
    if _constant(values, "della_eps", 0.0):
        raise RecipeError(
            "ties_sum_with_dropout with della_eps ranks the elements of a whole tensor, which no method of today does",
            hint="write it in version 1: ties_sum(della(...), ...), which ranks those of each row",
            span=span,
        )
    probability = _number(values, "probability", 0.9)
    seed = max(int(_constant(values, "seed", 0)), 0)
    density = Value(_mapped(probability, lambda p: round(1.0 - p, 12)))
    thinned = [
        Call("dare", (delta,), (("density", density), ("rescale", Value(False)), ("seed", Value(seed + place))), span)
        for place, delta in enumerate(deltas)
    ]
    merged = ties_extended(thinned, values, span)
    exponent = float(_constant(values, "rescale", True))
    if exponent == 0.0:
        return merged
    factor = _mapped(probability, lambda p: 1.0 if p >= 1.0 else round((1.0 - p) ** -exponent, 12))
    return Call("scale", (merged,), (("alpha", Value(factor)),), span=span)


def truncated_rank(operands: Sequence[Node], values: Mapping[str, Node], span: Span | None) -> Call:
    """``truncate_rank``, by default with a basis that is found by random numbers."""
    rank = [("rank", values["rank"])] if "rank" in values else []
    if not _constant(values, "use_approximate_basis", True):
        return Call("truncate_rank", tuple(operands), tuple(rank), span=span)
    iterations = Value(int(_constant(values, "approximate_basis_iters", 2)))
    seed = Value(max(int(_constant(values, "approximate_basis_seed", 0)), 0))
    return Call(
        "truncate_rank_randomised", tuple(operands), (*rank, ("iterations", iterations), ("seed", seed)), span=span
    )


def truncated_kronecker(operands: Sequence[Node], values: Mapping[str, Node], span: Span | None) -> Call:
    """``truncate_kronecker``, without its approximation."""
    ratio = [("ratio", values["kronecker_ratio"])] if "kronecker_ratio" in values else []
    return Call("truncate_kronecker", tuple(operands), tuple(ratio), span=span)


def model_stock(deltas: Sequence[Node], values: Mapping[str, Node], span: Span | None) -> Call:
    """``model_stock``, which looks at each row, and at the angles of each delta with the next one."""
    return Call("model_stock_rows", tuple(deltas), (("consecutive", Value(True)),), span=span)


def _constant(values: Mapping[str, Node], name: str, default: float) -> float:
    """A value that decides which methods stand for one, and so is the same for all keys."""
    node = values.get(name)
    if node is None:
        return default
    value = node.value if isinstance(node, Value) else node
    if not isinstance(value, (bool, int, float)):
        raise RecipeError(f"{name} is one number here, the same for all keys, but got {value!r}", span=node.span)
    return value


def _number(values: Mapping[str, Node], name: str, default: float) -> Literal:
    """A number, or block weights that speak for every key."""
    node = values.get(name, Value(default))
    value = node.value if isinstance(node, Value) else node
    if isinstance(value, BlockWeights):
        return value | default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"{name} is a number or block weights, but got {value!r}", span=node.span)
    return float(value)


def _mapped(value: Literal, function: Callable[[float], float]) -> Literal:
    """A number, or every number of block weights, as a function makes it."""

    def weight(given: Weight | BlockWeights) -> Weight:
        if isinstance(given, (Search, BlockWeights)):
            raise RecipeError(f"a probability is a number for each block, but got {given!r}")
        return function(given)

    def rule(given: Rule) -> Rule:
        named = tuple((name, weight(one)) for name, one in given.named)
        return replace(given, named=named, listed=tuple(map(weight, given.listed)))

    if isinstance(value, BlockWeights):
        return BlockWeights(tuple(map(rule, value.rules)), None if value.default is None else weight(value.default))
    assert isinstance(value, float)
    return function(value)
