"""What the methods of older recipes are today: their arguments in order, their names, and what they assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from remelt.recipe.node import Literal

CONFIGS = {"sd1-ldm": "sd1", "sdxl-sgm": "sdxl", "sd3-comfyui": "sd3", "flux-flux": "flux"}
"""The model configs of version 0.1.0 that are archs with their usual key names."""


@dataclass(frozen=True)
class BlockConfig:
    """How version 0.1.0 tells weights by U-Net block: a dict of a config, made weights of keys by a conversion."""

    config: str
    conversion: str
    depth: int
    """Blocks on each side of the middle."""


BLOCK_CONFIGS = {
    "sd1": BlockConfig("sd1-supermerger_blocks", "convert_sd1_blocks_to_ldm", 12),
    "sdxl": BlockConfig("sdxl-supermerger_blocks", "convert_sdxl_blocks_to_sgm", 9),
}
ADAPTERS = 'adapters are not merged yet: extract the difference to a checkpoint, and read that with space="delta"'
"""What to do instead."""


@dataclass(frozen=True)
class OldMethod:
    """A method as an older recipe calls it.

    ``operands`` are its models in order, the last one any number of times where it is ``variadic``; ``values`` its
    other arguments. ``name`` is the method's today, ``renamed`` are arguments that have another name today, ``assumed``
    values that were the defaults and are no more, ``changed`` values that mean something else, ``dropped`` arguments
    without a meaning today.
    """

    name: str
    operands: tuple[str, ...]
    variadic: bool
    values: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, Literal] = field(default_factory=dict)
    changed: Mapping[str, Callable[[Literal], Literal]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()

    @property
    def fixed(self) -> int:
        """How many operands a call has at least."""
        return len(self.operands) - self.variadic

    def at(self, place: int) -> str | None:
        """The argument at a place, operands before other arguments; None beyond the last.

        >>> VERSION_0_1["weighted_sum"].at(1), VERSION_0_1["weighted_sum"].at(2), VERSION_0_1["weighted_sum"].at(3)
        ('b', 'alpha', None)
        """
        if place < self.fixed or self.variadic:
            return self.operands[min(place, len(self.operands) - 1)]
        return self.values[place - self.fixed] if place - self.fixed < len(self.values) else None


def _old(
    name: str,
    arguments: str,
    *,
    renamed: Mapping[str, str] | None = None,
    assumed: Mapping[str, Literal] | None = None,
    changed: Mapping[str, Callable[[Literal], Literal]] | None = None,
    dropped: str = "",
) -> OldMethod:
    """A method from its arguments as text: models, a bar, other arguments; a star before models in any number."""
    operands, _, values = arguments.partition("|")
    names = operands.split()
    return OldMethod(
        name,
        tuple(one.removeprefix("*") for one in names),
        bool(names) and names[-1].startswith("*"),
        tuple(values.split()),
        renamed or {},
        assumed or {},
        changed or {},
        frozenset(dropped.split()),
    )


def _is_set(value: Literal) -> Literal:
    """A switch of the headerless era was a number: above 0 is on."""
    return value > 0 if isinstance(value, (int, float)) else value


def _is_not_set(value: Literal) -> Literal:
    """The same of a switch that means the opposite since version 0.1.0."""
    return value <= 0 if isinstance(value, (int, float)) else value


_APPROXIMATE = "use_approximate_basis approximate_basis_iters approximate_basis_seed"
_EXTENDED = "apply_stock apply_median cos_eps eps maxiter ftol"

VERSION_0_1: dict[str, OldMethod] = {
    name: _old(name, arguments, dropped="device")
    for name, arguments in {
        "weighted_sum": "a b | alpha",
        "n_average": "*models",
        "slerp": "a b | alpha",
        "add_difference": "a b | alpha",
        "scale": "a | alpha",
        "subtract": "a b",
        "perpendicular_component": "a b",
        "geometric_sum": "a b | alpha",
        "multiply_quotient": "a b c | alpha",
        "train_difference_mask": "a b c | alpha",
        "add_opposite_mask": "a b c | alpha",
        "add_strict_opposite_mask": "a b c | alpha",
        "clamp": "a *bounds | stiffness",
        "add_cosine_a": "a b | alpha",
        "add_cosine_b": "a b | alpha",
        "crossover": "a b | alpha tilt",
        "tensor_sum": "a b | width offset",
        "top_k_tensor_sum": "a b | width offset",
        "ties_sum": "*models | k vote_sgn",
        "ties_sum_extended": f"*models | k vote_sgn {_EXTENDED}",
        "ties_sum_with_dropout": f"*deltas | probability della_eps rescale k vote_sgn {_EXTENDED} seed",
        "dropout": "*deltas | probability rescale overlap overlap_emphasis seed",
        "model_stock": "*deltas | cos_eps",
        "geometric_median": "*models | eps maxiter ftol",
        "rotate": "a b | alignment alpha centralization stiefel_eps stiefel_max_iters",
        "truncate_rank": f"a | rank {_APPROXIMATE}",
        "truncate_kronecker": f"a | kronecker_ratio {_APPROXIMATE}",
        "fallback": "a default",
        "cast": "a | device dtype",
        "pick_component": "a | component",
        "omit_component": "a | component",
        "omit_non_finite": "a",
        "exchange_ema": "model",
        "rebasin": "a ref | iters",
        "randperm": "a | seed",
        "balance_attention": "a",
    }.items()
}
"""The methods of version 0.1.0, which sd-mecha has written since 0.1.0rc5."""
VERSION_0_1 |= {"cosine_add_a": VERSION_0_1["add_cosine_a"], "cosine_add_b": VERSION_0_1["add_cosine_b"]}

_TIES = {"k": 0.2, "vote_sgn": 0.0}
_SWITCHES = {"vote_sgn": _is_not_set, "apply_stock": _is_not_set, "apply_median": _is_set}
_TIES_EXTENDED = {**_TIES, "apply_stock": 0.0, "apply_median": 0.0}

HEADERLESS: dict[str, OldMethod] = {
    **{
        name: VERSION_0_1[name]
        for name in (
            *("weighted_sum", "n_average", "slerp", "add_difference", "subtract", "perpendicular_component"),
            *("geometric_sum", "multiply_quotient", "clamp", "add_cosine_a", "add_cosine_b", "cosine_add_a"),
            *("cosine_add_b", "crossover", "tensor_sum", "top_k_tensor_sum", "dropout", "geometric_median"),
        )
    },
    "ties_sum": _old("ties_sum", "*models | k vote_sgn", assumed=_TIES, changed=_SWITCHES),
    "ties_sum_extended": _old(
        "ties_sum_extended", f"*models | k vote_sgn {_EXTENDED}", assumed=_TIES_EXTENDED, changed=_SWITCHES
    ),
    "ties_sum_with_dropout": _old(
        "ties_sum_with_dropout",
        f"*deltas | probability rescale k vote_sgn {_EXTENDED} seed",
        assumed=_TIES_EXTENDED,
        changed=_SWITCHES,
    ),
    "model_stock_for_tensor": _old("model_stock", "*deltas | cos_eps"),
    "train_difference": _old("train_difference", "a b c | alpha"),
    "add_opposite": _old("add_opposite", "a b c | alpha"),
    "clamped_add_opposite": _old("clamped_add_opposite", "a b c | alpha"),
    "select_max_delta": _old("select_max_delta", "a b | alpha"),
    "distribution_crossover": _old("distribution_crossover", "a b c | alpha tilt"),
    "rotate": _old("rotate", "a b | alignment alpha"),
}
"""The methods of recipes without a version, of sd-mecha 0.0.5 to 0.0.29."""

TURNED = _old("rotate", "a b | alpha beta", renamed={"alpha": "alignment", "beta": "alpha"})
"""``rotate`` as it was while it had a ``beta``."""

OLDEST: dict[str, OldMethod] = {
    **HEADERLESS,
    "clip": _old("clamp", "a *bounds | stiffness"),
    "copy_region": _old("tensor_sum", "a b | width offset"),
    "copy_top_k": _old("top_k_tensor_sum", "a b | width offset"),
    "copy_difference": _old("train_difference", "a b c | alpha"),
    "normalized_similarity_sum": _old("add_cosine_a", "a b | alpha"),
    "similarity_sum": _old("add_cosine_b", "a b | alpha"),
    "crossover": _old("crossover", "a b | alpha mean tilt", renamed={"mean": "alpha"}),
    "distribution_crossover": _old("distribution_crossover", "a b c | alpha mean tilt", renamed={"mean": "alpha"}),
}
"""The methods of the first recipes, up to sd-mecha 0.0.4, where an instruction was ``call``."""

INSTEAD = {
    "add_difference_ties": "add_difference(base, ties_sum(a - base, b - base, k=0.2), alpha=1)",
    "ties_with_dare": "add_difference(base, ties_sum_with_dropout(a - base, b - base), alpha=0.5)",
    "model_stock_n_models": "add_difference(base, model_stock(a - base, b - base), alpha=1)",
    "add_perpendicular": "add_difference(a, perpendicular_component(a - c, b - c), alpha=1)",
    "similarity_add_difference": "no method of today does the same",
}
"""What to write for functions that were no methods, or are no more."""
