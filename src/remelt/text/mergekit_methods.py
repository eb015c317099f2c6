"""mergekit's merge methods, each as the calls that compute the same here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from remelt.errors import RecipeSyntaxError
from remelt.recipe.node import Call, Literal, Model, Node, Value
from remelt.text.configuration import Path
from remelt.text.mergekit_parameters import Number, Parameters, Scope

METHODS = (
    *("linear", "slerp", "task_arithmetic", "ties", "passthrough"),
    *("arcee_fusion", "model_stock", "nearswap", "sce"),
)
"""Those that are read."""
_METHOD: Path = ("merge_method",)
_NOTHING = 1e-8
"""Sum of weights below which mergekit does not divide deltas by it."""


@dataclass(frozen=True)
class Part:
    """A model as one source of a merge, its place, and where its parameters stand, the more particular first."""

    node: Node
    name: str
    place: Path
    places: tuple[Path, ...]


class Methods(Parameters):
    """A configuration whose merges are told as calls."""

    def merged(self, method: str, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        """The models merged in one scope; ``base`` is one of them."""
        made: Callable[[Sequence[Part], Model | None, Scope], Node] = getattr(self, f"_by_{method}")
        return made(parts, base, scope)

    def _by_passthrough(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        if len(parts) != 1:
            raise self.refuse(_METHOD, f"passthrough takes one model at a time, but got {len(parts)}")
        (part,) = parts
        return self._passed(part, self.number(part.places, "scale", scope, 1.0), "scale")

    def _by_linear(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        weights = [self._weight(part, scope) for part in parts]
        nodes, plain = [part.node for part in parts], _plain(weights)
        if self.flag(scope, "normalize", True):
            if plain is None:
                return self._call("n_average", nodes, {"weights": tuple(weights)})
            total = sum(plain)
            if abs(total) < _NOTHING:
                place = self.place_of(parts[-1].places, "weight")
                assert place is not None
                raise self.refuse(place, "the weights add up to 0, and are to be divided by that")
            return self._total(nodes, [weight / total for weight in plain])
        if plain is not None and min(abs(sum(plain) - 1.0), abs(sum(plain))) < _NOTHING:
            return self._total(nodes, plain)
        scaled = [self._passed(part, weight, "weight") for part, weight in zip(parts, weights, strict=True)]
        if len(scaled) == 1:
            return scaled[0]
        mean = self._call("n_average", scaled)  # a sum of weights is none, but so many times their mean is meant as one
        return self._call("passthrough", [mean], {"scale": float(len(scaled))})

    def _by_task_arithmetic(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        first, others = self._apart(parts, base)
        if not others:
            return first
        weights = [self._weight(part, scope) for part in others]
        deltas = [self._call("subtract", [part.node, first]) for part in others]
        if self.flag(scope, "normalize", False):
            plain = _plain(weights)
            if plain is None:
                return self._added(first, self._call("n_average", deltas, {"weights": tuple(weights)}), scope)
            total = sum(plain)
            weights = [weight / total if abs(total) >= _NOTHING else weight for weight in plain]
        return self._added(first, self._total(deltas, weights), scope)

    def _by_ties(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        first, others = self._apart(parts, base)
        if self.flag(scope, "rescale", False):
            place = self.place_of(scope.places, "rescale")
            assert place is not None
            raise self.refuse(place, "ties that rescales what it trimmed is not read yet", name=True)
        if not others:
            return first
        densities = [self.number(part.places, "density", scope, 1.0) for part in others]
        settings: dict[str, Literal] = {}
        for argument, found in (("k", densities), ("weights", [self._weight(part, scope) for part in others])):
            alike = all(one == found[0] for one in found)
            if not alike or found[0] != 1.0:
                settings[argument] = found[0] if alike else tuple(found)
        settings["vote_sgn"] = True
        if not self.flag(scope, "normalize", True):
            settings["normalize"] = False
        deltas = [self._call("subtract", [part.node, first]) for part in others]
        return self._added(first, self._call("ties_sum", deltas, settings), scope)

    def _by_slerp(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        pair = self._pair(parts, base)
        missing = self.refuse(_METHOD, "slerp needs the parameter t", "parameters: {t: 0.5}")
        t = self.needed(scope.places, "t", scope, missing)
        return self._call("slerp_plain", pair, {"alpha": t}, self.place_of(scope.places, "t"))

    def _by_arcee_fusion(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        return self._call("arcee_fusion", self._pair(parts, base))

    def _by_nearswap(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        pair = self._pair(parts, base)
        missing = self.refuse(_METHOD, "nearswap needs the parameter t", "parameters: {t: 0.0001}")
        t = self.needed(scope.places, "t", scope, missing)
        return self._call("nearswap", pair, {"t": t}, self.place_of(scope.places, "t"))

    def _by_model_stock(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        first, others = self._apart(parts, base)
        if not others:
            return first
        deltas = [self._call("subtract", [part.node, first]) for part in others]
        by_row = self.flag(scope, "filter_wise", False)
        return self._call("add", [first, self._call("model_stock_rows" if by_row else "model_stock", deltas)])

    def _by_sce(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        first, others = self._apart(parts, base)
        if not others:
            return first
        share = self.number(scope.places, "select_topk", scope, 1.0)
        deltas = [self._call("subtract", [part.node, first]) for part in others]
        return self._call("add", [first, self._call("sce", deltas, {} if share == 1.0 else {"select_topk": share})])

    def _pair(self, parts: Sequence[Part], base: Model | None) -> list[Node]:
        """The base and the one other model."""
        first, others = self._apart(parts, base)
        if len(others) != 1:
            method = self.at(_METHOD)
            raise self.refuse(_METHOD, f"{method} takes the base and one more model, but got {len(others)} more")
        return [first, others[0].node]

    def _weight(self, part: Part, scope: Scope) -> Number:
        message = f"the model {part.name!r} needs the parameter 'weight'"
        missing = self.refuse(part.place, message, "parameters: {weight: 0.5}")
        return self.needed(part.places, "weight", scope, missing)

    def _apart(self, parts: Sequence[Part], base: Model | None) -> tuple[Node, list[Part]]:
        """The base, and the other models."""
        if base is None:
            raise self.refuse(_METHOD, f"{self.at(_METHOD)} needs a base_model")
        found = [part for part in parts if part.name == base.name]
        if not found:
            raise RecipeSyntaxError("the base is none of the models of this slice", span=base.span)
        return found[0].node, [part for part in parts if part is not found[0]]

    def _added(self, base: Node, delta: Node, scope: Scope) -> Node:
        factor = self.number(scope.places, "lambda", scope, 1.0)
        place = self.place_of(scope.places, "lambda")
        return self._call("add_difference", [base, delta], {"alpha": factor}, place)

    def _passed(self, part: Part, factor: Number, name: str) -> Node:
        """A model times a number, which stays a model."""
        if factor == 1.0:
            return part.node
        return self._call("passthrough", [part.node], {"scale": factor}, self.place_of(part.places, name))

    def _total(self, nodes: Sequence[Node], weights: Sequence[Number]) -> Node:
        """The sum of multiples."""
        scaled = [
            node if weight == 1.0 else self._call("scale", [node], {"alpha": weight})
            for node, weight in zip(nodes, weights, strict=True)
        ]
        result = scaled[0]
        for part in scaled[1:]:
            result = self._call("add", [result, part])
        return result

    def _call(
        self, method: str, nodes: Sequence[Node], settings: Mapping[str, Literal] | None = None, at: Path | None = None
    ) -> Call:
        """A call that stands where its setting does, or the name of the merge method."""
        kwargs = tuple((name, Value(value)) for name, value in (settings or {}).items())
        return Call(method, tuple(nodes), kwargs, span=self.span(at or _METHOD))


def _plain(weights: Sequence[Number]) -> list[float] | None:
    """The weights, where none differs from tensor to tensor."""
    plain = [weight for weight in weights if isinstance(weight, float)]
    return plain if len(plain) == len(weights) else None
