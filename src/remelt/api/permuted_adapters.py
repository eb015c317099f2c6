"""Adapters written anew for a model whose axes were permuted: of the same kind, rank and names, by another order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from remelt.adapters.names import is_adapter
from remelt.adapters.pairing import Layouts
from remelt.adapters.permuted import permuted_adapter
from remelt.adapters.settings import CONFIG
from remelt.adapters.written import Written
from remelt.alignment.files import SavedPermutations, load_permutations
from remelt.alignment.rotated_checkpoint import RotatedCheckpoint
from remelt.api.adapted import Adapted
from remelt.api.embedding import portable_text
from remelt.api.merging import Watch, asked, drain
from remelt.api.opening import open_models
from remelt.api.options import PathLike
from remelt.api.permuted_views import Saved, SavedGathers
from remelt.api.prepare import prepare
from remelt.api.recipes import JOINED_KEY, RECIPE_KEY
from remelt.api.rotated_views import PartTurns, SavedTurns
from remelt.archs.arch import Arch, all_archs
from remelt.check.bound import bind_recipes
from remelt.check.inputs import Input
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError, RecipeError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.layout import OutputLayout, file_layout
from remelt.formats.locate import locate_model, models_folders
from remelt.formats.permuted import Gather
from remelt.methods import METHODS
from remelt.planning.plan import PlannedOutput
from remelt.recipe.node import Model, as_node
from remelt.recipe.permuting import permute


class _Kept(Adapted):
    """An adapter that is written as it was: a file, or the folder that PEFT made, with its configuration."""

    def __init__(self, adapter: Checkpoint, told: Mapping[str, str]) -> None:
        super().__init__(Written.like(adapter), {})
        self._folder = adapter.path if adapter.path is not None and adapter.path.is_dir() else None
        self._told = told

    def lay_out(self, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], path: Path) -> OutputLayout:
        """One file, with what the metadata said before."""
        layout = super().lay_out(tensors, {**metadata, **self._told}, path)
        if layout.is_folder:
            return layout
        return replace(layout, files=(file_layout(tensors, {**metadata, **self._told}, path.name),))

    def companions(self, output: PlannedOutput) -> Iterator[tuple[bytes, str]]:
        """PEFT's configuration, as it is."""
        if self._folder is not None and output.layout is not None and output.layout.is_folder:
            yield (self._folder / CONFIG).read_bytes(), CONFIG


def is_adapter_file(path: PathLike, models_dirs: Sequence[PathLike] = ()) -> bool:
    """Whether a file or a name in a models folder is an adapter's."""
    folders = models_folders([Path(folder) for folder in models_dirs])
    with open_checkpoint(locate_model(str(path), [Path.cwd(), *folders])) as checkpoint:
        return is_adapter(checkpoint.tensors)


def permute_adapter(
    adapter: PathLike,
    permutations: PathLike,
    output: PathLike,
    *,
    inverse: bool = False,
    watch: Watch | None = None,
    **options: Any,
) -> Path:
    """Write an adapter so that it follows its model, whose axes a permutation file says to permute.

    Kind, ranks, names and metadata stay. Options are those of `merge`. Returns the path.

    Raises `AdapterError` where modules are of a kind that cannot be permuted by its parts, or none of the model's;
    `FormatError` for what is no permutation file.
    """
    recipe = permute(adapter, permutations, inverse=inverse)
    source, chosen = asked(recipe, output, options)
    folders = models_folders([Path(folder) for folder in chosen.models_dirs])
    saved = load_permutations(locate_model(str(permutations), [Path.cwd(), *folders]))
    saved = saved.inverse() if inverse else saved
    graph = bind_recipes([as_node(adapter)], METHODS, ["."])
    with open_models(graph, folders) as opened:
        if opened.problems:
            raise RecipeError("\n".join(map(str, opened.problems)))
        given = opened.inputs[0]
        if given.adapter is None:
            raise AdapterError(f"{given.label} is no adapter", hint="remelt merge permutes models in recipes")
        try:
            view = _permuted(given.checkpoint, saved)
        except AdapterError as error:
            raise AdapterError(f"{given.label}: {error.message}", hint=error.hint) from None
        text = portable_text(recipe, METHODS, folders, Path.cwd())
        told = {**given.checkpoint.metadata, JOINED_KEY: "permuted", RECIPE_KEY: text}
        held = Model(given.label, tensors=view)  # type: ignore[arg-type]
        source = replace(source, recipe=held)
        with prepare([source], [Path(output)], chosen, METHODS, adapted=_Kept(given.checkpoint, told)) as prepared:
            return drain(prepared, chosen, watch).paths[0]


def with_permuted_factors(given: Input, uses: Sequence[Saved]) -> Input | None:
    """An adapter with its own tensors permuted; None where only the differences that it makes can be.

    These are the ones of kinds that multiply a model's weights, or that have no part for each output and each input.
    """
    try:
        checkpoint = given.checkpoint
        if any(use.permutations.rotations for use in uses):
            return None  # factors are rounded to their own type: the differences are not
        for use in uses:
            checkpoint = _permuted(checkpoint, use.permutations, alone=True)
    except AdapterError:
        return None
    return replace(given, label=f"{given.label}, permuted by {uses[-1].label}", checkpoint=checkpoint)


def _permuted(adapter: Checkpoint, saved: SavedPermutations, *, alone: bool = False) -> Checkpoint:
    gathers = SavedGathers(saved)

    def gather_of(key: str) -> Gather | None:
        return gathers.of(key) if key in gathers.keys else None

    turns = SavedTurns(saved)
    axes = {key: {turn.axis for turn in turns.of(key)} for key in turns.keys}
    found, parts = permuted_adapter(adapter, _layouts(saved), gather_of, gathers.told(), alone=alone, turned=axes)
    return RotatedCheckpoint(found, PartTurns(turns, parts)) if parts else found


def _layouts(saved: SavedPermutations) -> Layouts:
    """The layouts of the model that a permutation file is of, by which adapters name its modules."""
    arch: Arch | None = None if saved.arch is None else all_archs().get(saved.arch)
    return Layouts.of(arch, {key: TensorInfo(DType.F32, shape) for key, shape in saved.shapes.items()})
