"""Adapters in a recipe with permuted models: which of them follow, by their factors or by the differences they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from remelt.api.adapter_views import first_adapter, with_adapters
from remelt.check.inputs import Input
from remelt.core.dtype import DType
from remelt.errors import CheckError, Problem

if TYPE_CHECKING:
    from remelt.api.permuted_views import Saved


@dataclass(frozen=True)
class Followed:
    """By what adapters are permuted, and the models that are, as they were ``before``; each by its index."""

    permutations: Mapping[int, Sequence[Saved]]
    before: Mapping[int, Input]


def with_followers(
    inputs: Mapping[int, Input],
    order: Sequence[int],
    bases: Mapping[int, Input],
    followed: Followed,
    compute: DType,
    problems: list[Problem],
    *,
    ignore_unused: bool,
) -> dict[int, Input]:
    """The inputs with adapters as the differences that they make, permuted where the recipe says so.

    One that multiplies a model's own weights does so with those of before the permutation.
    """
    found, left = _factored(inputs, followed.permutations)
    bases = {**_bases(found, left, order, followed.before), **bases}
    found = with_adapters(found, order, bases, compute, problems, ignore_unused=ignore_unused)
    if problems or not left:
        return found
    from remelt.api.permuted_views import permuted_adapter

    for index, uses in left.items():
        given = found[index]
        if index not in bases and first_adapter(given).needs_base:
            message = "multiplies a model's own weights, and that model is not permuted as it is"
            hint = f'say of which model: adapter("{given.model.name}", base="...")'
            problems.append(Problem(given.label, message, hint, given.model.span))
            continue
        try:
            for use in uses:
                given = permuted_adapter(given, use)
        except CheckError as error:
            problems += error.problems
        found[index] = given
    return found


def _factored(
    inputs: Mapping[int, Input], permutations: Mapping[int, Sequence[Saved]]
) -> tuple[dict[int, Input], dict[int, Sequence[Saved]]]:
    """Adapters with permuted factors, and those of which only the differences can be permuted."""
    found, left = dict(inputs), dict(permutations)
    for index, uses in permutations.items():
        from remelt.api.permuted_adapters import with_permuted_factors

        factored = with_permuted_factors(found[index], uses)
        if factored is not None:
            found[index] = factored
            del left[index]
    return found, left


def _bases(
    inputs: Mapping[int, Input], left: Mapping[int, Sequence[Saved]], order: Sequence[int], before: Mapping[int, Input]
) -> dict[int, Input]:
    """For adapters whose differences are permuted as the recipe's first model is, that model as it was before."""
    first = next((index for index in order if inputs[index].adapter is None), None)
    if first is None or first not in before:
        return {}
    return {index: before[first] for index in left if inputs[index].model.permuted == inputs[first].model.permuted}
