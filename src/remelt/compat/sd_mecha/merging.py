"""Merging in sd-mecha's words: today's `merge`, and the mergers of its first versions."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remelt.api import merging
from remelt.compat.sd_mecha.methods import is_delta
from remelt.compat.sd_mecha.recipes import PathLike, finished, node
from remelt.core.nearest import nearest_hint
from remelt.errors import OptionError
from remelt.recipe.node import Node

if TYPE_CHECKING:
    from torch import Tensor

Output = MutableMapping[str, "Tensor"] | PathLike | None
_SETTLED = (
    *("total_buffer_size", "memoize_intermediates", "validate_mm_contract", "cache", "tqdm", "check_extra_keys"),
    *("strict_weight_space", "strict_merge_space", "model_dirs", "output_device", "allow_empty_merge"),
)
"""Arguments of ``merge`` beside those that are named: how sd-mecha works, or what is looked at below."""
_SETTLED_THEN = ("save_device", "total_buffer_size", "strict_weight_space")
"""Those of the mergers of sd-mecha 0."""


def set_log_level(level: str = "INFO") -> None:
    """How much of what happens is told."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)


def merge(
    recipe: Any,
    *,
    fallback_model: Any = None,
    merge_device: object = "cpu",
    merge_dtype: object = "float32",
    output_dtype: object = "float16",
    threads: int | None = None,
    check_finite_output: bool | None = None,
    omit_non_finite_inputs: bool | None = None,
    strict_mandatory_keys: bool = False,
    output: Output = None,
    **settled: Any,
) -> Any:
    """Merge a recipe to a file, into a dictionary, or to a new one, as sd-mecha 1 does.

    Results are of ``output_dtype``, float16 by default; None leaves each tensor its own type. Integers stay integers.
    NaN and infinities are refused; unless ``omit_non_finite_inputs`` is set, which takes such tensors for missing, or
    ``check_finite_output`` is False, which keeps them. With ``strict_mandatory_keys`` every model has all keys.
    """
    _known("merge", settled, _SETTLED, merge)
    if settled.get("allow_empty_merge"):
        raise OptionError("remelt writes no empty results: allow_empty_merge is not here")
    graph = finished(node(recipe), clamped=False)
    strict = settled.get("strict_merge_space") or ("weight" if settled.get("strict_weight_space") else None)
    _held_to(graph, strict)
    return _merged(
        graph,
        output,
        folders=settled.get("model_dirs") or (),
        fallback=fallback_model,
        device=merge_device,
        compute=merge_dtype,
        stored=output_dtype,
        threads=threads or None,
        missing="error" if strict_mandatory_keys else "first",
        nonfinite="missing" if omit_non_finite_inputs else "keep" if check_finite_output is False else "error",
        moved_to=settled.get("output_device"),
    )


def _known(name: str, given: Iterable[str], settled: Sequence[str], function: Callable[..., Any]) -> None:
    """Refuse an argument that sd-mecha never had."""
    for argument in given:
        if argument not in settled:
            taken = [one.name for one in signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY]
            hint = nearest_hint(argument, (*settled, *taken))
            raise OptionError(f"{name} has no argument {argument!r}", hint=hint)


def _held_to(recipe: Node, space: object) -> None:
    """Refuse a result that is in another space than was asked for."""
    wanted = None if space is None else str(getattr(space, "identifier", space))
    if wanted is None:
        return
    if wanted not in ("weight", "delta"):
        raise OptionError(f"strict_merge_space is weight or delta, but got {wanted!r}")
    found = "delta" if is_delta(recipe) else "weight"
    if found != wanted:
        raise OptionError(f"the recipe's result is a {found}, but strict_merge_space is {wanted!r}")


class RecipeMerger:
    """The merger of sd-mecha 0: models are named as in ``models_dir``, one folder or several."""

    def __init__(
        self,
        *,
        models_dir: PathLike | Sequence[PathLike] | None = None,
        default_device: object = "cpu",
        default_dtype: object = "float64",
        **settled: object,
    ) -> None:
        _known("RecipeMerger", settled, ("tqdm",), RecipeMerger.__init__)
        named = [models_dir] if isinstance(models_dir, (str, os.PathLike)) else list(models_dir or ())
        self.folders = [Path(one).absolute() for one in named]
        self.device, self.dtype = default_device, default_dtype

    def merge_and_save(
        self,
        recipe: Any,
        *,
        output: Output = "merge",
        fallback_model: Any = None,
        save_dtype: object = "float16",
        threads: int | None = None,
        **settled: object,
    ) -> None:
        """Merge a recipe to a file, named as models are, or into a dictionary.

        ``add_difference`` of three models stays between the first two, as it did then.
        """
        _known("merge_and_save", settled, _SETTLED_THEN, RecipeMerger.merge_and_save)
        graph = finished(node(recipe), clamped=True)
        _held_to(graph, "weight" if settled.get("strict_weight_space") else None)
        if isinstance(output, (str, os.PathLike)):
            output = Path(self.folders[0] if self.folders else Path.cwd(), output)
        _merged(
            graph,
            output,
            folders=self.folders,
            fallback=fallback_model,
            device=self.device,
            compute=self.dtype,
            stored=save_dtype,
            threads=threads,
            moved_to=settled.get("save_device"),
        )


class MergeScheduler:
    """The merger of the first releases, where the folder was a ``base_dir``."""

    def __init__(
        self, *, base_dir: PathLike | None = None, threads: int = 1, default_device: object = "cpu",
        default_dtype: object = "float32",
    ) -> None:  # fmt: skip
        self.merger = RecipeMerger(models_dir=base_dir, default_device=default_device, default_dtype=default_dtype)
        self.threads = threads

    def merge_and_save(
        self, recipe: Any, *, output_path: PathLike, save_dtype: object = "float16", threads: int | None = None
    ) -> None:
        """Merge a recipe to a file."""
        self.merger.merge_and_save(recipe, output=output_path, save_dtype=save_dtype, threads=threads or self.threads)


def merge_and_save(recipe: Any, models_dir: PathLike, output_path: PathLike) -> None:
    """Merge a recipe to a file, models named as in a folder."""
    RecipeMerger(models_dir=models_dir).merge_and_save(recipe, output=output_path)


def _merged(
    recipe: Node,
    output: Output,
    *,
    folders: Sequence[PathLike],
    fallback: Any,
    device: object,
    compute: object,
    stored: object,
    threads: int | None,
    missing: str = "first",
    nonfinite: str = "error",
    moved_to: object = None,
) -> Any:
    if fallback is not None:
        recipe = recipe | node(fallback)
    kept = None if isinstance(output, MutableMapping) or output is None else Path(output)
    if kept is not None and not kept.suffix:
        kept = kept.with_name(f"{kept.name}.safetensors")
    found = merging.merge(
        recipe,
        kept,
        models_dirs=tuple(folders),
        device=str(device or "cpu"),
        compute_dtype=_dtype(compute) or "float32",
        dtype=_dtype(stored),
        threads=threads,
        missing=missing,
        nonfinite=nonfinite,
        overwrite=True,
    )
    if kept is None and moved_to is not None:
        found = {key: tensor.to(moved_to) for key, tensor in found.items()}
    if isinstance(output, MutableMapping):
        output.update(found)
        return output
    return found if kept is None else None


def _dtype(given: object) -> str | None:
    return None if given is None else str(given).removeprefix("torch.")
