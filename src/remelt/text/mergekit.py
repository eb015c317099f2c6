"""mergekit's configurations: YAML that says a method, models or slices of them, and parameters by layer and name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remelt.core.nearest import nearest_hint
from remelt.recipe.blocks import DEPTH, KEYS, BlockWeights, Rule, literal_glob
from remelt.recipe.layers import layers, stack_layers
from remelt.recipe.node import Call, Model, Node, Value
from remelt.recipe.vocabulary import BASE, UNION, align_vocabulary
from remelt.text.configuration import Configuration, Path
from remelt.text.document import Document
from remelt.text.source import SourceText

_TOP = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
_PARAMETERS = (
    *("weight", "density", "normalize", "rescale", "lambda", "int8_mask", "t", "scale", "gamma", "epsilon"),
    *("filter_wise", "select_topk", "normalize_weights", "eps", "nuslerp_row_wise", "nuslerp_flatten", "max_iter"),
    *("tol", "r", "alpha"),
)
"""Of any method: what a method does not ask for is left aside, as mergekit does."""
_METHODS = ("linear", "slerp", "task_arithmetic", "ties", "passthrough")


def looks_like_mergekit(line: str) -> bool:
    """Whether a first line of content begins such a configuration."""
    name, colon, _ = line.partition(":")
    return bool(colon) and (name.strip() in _TOP or line.startswith("- "))


def read_mergekit(source: SourceText, first_line: int) -> Document:
    """The recipe that a configuration says; `RecipeSyntaxError` with its place for what it cannot say.

    Raises `MissingExtraError` without the extra ``mergekit``.
    """
    return Document(_Reader(source).recipe(), grammar="mergekit's YAML")


@dataclass(frozen=True)
class _Part:
    """A model as one source of a merge, and where its parameters stand, the more particular first."""

    node: Node
    name: str
    places: tuple[Path, ...]


class _Reader(Configuration):
    count = 0
    """The layers of the result, where slices tell it."""

    def recipe(self) -> Node:
        self.known((), _TOP)
        self.parameters(())
        method = self.at(("merge_method",))
        if method is None:
            raise self.source.refuse("a configuration says its merge_method", 1, hint="merge_method: linear")
        if method not in _METHODS:
            known = f"those that are read: {', '.join(_METHODS)}"
            hint = nearest_hint(str(method), _METHODS) or known
            raise self.refuse(("merge_method",), f"the method {method!r} is not read from configurations yet", hint)
        if self.at(("modules",)) is not None:
            raise self.refuse(("modules",), "models of several modules are not read", name=True)
        if (self.at(("models",)) is None) == (self.at(("slices",)) is None):
            raise self.source.refuse("a configuration names either models or slices", 1)
        result = self.of_models(method) if self.at(("models",)) is not None else self.of_slices(method)
        result = self.tokenized(result)
        dtype = self.at(("out_dtype",)) or self.at(("dtype",))
        if dtype is not None:
            if not isinstance(dtype, str):
                raise self.refuse(("out_dtype",), "an element type is a text, such as bfloat16")
            result = Call("cast", (result,), (("dtype", Value(dtype)),))
        return result

    def tokenized(self, result: Node) -> Node:
        """The result with the vocabulary that is asked for: the base's, that of all, or a model's."""
        path: Path = ("tokenizer_source",)
        if self.at(("tokenizer",)) is not None:
            if self.at(path) is not None:
                raise self.refuse(path, "a tokenizer is told once", name=True)
            self.known(("tokenizer",), ("source",))
            path = ("tokenizer", "source")
        wanted = self.at(path)
        if wanted is None:
            return result
        return align_vocabulary(
            result,
            base=self.base(("base_model",)),
            order=wanted if wanted in (BASE, UNION) else Model(self.model(path)),
        )

    def of_models(self, method: str) -> Node:
        parts = []
        for place, _ in enumerate(self.listed(("models",))):
            path: Path = ("models", place)
            self.known(path, ("model", "parameters"))
            self.parameters(path)
            name = self.model((*path, "model"))
            parts.append(_Part(Model(name), name, ((*path, "parameters"), ("parameters",))))
        base = self.base(("base_model",))
        if base is not None and base not in [part.name for part in parts]:
            parts.append(_Part(Model(base), base, (("parameters",),)))
        return self.merged(method, parts, base, None)

    def of_slices(self, method: str) -> Node:
        slices = []
        offset = 0
        for place, _ in enumerate(self.listed(("slices",))):
            path: Path = ("slices", place)
            self.known(path, ("sources", "base_model", "parameters", "residual_weight"))
            self.parameters(path)
            if self.at((*path, "residual_weight")) is not None:
                raise self.refuse((*path, "residual_weight"), "residual weights are not read", name=True)
            ranges = [self.range((*path, "sources", one)) for one, _ in enumerate(self.listed((*path, "sources")))]
            lengths = {stop - start for start, stop in ranges}
            if len(lengths) > 1:
                raise self.refuse((*path, "sources"), "the sources of a slice have as many layers each")
            slices.append((path, ranges, offset))
            offset += lengths.pop()
        self.count = offset
        return stack_layers(*(self.slice(method, path, ranges, begin) for path, ranges, begin in slices))

    def slice(self, method: str, path: Path, ranges: Sequence[tuple[int, int]], offset: int) -> Node:
        parts = []
        for place, (start, stop) in enumerate(ranges):
            here: Path = (*path, "sources", place)
            self.known(here, ("model", "layer_range", "parameters"))
            self.parameters(here)
            name = self.model((*here, "model"))
            places: tuple[Path, ...] = ((*here, "parameters"), (*path, "parameters"), ("parameters",))
            parts.append(_Part(layers(Model(name), start, stop), name, places))
        base = self.base((*path, "base_model")) or self.base(("base_model",))
        return self.merged(method, parts, base, (offset, ranges[0][1] - ranges[0][0]))

    def range(self, path: Path) -> tuple[int, int]:
        found = self.at((*path, "layer_range"))
        whole = isinstance(found, list) and len(found) == 2 and all(type(number) is int for number in found)
        if not whole or not 0 <= found[0] < found[1]:
            raise self.refuse((*path, "layer_range"), "a range of layers is two whole numbers, the first one less")
        return found[0], found[1]

    def base(self, path: Path) -> str | None:
        return None if self.at(path) is None else self.model(path)

    def model(self, path: Path) -> str:
        """A model's name; what follows an ``@`` is a revision, which a folder has not."""
        found = self.at(path)
        if isinstance(found, dict):
            inner = found.get("model")
            found = inner.get("path") if isinstance(inner, dict) else inner
        if not isinstance(found, str) or not found or "\0" in found:
            raise self.refuse(path, "a model is a path or a name")
        if "+" in found:
            raise self.refuse(path, "adapters are not merged yet", "merge it into its model first")
        return found.partition("@")[0]

    # ---- methods ----

    def merged(self, method: str, parts: Sequence[_Part], base: str | None, place: tuple[int, int] | None) -> Node:
        made: Callable[..., Node] = getattr(self, f"by_{method}")
        result: Node = made(parts, base, place)
        return result

    def by_passthrough(self, parts: Sequence[_Part], base: str | None, place: tuple[int, int] | None) -> Node:
        if len(parts) != 1:
            raise self.refuse(("merge_method",), f"passthrough takes one model at a time, but got {len(parts)}")
        (part,) = parts
        scale = self.setting(part.places, "scale", place)
        return part.node if scale is None else Call("scale", (part.node,), (("alpha", Value(scale)),))

    def by_linear(self, parts: Sequence[_Part], base: str | None, place: tuple[int, int] | None) -> Node:
        weights = [self.needed(part, "weight", place) for part in parts]
        if self.flag("normalize", True):
            weights = self.normalised(weights)
        return _total([_scaled(part.node, weight) for part, weight in zip(parts, weights, strict=True)])

    def by_task_arithmetic(self, parts: Sequence[_Part], base: str | None, place: tuple[int, int] | None) -> Node:
        first, others = self.apart(parts, base)
        weights = [self.needed(part, "weight", place) for part in others]
        if self.flag("normalize", False):
            weights = self.normalised(weights)
        deltas = [
            _scaled(Call("subtract", (part.node, first)), weight) for part, weight in zip(others, weights, strict=True)
        ]
        return self.added(first, _total(deltas))

    def by_ties(self, parts: Sequence[_Part], base: str | None, place: tuple[int, int] | None) -> Node:
        first, others = self.apart(parts, base)
        if self.flag("rescale", False):
            raise self.refuse(
                ("parameters", "rescale"), "ties that rescales what it trimmed is not read yet", name=True
            )
        settings: list[tuple[str, Node]] = []
        for name, argument in (("density", "k"), ("weight", "weights")):
            found = [self.setting(part.places, name, place, 1.0) for part in others]
            alike = all(one == found[0] for one in found)
            if not alike or found[0] != 1.0:
                settings.append((argument, Value(found[0] if alike else tuple(found))))
        settings.append(("vote_sgn", Value(True)))
        if not self.flag("normalize", True):
            settings.append(("normalize", Value(False)))
        deltas = tuple(Call("subtract", (part.node, first)) for part in others)
        return self.added(first, Call("ties_sum", deltas, tuple(settings)))

    def by_slerp(self, parts: Sequence[_Part], base: str | None, place: tuple[int, int] | None) -> Node:
        first, others = self.apart(parts, base)
        if len(others) != 1:
            raise self.refuse(("merge_method",), f"slerp takes the base and one more model, but got {len(others)} more")
        t = self.setting((*others[0].places,), "t", place)
        if t is None:
            raise self.refuse(("merge_method",), "slerp needs the parameter t", "parameters: {t: 0.5}")
        return Call("slerp_plain", (first, others[0].node), (("alpha", Value(t)),))

    def apart(self, parts: Sequence[_Part], base: str | None) -> tuple[Node, list[_Part]]:
        """The base, and the other models."""
        if base is None:
            raise self.refuse(("merge_method",), f"{self.at(('merge_method',))} needs a base_model")
        found = [part for part in parts if part.name == base]
        if not found:
            raise self.refuse(("base_model",), "the base is none of the models of this slice")
        return found[0].node, [part for part in parts if part is not found[0]]

    def added(self, base: Node, delta: Node) -> Node:
        factor = self.number(("parameters", "lambda"), 1.0)
        return Call("add_difference", (base, delta), (("alpha", Value(factor)),))

    # ---- parameters ----

    def parameters(self, path: Path) -> None:
        """Refuse parameters that no method has: one that is misspelt would be left aside in silence."""
        if self.at((*path, "parameters")) is not None:
            self.known((*path, "parameters"), _PARAMETERS)

    def flag(self, name: str, otherwise: bool) -> bool:
        found = self.at(("parameters", name))
        if found is None:
            return otherwise
        if not isinstance(found, bool):
            raise self.refuse(("parameters", name), f"{name} is true or false")
        return found

    def number(self, path: Path, otherwise: float) -> float:
        found = self.at(path)
        return otherwise if found is None else self.finite(path, found)

    def finite(self, path: Path, value: Any) -> float:
        try:
            number = float(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise self.refuse(path, f"a number is due here, but got {value!r}")
        return float(number)

    def needed(self, part: _Part, name: str, place: tuple[int, int] | None) -> float | BlockWeights:
        found = self.setting(part.places, name, place)
        if found is None:
            hint = f"parameters: {{{name}: 0.5}}"
            raise self.refuse(part.places[0][:-1], f"the model {part.name!r} needs the parameter {name!r}", hint)
        return found

    def setting(
        self, places: Sequence[Path], name: str, place: tuple[int, int] | None, otherwise: float | None = None
    ) -> float | BlockWeights | None:
        """A parameter where it is said first: a number, a gradient over the layers, or either by parts of names."""
        for path in places:
            found = self.at((*path, name))
            if found is not None:
                return self.weight((*path, name), found, place)
        return otherwise

    def weight(self, path: Path, value: Any, place: tuple[int, int] | None) -> float | BlockWeights:
        conditions = [value] if isinstance(value, dict) else value
        if not isinstance(conditions, list):
            return self.finite(path, value)
        if not any(isinstance(one, dict) for one in conditions):
            return self.gradient(path, conditions, place)
        named: dict[str, float | BlockWeights] = {}
        for number, one in enumerate(conditions):
            here = path if isinstance(value, dict) else (*path, number)
            self.known(here, ("filter", "value"))
            chosen, inner = one.get("filter"), one.get("value")
            found = (
                self.gradient((*here, "value"), inner, place)
                if isinstance(inner, list)
                else self.finite((*here, "value"), inner)
            )
            if chosen in (None, "*"):
                return _with_default(named, found)
            if not isinstance(chosen, str):
                raise self.refuse((*here, "filter"), "a filter is a part of a tensor's name")
            named.setdefault(f"*{literal_glob(chosen)}*", found)
        return BlockWeights((Rule(KEYS, named=tuple(named.items()), optional=True),))

    def gradient(self, path: Path, values: Sequence[Any], place: tuple[int, int] | None) -> float | BlockWeights:
        """Numbers along the layers of a slice, as weights along those of the result; outside them the first one."""
        if not values:
            raise self.refuse(path, "a gradient has at least one number")
        numbers = [self.finite((*path, number), value) for number, value in enumerate(values)]
        if len(numbers) == 1:
            return numbers[0]
        curve = tuple(numbers)
        if place is not None and place[1] != self.count:
            offset, length = place
            inside = [_interpolated(numbers, index / (length - 1) if length > 1 else 1.0) for index in range(length)]
            curve = (*[numbers[0]] * offset, *inside, *[numbers[-1]] * (self.count - offset - length))
        return BlockWeights((Rule(DEPTH, listed=curve),), default=numbers[0])

    def normalised(self, weights: Sequence[float | BlockWeights]) -> list[float | BlockWeights]:
        """Weights over their sum, which must be one number along the layers."""
        plain = [weight for weight in weights if isinstance(weight, float)]
        if len(plain) == len(weights):
            total = sum(plain)
            if total == 0.0:
                raise self.refuse(("merge_method",), "the weights add up to 0, and are to be divided by that")
            return [weight / total for weight in plain]
        sums = [sum(parts) for parts in zip(*_samples(weights), strict=True)]
        if any(not math.isclose(total, 1.0, rel_tol=1e-9) for total in sums):
            message = "weights by layer or by name that are normalised add up to 1 everywhere"
            raise self.refuse(("merge_method",), message, "parameters: {normalize: false}, with weights that do")
        return list(weights)


def _samples(weights: Sequence[float | BlockWeights]) -> Iterator[list[float]]:
    """Each weight along the layers at so many places that between them all are straight; `NaN` where none is told."""
    counts = {len(rule.listed) - 1 for w in weights if isinstance(w, BlockWeights) for rule in w.rules if rule.listed}
    steps = math.lcm(*counts) if counts and math.lcm(*counts) <= 10**5 else 10**5
    for weight in weights:
        if isinstance(weight, float):
            yield [weight] * (steps + 1)
            continue
        listed = [rule.listed for rule in weight.rules if rule.kind == DEPTH]
        values = [float(number) for number in listed[0]] if len(weight.rules) == len(listed) == 1 else [math.nan]  # type: ignore[arg-type]
        yield [_interpolated(values, place / steps) for place in range(steps + 1)]


def _interpolated(values: Sequence[float], share: float) -> float:
    place = share * (len(values) - 1)
    first = int(place)
    second = min(first + 1, len(values) - 1)
    return (1 - (place - first)) * values[first] + (place - first) * values[second]


def _with_default(named: Mapping[str, float | BlockWeights], found: float | BlockWeights) -> float | BlockWeights:
    """Weights by parts of names, and what is for all the rest."""
    if not named:
        return found
    first = Rule(KEYS, named=tuple(named.items()), optional=True)
    if isinstance(found, BlockWeights):
        return BlockWeights((first, *found.rules), default=found.default)
    return BlockWeights((first,), default=found)


def _scaled(node: Node, weight: float | BlockWeights) -> Node:
    return node if weight == 1.0 else Call("scale", (node,), (("alpha", Value(weight)),))


def _total(parts: Sequence[Node]) -> Node:
    result = parts[0]
    for part in parts[1:]:
        result = Call("add", (result, part))
    return result
