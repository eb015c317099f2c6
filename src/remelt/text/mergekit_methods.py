"""mergekit's merge methods, each as the calls that compute the same here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from remelt.errors import RecipeSyntaxError
from remelt.recipe.node import Call, Literal, Model, Node, Value
from remelt.text.configuration import Path
from remelt.text.mergekit_parameters import Number, Parameters, Scope


@dataclass(frozen=True)
class Sparse:
    """How one of mergekit's methods thins deltas out, before it adds them up or lets them elect signs."""

    method: str
    """The method here that thins out."""
    setting: str | None
    """What it asks for beside a density."""
    otherwise: float
    elects: bool
    normalizes: bool
    rescales: bool


SPARSE = {
    "dare_linear": Sparse("dare", None, 0.0, elects=False, normalizes=False, rescales=True),
    "dare_ties": Sparse("dare", None, 0.0, elects=True, normalizes=False, rescales=True),
    "breadcrumbs": Sparse("breadcrumbs", "gamma", 0.01, elects=False, normalizes=False, rescales=False),
    "breadcrumbs_ties": Sparse("breadcrumbs", "gamma", 0.01, elects=True, normalizes=False, rescales=False),
    "della": Sparse("della", "epsilon", 0.15, elects=True, normalizes=True, rescales=True),
    "della_linear": Sparse("della", "epsilon", 0.15, elects=False, normalizes=False, rescales=True),
}
METHODS = (
    *("linear", "slerp", "task_arithmetic", "ties", "passthrough"),
    *("arcee_fusion", "model_stock", "nearswap", "sce"),
    *SPARSE,
    *("nuslerp", "multislerp", "karcher", "ram", "ramplus_tl"),
)
"""Those that are read."""
_METHOD: Path = ("merge_method",)
_NOTHING = 1e-8
"""Sum of weights below which mergekit does not divide deltas by it."""
_ONE_HALF = 1e-6
"""Sum of weights below which mergekit's nuslerp goes half the way."""


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
        if method in SPARSE:
            return self._by_sparse(SPARSE[method], parts, base, scope)
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
        deltas = [self._call("subtract", [part.node, first]) for part in others]
        return self._task_vectors(first, deltas, others, scope, normalizes=False)

    def _task_vectors(
        self, first: Node, deltas: Sequence[Node], others: Sequence[Part], scope: Scope, *, normalizes: bool
    ) -> Node:
        """The base and a weighted sum of deltas."""
        weights = [self._weight(part, scope) for part in others]
        if self.flag(scope, "normalize", normalizes):
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
        deltas = [self._call("subtract", [part.node, first]) for part in others]
        return self._elected(first, deltas, others, scope, normalizes=True, densities=densities)

    def _by_sparse(self, sparse: Sparse, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        first, others = self._apart(parts, base)
        rescales = self.flag(scope, "rescale", sparse.rescales)
        if rescales and not sparse.rescales:
            place = self.place_of(scope.places, "rescale")
            assert place is not None
            raise self.refuse(place, f"{self.at(_METHOD)} that rescales is not read yet", name=True)
        if not others:
            return first
        deltas = [self._thinned(sparse, part, first, scope, rescales=rescales) for part in others]
        if sparse.elects:
            return self._elected(first, deltas, others, scope, normalizes=sparse.normalizes)
        return self._task_vectors(first, deltas, others, scope, normalizes=sparse.normalizes)

    def _thinned(self, sparse: Sparse, part: Part, first: Node, scope: Scope, *, rescales: bool) -> Node:
        delta = self._call("subtract", [part.node, first])
        density = self.number(part.places, "density", scope, 1.0)
        if density == 1.0:
            return delta
        settings: dict[str, Literal] = {"density": density}
        if sparse.setting is not None:
            found = self.number(part.places, sparse.setting, scope, sparse.otherwise)
            if found != sparse.otherwise:
                settings[sparse.setting] = found
        if rescales != sparse.rescales:
            settings["rescale"] = False
        return self._call(sparse.method, [delta], settings, self.place_of(part.places, "density"))

    def _elected(
        self,
        first: Node,
        deltas: Sequence[Node],
        others: Sequence[Part],
        scope: Scope,
        *,
        normalizes: bool,
        densities: Sequence[Number] = (1.0,),
    ) -> Node:
        """The base and the mean of what agrees with the sign that weighted deltas elect."""
        settings: dict[str, Literal] = {}
        for argument, found in (("k", densities), ("weights", [self._weight(part, scope) for part in others])):
            alike = all(one == found[0] for one in found)
            if not alike or found[0] != 1.0:
                settings[argument] = found[0] if alike else tuple(found)
        settings["vote_sgn"] = True
        if not self.flag(scope, "normalize", normalizes):
            settings["normalize"] = False
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

    def _by_nuslerp(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        first, others = (None, list(parts)) if base is None else self._apart(parts, base)
        if len(others) != 2:
            raise self.refuse(_METHOD, f"nuslerp takes two models beside a base, but got {len(others)}")
        weights = self._plain_weights(others, scope)
        total = sum(weights)
        t = 0.5 if abs(total) < _ONE_HALF else weights[1] / total
        by_column = self.flag(scope, "nuslerp_row_wise", False)  # dimension 0, whatever the name says
        name = "nuslerp_columns" if by_column else "nuslerp_rows"
        if self.flag(scope, "nuslerp_flatten", True):
            name = "nuslerp"
        return self._around(first, others, lambda nodes: self._call(name, nodes, {"alpha": t}))

    def _by_multislerp(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        first, others = (None, list(parts)) if base is None else self._apart(parts, base)
        if not others:
            raise self.refuse(_METHOD, "multislerp takes a model or more beside a base, but got none")
        if len(others) == 1:
            return others[0].node
        weights = [self._weight(part, scope) for part in others]
        alike = weights[0] if all(weight == weights[0] for weight in weights) else None
        settings: dict[str, Literal] = {} if alike is not None else {"weights": tuple(weights)}
        if self.flag(scope, "normalize_weights", True):
            return self._around(first, others, lambda nodes: self._call("multislerp", nodes, settings))
        total = sum(self._plain_weights(others, scope))
        method, factor = ("passthrough", "scale") if first is None else ("scale", "alpha")
        return self._around(
            first,
            others,
            lambda nodes: self._call(method, [self._call("multislerp", nodes, settings)], {factor: total}),
        )

    def _by_karcher(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        if len(parts) == 1:
            return parts[0].node
        settings: dict[str, Literal] = {}
        for name, argument in (("max_iter", "iterations"), ("tol", "tolerance")):
            place = self.place_of(scope.places, name)
            if place is not None:
                number = self.finite(place, self.at(place))
                settings[argument] = int(number) if name == "max_iter" else number
        return self._call("karcher_mean", [part.node for part in parts], settings)

    def _by_ram(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        return self._reinforced("ram", parts, base, scope, {"epsilon": ("epsilon", 1e-5)})

    def _by_ramplus_tl(self, parts: Sequence[Part], base: Model | None, scope: Scope) -> Node:
        told = {"r": ("gain", 0.1), "alpha": ("limit", 0.2), "epsilon": ("epsilon", 1e-5)}
        return self._reinforced("ram_plus", parts, base, scope, told)

    def _reinforced(
        self,
        method: str,
        parts: Sequence[Part],
        base: Model | None,
        scope: Scope,
        told: Mapping[str, tuple[str, float]],
    ) -> Node:
        first, others = self._apart(parts, base)
        if not others:
            return first
        settings: dict[str, Literal] = {}
        for name, (argument, otherwise) in told.items():
            found = self.number(scope.places, name, scope, otherwise)
            if found != otherwise:
                settings[argument] = found
        return self._around(first, others, lambda nodes: self._call(method, nodes, settings))

    def _around(self, base: Node | None, others: Sequence[Part], merged: Callable[[Sequence[Node]], Node]) -> Node:
        """The models merged, or where there is a base, it and their differences from it merged."""
        if base is None:
            return merged([part.node for part in others])
        return self._call("add", [base, merged([self._call("subtract", [part.node, base]) for part in others])])

    def _plain_weights(self, parts: Sequence[Part], scope: Scope) -> list[float]:
        """The models' weights, which must be the same for all tensors."""
        weights = []
        for part in parts:
            weight = self._weight(part, scope)
            if not isinstance(weight, float):
                place = self.place_of(part.places, "weight")
                assert place is not None
                message = f"{self.at(_METHOD)} is read with weights that are the same for all tensors"
                raise self.refuse(place, message, "slerp's t may differ from layer to layer", name=True)
            weights.append(weight)
        return weights

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
