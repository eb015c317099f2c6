"""What the methods of older recipes are today: their arguments in order, their names, and what they assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError, Span
from remelt.recipe.node import Call, Literal, Model, Node, Parameter, Value
from remelt.text.eras.composed import (
    Composed,
    aligned,
    model_stock,
    ties_extended,
    ties_with_dropout,
    truncated_kronecker,
    truncated_rank,
)

CONFIGS = {"sd1-ldm": "sd1", "sdxl-sgm": "sdxl", "sd3-comfyui": "sd3", "flux-flux": "flux"}
"""The model configs of version 0.1.0 that are archs with their usual key names."""
"""What to do instead."""
T = TypeVar("T")


class ArgumentError(RecipeError):
    """An argument does not fit; ``place`` is its place among those by position, then those by name."""

    def __init__(self, place: int, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.place = place


@dataclass(frozen=True)
class OldMethod:
    """A method as an older recipe calls it.

    ``operands`` are its models in order, the last one any number of times where it is ``variadic``, the last
    ``optional`` ones left out at will; ``values`` its other arguments, which ``by_place`` may stand after the models.
    ``name`` is the method's today, ``renamed`` are arguments that have another name today, ``assumed`` values that were
    the defaults and are no more, ``changed`` values that mean something else, ``dropped`` arguments without a meaning
    today. ``composed`` makes what several methods of today stand for. ``returns`` is the space of the result, ``same``
    that of the first operand.
    """

    name: str
    operands: tuple[str, ...]
    variadic: bool
    values: tuple[str, ...]
    optional: int = 0
    by_place: bool = True
    returns: str = "same"
    renamed: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, Literal] = field(default_factory=dict)
    changed: Mapping[str, Callable[[Literal], Literal]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    composed: Composed | None = None

    @property
    def fixed(self) -> int:
        """How many operands a call has at least."""
        return len(self.operands) - self.variadic - self.optional

    def at(self, place: int) -> str | None:
        """The argument at a place, operands before other arguments; None beyond the last.

        >>> VERSION_0_1["weighted_sum"].at(1), VERSION_0_1["weighted_sum"].at(2), VERSION_0_1["weighted_sum"].at(3)
        ('b', 'alpha', None)
        """
        if place < len(self.operands) or self.variadic:
            return self.operands[min(place, len(self.operands) - 1)]
        place -= len(self.operands)
        return self.values[place] if self.by_place and place < len(self.values) else None

    def bind(self, positional: Sequence[T], named: Sequence[tuple[str, T]]) -> tuple[list[T], dict[str, T]]:
        """The operands in the order of the signature, and the values by name; those that are dropped are left out.

        Raises `ArgumentError` for what the method does not take, and for what is missing or given twice.

        >>> VERSION_0_1["subtract"].bind([], [("b", 2), ("a", 1)])
        ([1, 2], {})
        """
        operands: dict[str, T] = {}
        several: list[T] = []
        values: dict[str, T] = {}
        for place, given in enumerate(positional):
            name = self.at(place)
            if name is None:
                raise ArgumentError(place, f"{self.name} takes {self._counted()}, but got more")
            if self.variadic and name == self.operands[-1]:
                several.append(given)
            else:
                (operands if name in self.operands else values)[name] = given
        single = self.operands[: len(self.operands) - self.variadic]
        for place, (name, given) in enumerate(named, start=len(positional)):
            if name in operands or name in values:
                raise ArgumentError(place, f"{name!r} is given twice")
            if name in single:
                operands[name] = given
            elif name in self.values:
                values[name] = given
            elif name not in self.dropped:
                known = (*single, *self.values)
                raise ArgumentError(place, f"{self.name} has no argument {name!r}", nearest_hint(name, known))
        missing = [name for name in self.operands[: self.fixed] if name not in operands]
        if missing:
            shown = f"{self.fixed} {'model' if self.fixed == 1 else 'models'}"
            raise ArgumentError(-1, f"{self.name} needs {shown}, but {', '.join(missing)} is missing")
        found = [operands[name] for name in single if name in operands] + several
        return found, {name: value for name, value in values.items() if name not in self.dropped}

    def _counted(self) -> str:
        models = f"{len(self.operands)} {'model' if len(self.operands) == 1 else 'models'}"
        return f"{models} and {', '.join(self.values)}" if self.values and self.by_place else models

    def call(
        self, operands: Sequence[Node], given: Mapping[str, Node], span: Span | None = None, **spans: Span
    ) -> Call:
        """Today's call of operands and of values by their names of that time, which stand at ``spans``."""
        values: dict[str, Node] = {}
        for name in self.values:
            value = given.get(name, Value(self.assumed[name]) if name in self.assumed else None)
            if isinstance(value, Value) and name in self.changed:
                value = Value(self.changed[name](value.value), span=value.span)
            if (
                value is not None
                and name not in self.dropped
                and not (isinstance(value, Value) and value.value is None)
            ):
                values[name] = value
        names = {name: self.renamed.get(name, name) for name in values}
        kwargs = tuple((names[name], value) for name, value in values.items())
        if self.composed is not None:
            return self.composed(operands, dict(kwargs), span)
        shown = tuple((names[name], place) for name, place in spans.items() if name in names)
        return Call(self.name, tuple(operands), kwargs, span=span, spans=shown)


