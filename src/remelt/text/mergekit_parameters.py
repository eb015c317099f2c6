"""mergekit's parameters: numbers, gradients along the layers, and either by parts of the names of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remelt.errors import RecipeSyntaxError
from remelt.recipe.blocks import DEPTH, KEYS, BlockWeights, Rule, literal_glob
from remelt.text.configuration import Configuration, Path, shown

Number = float | BlockWeights
_ALL = (
    *("weight", "density", "normalize", "rescale", "lambda", "int8_mask", "t", "scale", "gamma", "epsilon"),
    *("filter_wise", "select_topk", "normalize_weights", "eps", "nuslerp_row_wise", "nuslerp_flatten", "max_iter"),
    *("tol", "r", "alpha"),
)
"""Of all methods of mergekit together: another one is refused.

Of these, one that the method in question does not have is left aside, as there, so that a configuration may be tried
with several methods.
"""
_SHARED = {
    "linear": ("normalize",),
    "slerp": ("t",),
    "task_arithmetic": ("lambda", "normalize", "rescale"),
    "ties": ("lambda", "normalize", "rescale"),
    "dare_linear": ("lambda", "normalize", "rescale"),
    "dare_ties": ("lambda", "normalize", "rescale"),
    "breadcrumbs": ("lambda", "normalize", "rescale"),
    "breadcrumbs_ties": ("lambda", "normalize", "rescale"),
    "della": ("lambda", "normalize", "rescale"),
    "della_linear": ("lambda", "normalize", "rescale"),
    "nuslerp": ("nuslerp_row_wise", "nuslerp_flatten"),
    "multislerp": ("normalize_weights", "eps"),
    "karcher": ("max_iter", "tol"),
    "ram": ("epsilon",),
    "ramplus_tl": ("r", "alpha", "epsilon"),
}
"""Those that are one for all models: mergekit does not look for them beside a model."""


@dataclass(frozen=True)
class Scope:
    """One merge of models: where its parameters stand, the more particular first, and which layers it makes.

    ``length`` is None where it makes all layers, however many there are.
    """

    places: tuple[Path, ...]
    offset: int = 0
    length: int | None = None


class Parameters(Configuration):
    """A configuration whose parameters are asked for by name, in the scopes where they may stand."""

    count = 0
    """The layers of the result, where slices tell it."""

    def check_parameters(self, path: Path, method: str, *, of_model: bool = False) -> None:
        """Refuse parameters that no method has, and beside a model those that are for all: none would be seen."""
        place = (*path, "parameters")
        if self.at(place) is None:
            return
        self.known(place, _ALL)
        unseen = next((name for name in self.at(place) if of_model and name in _SHARED.get(method, ())), None)
        if unseen is not None:
            hint = f"put it into the parameters at the top{' or of the slice' if path[0] == 'slices' else ''}"
            message = f"{method} has one {unseen!r} for all models: it is not looked for beside one"
            raise self.refuse((*place, unseen), message, hint, name=True)

    def place_of(self, places: Sequence[Path], name: str) -> Path | None:
        """Where a parameter is told first."""
        return next(((*path, name) for path in places if self.at((*path, name)) is not None), None)

    def flag(self, scope: Scope, name: str, otherwise: bool) -> bool:
        """A parameter that is true or false."""
        place = self.place_of(scope.places, name)
        found = otherwise if place is None else self.at(place)
        if not isinstance(found, bool):
            raise self.refuse(place or (), f"{name} is true or false here, but got {shown(found)}")
        return found

    def number(self, places: Sequence[Path], name: str, scope: Scope, otherwise: float) -> Number:
        """A parameter of which mergekit has a default."""
        found = self._told(places, name, scope)
        if found is None:
            return otherwise
        return found | otherwise if isinstance(found, BlockWeights) else found

    def needed(self, places: Sequence[Path], name: str, scope: Scope, missing: RecipeSyntaxError) -> Number:
        """A parameter that is told for every tensor; ``missing`` is raised where it is not told at all."""
        found = self._told(places, name, scope)
        if found is None:
            raise missing
        if isinstance(found, BlockWeights) and found.default is None:
            place = self.place_of(places, name)
            assert place is not None
            raise self.refuse(
                place,
                f"{name!r} is needed for every tensor, but is told only for those whose names hold a filter's text",
                "let the list end with one for all the rest: - value: 0.5",
                name=True,
            )
        return found

    def _told(self, places: Sequence[Path], name: str, scope: Scope) -> Number | None:
        """What the scopes say, each for those tensors of which the ones before say nothing."""
        found: BlockWeights | None = None
        for path in places:
            told = self.at((*path, name))
            if told is None:
                continue
            one = self._setting((*path, name), told, scope)
            if found is not None:
                found = found | one
            elif isinstance(one, BlockWeights):
                found = one
            else:
                return one
            if found.default is not None:
                break
        return found

    def _setting(self, path: Path, value: Any, scope: Scope) -> Number:
        """One scope's number, gradient, or either by filters; without a default where no filter is left out."""
        conditions = [value] if isinstance(value, dict) else value
        if not isinstance(conditions, list):
            return self.finite(path, value)
        if not any(isinstance(one, dict) for one in conditions):
            return self._gradient(path, conditions, scope)
        named: dict[str, Number] = {}
        rest: Number | None = None
        for number, one in enumerate(conditions):
            here = path if isinstance(value, dict) else (*path, number)
            self.known(here, ("filter", "value"))
            chosen, inner = one.get("filter"), one.get("value")
            within = (*here, "value")
            found = self._gradient(within, inner, scope) if isinstance(inner, list) else self.finite(within, inner)
            if chosen in (None, "*", ""):
                rest = found
                break
            if not isinstance(chosen, str):
                raise self.refuse((*here, "filter"), "a filter is a part of a tensor's name")
            named.setdefault(f"*{literal_glob(chosen)}*", found)
        if not named:
            assert rest is not None
            return rest
        filtered = BlockWeights((Rule(KEYS, named=tuple(named.items()), optional=True),))
        return filtered if rest is None else filtered | rest

    def _gradient(self, path: Path, values: Sequence[Any], scope: Scope) -> Number:
        """Numbers along the layers of a slice, as weights along those of the result; outside them the first one."""
        if not values:
            raise self.refuse(path, "a gradient has at least one number")
        numbers = [self.finite((*path, number), value) for number, value in enumerate(values)]
        if len(numbers) == 1:
            return numbers[0]
        curve = tuple(numbers)
        if scope.length is not None and scope.length != self.count:
            steps = scope.length - 1
            inside = [_interpolated(numbers, index / steps if steps else 1.0) for index in range(scope.length)]
            after = self.count - scope.offset - scope.length
            curve = (*[numbers[0]] * scope.offset, *inside, *[numbers[-1]] * after)
        return BlockWeights((Rule(DEPTH, listed=curve),), default=numbers[0])

    def finite(self, path: Path, value: Any) -> float:
        """A number, which may also be written as a text."""
        try:
            number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.refuse(path, f"a number is due here, but got {shown(value)}")
        return number


def _interpolated(values: Sequence[float], share: float) -> float:
    place = share * (len(values) - 1)
    first = int(place)
    second = min(first + 1, len(values) - 1)
    return (1 - (place - first)) * values[first] + (place - first) * values[second]
