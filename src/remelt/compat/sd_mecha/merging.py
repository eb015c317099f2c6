"""Merging in sd-mecha's words: today's `merge`, and the mergers of its first versions."""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remelt.api import merging
from remelt.compat.sd_mecha.recipes import PathLike, finished, node
from remelt.errors import OptionError
from remelt.recipe.node import Node

if TYPE_CHECKING:
    from torch import Tensor

Output = MutableMapping[str, "Tensor"] | PathLike | None
_SETTLED = (
    *("output_device", "save_device", "total_buffer_size", "memoize_intermediates", "validate_mm_contract", "cache"),
    *("tqdm", "check_extra_keys", "strict_mandatory_keys", "allow_empty_merge", "strict_weight_space"),
    *("strict_merge_space", "model_dirs"),
)
"""Arguments that say how sd-mecha works, or what remelt always does."""


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
    check_finite_output: bool = True,
    omit_non_finite_inputs: bool = True,
    output: Output = None,
    **settled: Any,
) -> Any:
    """Merge a recipe to a file, into a dictionary, or to a new one, as sd-mecha 1 does.

    Results are of ``output_dtype``, float16 by default; None leaves each tensor its own type. Integers stay integers.
    """
    for name in settled:
        if name not in _SETTLED:
            raise OptionError(f"merge has no argument {name!r}")
    return _merged(
        finished(node(recipe), clamped=False),
        output,
        folders=settled.get("model_dirs") or (),
        fallback=fallback_model,
        device=merge_device,
        compute=merge_dtype,
        stored=output_dtype,
        threads=threads or None,
    )


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
        if isinstance(output, (str, os.PathLike)):
            output = Path(self.folders[0] if self.folders else Path.cwd(), output)
        _merged(
            finished(node(recipe), clamped=True),
            output,
            folders=self.folders,
            fallback=fallback_model,
            device=self.device,
            compute=self.dtype,
            stored=save_dtype,
            threads=threads,
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
        missing="first",
        overwrite=True,
    )
    if isinstance(output, MutableMapping):
        output.update(found)
        return output
    return found if kept is None else None


def _dtype(given: object) -> str | None:
    return None if given is None else str(given).removeprefix("torch.")