def _old(name: str, arguments: str, **more: object) -> OldMethod:
    """A method from its arguments as text: models, a bar, other arguments, an arrow and the result's space.

    A star stands before models in any number, a question mark after those that may be left out.
    """
    arguments, _, returns = arguments.partition(" -> ")
    operands, _, values = arguments.partition("|")
    names = operands.split()
    dropped = frozenset(str(more.pop("dropped", "")).split())
    return OldMethod(
        name,
        tuple(one.strip("*?") for one in names),
        bool(names) and names[-1].startswith("*"),
        tuple(values.split()),
        optional=sum(one.endswith("?") for one in names),
        returns=returns or "same",
        dropped=dropped,
        **more,  # type: ignore[arg-type]
    )


def _is_set(value: Literal) -> Literal:
    """A switch of the headerless era was a number: above 0 is on."""
    return value > 0 if isinstance(value, (int, float)) else value


def _is_not_set(value: Literal) -> Literal:
    """The same of a switch that means the opposite since version 0.1.0."""
    return value <= 0 if isinstance(value, (int, float)) else value


def _whole(value: Literal) -> Literal:
    """A number of steps was any number."""
    return int(value) if isinstance(value, float) else value


def _seed(value: Literal) -> Literal:
    """A seed below 0 was none."""
    return (int(value) if value >= 0 else None) if isinstance(value, (int, float)) else value


_APPROXIMATE = "use_approximate_basis approximate_basis_iters approximate_basis_seed"
_EXTENDED = "apply_stock apply_median cos_eps eps maxiter ftol"
_MEDIAN = {"renamed": {"maxiter": "iterations"}, "changed": {"maxiter": _whole}, "dropped": "eps ftol"}

