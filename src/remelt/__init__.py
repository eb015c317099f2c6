"""Remelt merges neural-network checkpoints from executable recipes.

    import remelt as rm

    recipe = rm.weighted_sum("ghostmix", "deliberate", alpha=0.5)
    rm.merge(recipe, output="mix.safetensors")

Names are loaded when they are first used, so that importing remelt never loads torch by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from remelt.version import __version__

if TYPE_CHECKING:
    from remelt.api.inspection import inspect
    from remelt.api.merging import merge, plan
    from remelt.api.options import MergeOptions
    from remelt.api.recipes import compose, deserialize, serialize
    from remelt.engine.cache import Cache
    from remelt.errors import (
        BudgetError,
        CheckError,
        FormatError,
        MethodError,
        MissingExtraError,
        ModelNameError,
        NonFiniteError,
        OptionError,
        OutputError,
        RecipeError,
        RecipeSyntaxError,
        RefusedError,
        RemeltError,
        RunError,
        UsageError,
    )
    from remelt.methods.arithmetic import add, multiply, scale, subtract
    from remelt.methods.consensus import ties_sum
    from remelt.methods.limiting import clamp
    from remelt.methods.linear import add_difference, n_average, weighted_sum
    from remelt.methods.plumbing import cast, fallback, omit_component, pick_component
    from remelt.methods.projection import perpendicular_component
    from remelt.methods.spherical import slerp, slerp_plain
    from remelt.recipe.blocks import blocks, classes, components, depth, keys, search
    from remelt.recipe.layers import layers, stack_layers
    from remelt.recipe.method import merge_method
    from remelt.recipe.node import model, parameter
    from remelt.recipe.vocabulary import align_vocabulary

_HOMES = {
    "remelt.api.inspection": ("inspect",),
    "remelt.api.merging": ("merge", "plan"),
    "remelt.api.options": ("MergeOptions",),
    "remelt.api.recipes": ("compose", "deserialize", "serialize"),
    "remelt.engine.cache": ("Cache",),
    "remelt.errors": (
        "BudgetError",
        "CheckError",
        "FormatError",
        "MethodError",
        "MissingExtraError",
        "ModelNameError",
        "NonFiniteError",
        "OptionError",
        "OutputError",
        "RecipeError",
        "RecipeSyntaxError",
        "RefusedError",
        "RemeltError",
        "RunError",
        "UsageError",
    ),
    "remelt.methods.arithmetic": ("add", "multiply", "scale", "subtract"),
    "remelt.methods.consensus": ("ties_sum",),
    "remelt.methods.limiting": ("clamp",),
    "remelt.methods.linear": ("add_difference", "n_average", "weighted_sum"),
    "remelt.methods.plumbing": ("cast", "fallback", "omit_component", "pick_component"),
    "remelt.methods.projection": ("perpendicular_component",),
    "remelt.methods.spherical": ("slerp", "slerp_plain"),
    "remelt.recipe.blocks": ("blocks", "classes", "components", "depth", "keys", "search"),
    "remelt.recipe.layers": ("layers", "stack_layers"),
    "remelt.recipe.method": ("merge_method",),
    "remelt.recipe.node": ("model", "parameter"),
    "remelt.recipe.vocabulary": ("align_vocabulary",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BudgetError",
    "Cache",
    "CheckError",
    "FormatError",
    "MergeOptions",
    "MethodError",
    "MissingExtraError",
    "ModelNameError",
    "NonFiniteError",
    "OptionError",
    "OutputError",
    "RecipeError",
    "RecipeSyntaxError",
    "RefusedError",
    "RemeltError",
    "RunError",
    "UsageError",
    "__version__",
    "add",
    "add_difference",
    "align_vocabulary",
    "blocks",
    "cast",
    "clamp",
    "classes",
    "components",
    "compose",
    "depth",
    "deserialize",
    "fallback",
    "inspect",
    "keys",
    "layers",
    "merge",
    "merge_method",
    "model",
    "multiply",
    "n_average",
    "omit_component",
    "parameter",
    "perpendicular_component",
    "pick_component",
    "plan",
    "scale",
    "search",
    "serialize",
    "slerp",
    "slerp_plain",
    "stack_layers",
    "subtract",
    "ties_sum",
    "weighted_sum",
]


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        if name == "convert":
            raise AttributeError("remelt.convert is reserved for conversions between key layouts, which come later")
        raise AttributeError(f"module 'remelt' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
