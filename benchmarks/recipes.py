"""The recipes that are measured, told once for remelt and for sd-mecha: both call their methods by the same names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Methods = Callable[[str], Callable[..., Any]]
"""A library's method by its name."""

KEPT = 0.2
"""The share of each difference that trimming leaves."""


def build(name: str, models: Sequence[Any], calls: int, methods: Methods) -> Any:
    """A recipe over models of a library. ``calls`` is the length of a chain."""
    return RECIPES[name](list(models), calls, methods)


def weighted_sum(models: list[Any], calls: int, methods: Methods) -> Any:
    """Three tenths of the way from one model to another."""
    return methods("weighted_sum")(models[0], models[1], alpha=0.3)


def linear(models: list[Any], calls: int, methods: Methods) -> Any:
    """Half of each of two models."""
    return methods("weighted_sum")(models[0], models[1], alpha=0.5)


def add_difference(models: list[Any], calls: int, methods: Methods) -> Any:
    """A + (B - C)."""
    a, b, c = models
    return methods("add_difference")(a, methods("subtract")(b, c), alpha=0.7)


def n_average(models: list[Any], calls: int, methods: Methods) -> Any:
    """The mean of all models."""
    return methods("n_average")(*models)


def chain(models: list[Any], calls: int, methods: Methods) -> Any:
    """Weighted sums one on the other, over all models in turn."""
    mixed = models[0]
    for call in range(calls):
        mixed = methods("weighted_sum")(mixed, models[(call + 1) % len(models)], alpha=0.1 + 0.5 * call / calls)
    return mixed


def slerp(models: list[Any], calls: int, methods: Methods) -> Any:
    """Along the arc from one model to another."""
    return methods("slerp")(models[0], models[1], alpha=0.3)


def ties(models: list[Any], calls: int, methods: Methods) -> Any:
    """The last model, plus the other models' differences from it, where these agree in sign."""
    return _ties(models, methods, 1.0)


def ties_trimmed(models: list[Any], calls: int, methods: Methods) -> Any:
    """The same, of the largest fifth of each difference."""
    return _ties(models, methods, KEPT)


def _ties(models: list[Any], methods: Methods, kept: float) -> Any:
    *others, base = models
    differences = [methods("subtract")(other, base) for other in others]
    return methods("add_difference")(base, methods("ties_sum")(*differences, k=kept), alpha=1.0)


RECIPES: dict[str, Callable[[list[Any], int, Methods], Any]] = {
    "weighted_sum": weighted_sum,
    "linear": linear,
    "add_difference": add_difference,
    "n_average": n_average,
    "chain": chain,
    "slerp": slerp,
    "ties": ties,
    "ties_trimmed": ties_trimmed,
}