VERSION_0_1: dict[str, OldMethod] = {
    **{
        name: _old(name, arguments)
        for name, arguments in {
            "weighted_sum": "a b | alpha",
            "n_average": "*models",
            "slerp": "a b | alpha",
            "add_difference": "a b | alpha",
            "scale": "a | alpha",
            "subtract": "a b -> delta",
            "perpendicular_component": "a b",
            "geometric_sum": "a b | alpha",
            "multiply_quotient": "a b c | alpha",
            "train_difference_mask": "a b c | alpha -> mask",
            "add_opposite_mask": "a b c | alpha -> mask",
            "add_strict_opposite_mask": "a b c | alpha -> mask",
            "clamp": "a *bounds | stiffness",
            "add_cosine_a": "a b | alpha -> weight",
            "add_cosine_b": "a b | alpha -> weight",
            "crossover": "a b | alpha tilt",
            "tensor_sum": "a b | width offset",
            "top_k_tensor_sum": "a b | width offset",
            "ties_sum": "*models | k vote_sgn -> delta",
            "fallback": "a default",
            "pick_component": "a | component",
            "omit_component": "a | component",
            "stack": "*values",
            "exchange_ema": "model",
            "balance_attention": "a",
        }.items()
    },
    "cast": _old("cast", "a | device dtype", dropped="device"),
    "ties_sum_extended": _old(
        "ties_sum_extended", f"*models | k vote_sgn {_EXTENDED} -> delta", composed=ties_extended
    ),
    "ties_sum_with_dropout": _old(
        "ties_sum_with_dropout",
        f"*deltas | probability della_eps rescale k vote_sgn {_EXTENDED} seed -> delta",
        composed=ties_with_dropout,
    ),
    "dropout": _old(
        "dropout",
        "*deltas | probability rescale overlap overlap_emphasis seed -> delta",
        changed={"seed": _seed},
    ),
    "model_stock": _old("model_stock", "*deltas | cos_eps -> delta", composed=model_stock),
    "geometric_median": _old("geometric_median", "*models | eps maxiter ftol", **_MEDIAN),
    "rotate": _old(
        "rotate",
        "a b | alignment alpha centralization stiefel_eps stiefel_max_iters",
        dropped="stiefel_eps stiefel_max_iters",
    ),
    "rebasin": _old("rebasin", "a ref | iters", dropped="iters", composed=aligned),
    "truncate_rank": _old("truncate_rank", f"a | rank {_APPROXIMATE} -> delta", composed=truncated_rank),
    "truncate_kronecker": _old(
        "truncate_kronecker", f"a | kronecker_ratio {_APPROXIMATE} -> delta", composed=truncated_kronecker
    ),
}
"""The methods of version 0.1.0, which sd-mecha has written since 0.1.0rc5."""
VERSION_0_1 |= {"cosine_add_a": VERSION_0_1["add_cosine_a"], "cosine_add_b": VERSION_0_1["add_cosine_b"]}

MISSING = {
    "randperm": "it permutes a whole network's neurons there, which here is no method of one key: run it there",
    "omit_non_finite": "write it in version 1, where omit_non_finite(a, b) is b where a is not finite",
    "get_dtype": 'name the element type as a text, as in cast(a, dtype="fp16")',
    "get_device": "where a merge computes is an option of the merge: --device",
    "get_rank_from_ratio": "write it in version 1: truncate_rank(delta, share=0.5)",
}
"""Methods of sd-mecha that are known, and not here yet, with what to do instead."""

_TIES = {"k": 0.2, "vote_sgn": 0.0}
_SWITCHES = {"vote_sgn": _is_not_set, "apply_stock": _is_not_set, "apply_median": _is_set}
_TIES_EXTENDED: dict[str, Literal] = {**_TIES, "apply_stock": 0.0, "apply_median": 0.0}
_MEAN = {"renamed": {"mean": "alpha"}}


def _of_that_time(methods: Mapping[str, OldMethod]) -> dict[str, OldMethod]:
    """Methods of recipes without a version: values go by name, and every call could say where it computes."""
    return {
        name: replace(method, by_place=False, dropped=method.dropped | {"device", "dtype"})
        for name, method in methods.items()
    }


HEADERLESS: dict[str, OldMethod] = _of_that_time(
    {
        **{
            name: VERSION_0_1[name]
            for name in (
                *("weighted_sum", "n_average", "slerp", "subtract", "perpendicular_component", "geometric_sum"),
                *("multiply_quotient", "clamp", "add_cosine_a", "add_cosine_b", "cosine_add_a", "cosine_add_b"),
                *("tensor_sum", "dropout", "geometric_median"),
            )
        },
        "add_difference": _old("add_difference", "a b c? | alpha"),
        "clip": _old("clamp", "a *bounds | stiffness"),
        "crossover": _old("crossover", "a b | alpha mean tilt", **_MEAN),
        "distribution_crossover": _old("distribution_crossover", "a b c | alpha mean tilt", **_MEAN),
        "top_k_tensor_sum": replace(VERSION_0_1["top_k_tensor_sum"], assumed={"width": 0.5}),
        "ties_sum": replace(VERSION_0_1["ties_sum"], assumed=_TIES, changed=_SWITCHES),
        "ties_sum_extended": replace(VERSION_0_1["ties_sum_extended"], assumed=_TIES_EXTENDED, changed=_SWITCHES),
        "ties_sum_with_dropout": _old(
            "ties_sum_with_dropout",
            f"*deltas | probability rescale no_rescale k vote_sgn {_EXTENDED} seed -> delta",
            assumed=_TIES_EXTENDED,
            changed=_SWITCHES | {"no_rescale": _is_not_set, "seed": _seed},
            renamed={"no_rescale": "rescale"},
            composed=ties_with_dropout,
        ),
        "model_stock_for_tensor": VERSION_0_1["model_stock"],
        "train_difference": _old("train_difference", "a b c | alpha"),
        "add_opposite": _old("add_opposite", "a b c | alpha"),
        "clamped_add_opposite": _old("add_strict_opposite", "a b c | alpha"),
        "select_max_delta": _old("select_max_delta", "a b | alpha -> delta"),
        "rotate": _old("rotate", "a b | alignment alpha"),
    }
)
"""The methods of recipes without a version, of sd-mecha 0.0.5 to 0.0.29."""

