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
    from remelt.alignment.derivation.tracing import groups_from_module
    from remelt.api.adapter_verification import verify_adapters
    from remelt.api.adapters import extract_lora, merge_adapters, resize_lora, save_adapter
    from remelt.api.inspection import inspect
    from remelt.api.merging import convert, merge, plan
    from remelt.api.options import MergeOptions
    from remelt.api.permuted_adapters import permute_adapter
    from remelt.api.rebasing import align_models
    from remelt.api.rebasing_many import align_many
    from remelt.api.recipes import compose, deserialize, serialize
    from remelt.engine.cache import Cache
    from remelt.errors import (
        AdapterError,
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
    from remelt.methods.cosine import add_cosine_a, add_cosine_b
    from remelt.methods.differences import euclidean_add_difference, weighted_subtraction
    from remelt.methods.dropping import dare, della, dropout
    from remelt.methods.extraction import extract
    from remelt.methods.frequency import crossover, distribution_crossover
    from remelt.methods.fusion import arcee_fusion
    from remelt.methods.latent_diffusion import balance_attention, exchange_ema
    from remelt.methods.limiting import clamp
    from remelt.methods.linear import add_difference, n_average, weighted_sum
    from remelt.methods.low_rank import truncate_kronecker, truncate_rank, truncate_rank_randomised
    from remelt.methods.masks import (
        add_opposite,
        add_opposite_mask,
        add_strict_opposite,
        add_strict_opposite_mask,
        train_difference,
        train_difference_mask,
    )
    from remelt.methods.noise import add_noise
    from remelt.methods.plumbing import cast, fallback, omit_component, omit_non_finite, pick_component, stack
    from remelt.methods.products import geometric_sum, multiply_difference, multiply_quotient, similarity_add_difference
    from remelt.methods.projection import perpendicular_component
    from remelt.methods.regions import randperm, tensor_sum, top_k_tensor_sum
    from remelt.methods.rotation import rotate
    from remelt.methods.several import geometric_median, median, model_stock, model_stock_rows
    from remelt.methods.smoothing import smooth_add, smooth_add_gaussian, smooth_add_median
    from remelt.methods.sphere import karcher_mean, multislerp, nuslerp, nuslerp_columns, nuslerp_rows, slerp_rows
    from remelt.methods.spherical import slerp, slerp_plain
    from remelt.methods.surgery import match_channels, repair_position_ids
    from remelt.methods.task import (
        add_difference_clamped,
        nearswap,
        passthrough,
        select_max_delta,
        sum_twice,
        task_arithmetic,
        triple_sum,
    )
    from remelt.methods.ties import ties, ties_by_count, ties_with_median, ties_with_stock
    from remelt.methods.trimming import breadcrumbs, trim
    from remelt.methods.variance import ram, ram_plus, sce
    from remelt.recipe.adapter import adapter, to_lora
    from remelt.recipe.blocks import blocks, classes, components, depth, keys, search
    from remelt.recipe.layers import layers, stack_layers
    from remelt.recipe.method import merge_method
    from remelt.recipe.mixture import mixture_of_experts
    from remelt.recipe.node import model, parameter
    from remelt.recipe.permuting import permute, rebasin
    from remelt.recipe.surgery import make_inpainting, make_normal, with_component
    from remelt.recipe.vocabulary import align_vocabulary

_HOMES = {
    "remelt.alignment.derivation.tracing": ("groups_from_module",),
    "remelt.api.adapter_verification": ("verify_adapters",),
    "remelt.api.adapters": ("extract_lora", "merge_adapters", "resize_lora", "save_adapter"),
    "remelt.api.inspection": ("inspect",),
    "remelt.api.merging": ("convert", "merge", "plan"),
    "remelt.api.options": ("MergeOptions",),
    "remelt.api.permuted_adapters": ("permute_adapter",),
    "remelt.api.rebasing": ("align_models",),
    "remelt.api.rebasing_many": ("align_many",),
    "remelt.api.recipes": ("compose", "deserialize", "serialize"),
    "remelt.engine.cache": ("Cache",),
    "remelt.errors": (
        "AdapterError",
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
    "remelt.methods.cosine": ("add_cosine_a", "add_cosine_b"),
    "remelt.methods.differences": ("euclidean_add_difference", "weighted_subtraction"),
    "remelt.methods.dropping": ("dare", "della", "dropout"),
    "remelt.methods.frequency": ("crossover", "distribution_crossover"),
    "remelt.methods.fusion": ("arcee_fusion",),
    "remelt.methods.latent_diffusion": ("balance_attention", "exchange_ema"),
    "remelt.methods.limiting": ("clamp",),
    "remelt.methods.linear": ("add_difference", "n_average", "weighted_sum"),
    "remelt.methods.low_rank": ("truncate_kronecker", "truncate_rank", "truncate_rank_randomised"),
    "remelt.methods.masks": (
        "add_opposite",
        "add_opposite_mask",
        "add_strict_opposite",
        "add_strict_opposite_mask",
        "train_difference",
        "train_difference_mask",
    ),
    "remelt.methods.surgery": ("match_channels", "repair_position_ids"),
    "remelt.methods.extraction": ("extract",),
    "remelt.methods.noise": ("add_noise",),
    "remelt.methods.plumbing": ("cast", "fallback", "omit_component", "omit_non_finite", "pick_component", "stack"),
    "remelt.methods.products": (
        "geometric_sum",
        "multiply_difference",
        "multiply_quotient",
        "similarity_add_difference",
    ),
    "remelt.methods.projection": ("perpendicular_component",),
    "remelt.methods.regions": ("randperm", "tensor_sum", "top_k_tensor_sum"),
    "remelt.methods.rotation": ("rotate",),
    "remelt.methods.several": ("geometric_median", "median", "model_stock", "model_stock_rows"),
    "remelt.methods.smoothing": ("smooth_add", "smooth_add_gaussian", "smooth_add_median"),
    "remelt.methods.sphere": ("karcher_mean", "multislerp", "nuslerp", "nuslerp_columns", "nuslerp_rows", "slerp_rows"),
    "remelt.methods.spherical": ("slerp", "slerp_plain"),
    "remelt.methods.task": (
        "add_difference_clamped",
        "nearswap",
        "passthrough",
        "select_max_delta",
        "sum_twice",
        "task_arithmetic",
        "triple_sum",
    ),
    "remelt.methods.ties": ("ties", "ties_by_count", "ties_with_median", "ties_with_stock"),
    "remelt.methods.trimming": ("breadcrumbs", "trim"),
    "remelt.methods.variance": ("ram", "ram_plus", "sce"),
    "remelt.recipe.adapter": ("adapter", "to_lora"),
    "remelt.recipe.blocks": ("blocks", "classes", "components", "depth", "keys", "search"),
    "remelt.recipe.layers": ("layers", "stack_layers"),
    "remelt.recipe.method": ("merge_method",),
    "remelt.recipe.surgery": ("make_inpainting", "make_normal", "with_component"),
    "remelt.recipe.mixture": ("mixture_of_experts",),
    "remelt.recipe.node": ("model", "parameter"),
    "remelt.recipe.permuting": ("permute", "rebasin"),
    "remelt.recipe.vocabulary": ("align_vocabulary",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterError",
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
    "adapter",
    "add",
    "add_cosine_a",
    "add_cosine_b",
    "add_difference",
    "add_difference_clamped",
    "add_noise",
    "add_opposite",
    "add_opposite_mask",
    "add_strict_opposite",
    "add_strict_opposite_mask",
    "align_many",
    "align_models",
    "align_vocabulary",
    "arcee_fusion",
    "balance_attention",
    "blocks",
    "breadcrumbs",
    "cast",
    "clamp",
    "classes",
    "components",
    "compose",
    "convert",
    "crossover",
    "dare",
    "della",
    "depth",
    "deserialize",
    "distribution_crossover",
    "dropout",
    "euclidean_add_difference",
    "exchange_ema",
    "extract",
    "extract_lora",
    "fallback",
    "geometric_median",
    "geometric_sum",
    "groups_from_module",
    "inspect",
    "karcher_mean",
    "keys",
    "layers",
    "make_inpainting",
    "make_normal",
    "match_channels",
    "median",
    "merge",
    "merge_adapters",
    "merge_method",
    "mixture_of_experts",
    "model",
    "model_stock",
    "model_stock_rows",
    "multiply",
    "multiply_difference",
    "multiply_quotient",
    "multislerp",
    "n_average",
    "nearswap",
    "nuslerp",
    "nuslerp_columns",
    "nuslerp_rows",
    "omit_component",
    "omit_non_finite",
    "parameter",
    "passthrough",
    "permute",
    "permute_adapter",
    "perpendicular_component",
    "pick_component",
    "plan",
    "ram",
    "ram_plus",
    "randperm",
    "rebasin",
    "repair_position_ids",
    "resize_lora",
    "rotate",
    "save_adapter",
    "scale",
    "sce",
    "search",
    "select_max_delta",
    "serialize",
    "similarity_add_difference",
    "slerp",
    "slerp_plain",
    "slerp_rows",
    "smooth_add",
    "smooth_add_gaussian",
    "smooth_add_median",
    "stack",
    "stack_layers",
    "subtract",
    "sum_twice",
    "task_arithmetic",
    "tensor_sum",
    "ties",
    "ties_by_count",
    "ties_sum",
    "ties_with_median",
    "ties_with_stock",
    "to_lora",
    "top_k_tensor_sum",
    "train_difference",
    "train_difference_mask",
    "trim",
    "triple_sum",
    "truncate_kronecker",
    "truncate_rank",
    "truncate_rank_randomised",
    "verify_adapters",
    "weighted_subtraction",
    "weighted_sum",
    "with_component",
]


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'remelt' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