TURNED = _of_that_time({"rotate": _old("rotate", "a b | alpha beta", renamed={"alpha": "alignment", "beta": "alpha"})})[
    "rotate"
]
"""``rotate`` as it was while it had a ``beta``."""

OLDEST: dict[str, OldMethod] = {
    **HEADERLESS,
    **_of_that_time(
        {
            "rotate": TURNED,
            "copy_region": _old("tensor_sum", "a b | width offset"),
            "copy_top_k": _old("top_k_tensor_sum", "a b | width offset"),
            "copy_difference": _old("train_difference", "a b c | alpha"),
            "normalized_similarity_sum": _old("add_cosine_a", "a b | alpha -> weight"),
            "similarity_sum": _old("add_cosine_b", "a b | alpha -> weight"),
            "similarity_add_difference": _old(
                "similarity_add_difference",
                "a b c | alpha similarity_scale",
                renamed={"similarity_scale": "beta"},
                assumed={"similarity_scale": 1.0},
            ),
        }
    ),
}
"""The methods of the first recipes, up to sd-mecha 0.0.4, where an instruction was ``call``."""

INSTEAD = {
    "add_difference_ties": "add_difference(base, ties_sum(a - base, b - base, k=0.2, vote_sgn=True), alpha=1)",
    "ties_with_dare": "add_difference(base, ties_sum(dare(a - base, density=0.1), dare(b - base, density=0.1, seed=1), "
    "k=0.2, vote_sgn=True), alpha=0.5)",
    "model_stock_n_models": "add_difference(base, model_stock_rows(a - base, b - base), alpha=1)",
    "add_perpendicular": "add_difference(a, perpendicular_component(a - c, b - c), alpha=1)",
}
"""What to write for functions that were no methods, or are no more."""

RETURNS = {
    **{method.name: method.returns for method in (*VERSION_0_1.values(), *HEADERLESS.values())},
    **dict.fromkeys(("trim", "dare", "ties_with_stock", "ties_with_median", "model_stock_rows"), "delta"),
    "truncate_rank_randomised": "delta",
}
"""The spaces of results by the methods' names of today."""


def differences(order: Sequence[Node], returns: Mapping[str, str] = RETURNS) -> dict[int, bool]:
    """Whether each node is a difference of models, by its identity, for nodes in an order as `topological` gives it.

    ``returns`` gives what methods declare of their results; of others it is what the first operand is.

    >>> model = Model("a")
    >>> list(differences([model, Call("subtract", (model, model))]).values())
    [False, True]
    """
    found: dict[int, bool] = {}
    for node in order:
        if isinstance(node, Call):
            operands = (*node.args, *(child for _, child in sorted(node.kwargs, key=lambda pair: pair[0])))
            below = [found[id(child)] for child in operands if not isinstance(child, Value)]
            found[id(node)] = _is_difference(node.method, below, returns)
        else:
            found[id(node)] = isinstance(node, (Model, Parameter)) and node.space == "delta"
    return found


def _is_difference(method: str, below: Sequence[bool], returns: Mapping[str, str]) -> bool:
    first = bool(below) and below[0]
    if method == "subtract":
        return len(below) < 2 or first == below[1]
    if method == "add":
        return first and all(below)
    space = returns.get(method, "same")
    return space == "delta" or (space in ("same", "any") and first)
