"""Everything up to the plan: bind, look up, open headers, check, lay out; nothing is read or written yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remelt.api.embedding import portable_text
from remelt.api.group import Group, PreparedGroup, refuse
from remelt.api.opening import Opened, open_models
from remelt.api.options import MergeOptions
from remelt.api.outputs import refuse_full_disk, refuse_output
from remelt.api.recipes import Source
from remelt.api.resources import refuse_device
from remelt.check.bound import bind_recipes
from remelt.check.inputs import input_groups
from remelt.check.spaces import infer_masses
from remelt.core.collection import collection_paused
from remelt.formats.locate import models_folders
from remelt.recipe.adapter import ADAPTER, AdapterForm, expand_adapters, peel
from remelt.recipe.layers import LAYERS, STACK, expand_layers
from remelt.recipe.method import Method
from remelt.recipe.mixture import MIXTURE, expand_mixtures
from remelt.recipe.node import Call, Model, Node
from remelt.recipe.permuting import PERMUTE, REBASIN, expand_permutations
from remelt.recipe.signature import name_all_models
from remelt.recipe.vocabulary import ALIGN, expand_vocabularies
from remelt.recipe.walk import topological

if TYPE_CHECKING:
    from remelt.api.adapted import Adapted

_VIEWS = (LAYERS, STACK, ALIGN, ADAPTER, MIXTURE, PERMUTE, REBASIN)


@dataclass
class Prepared:
    """Planned merges with their opened inputs; a context that closes them."""

    groups: list[PreparedGroup]
    opened: Opened

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()


@collection_paused()
def prepare(
    sources: Sequence[Source],
    outputs: Sequence[Path | None],
    options: MergeOptions,
    methods: Mapping[str, Method[..., Any]],
    *,
    adapted: Adapted | None = None,
) -> Prepared:
    """Plan merges of recipes to outputs (None: memory).

    ``adapted`` is how the only result becomes an adapter, where its recipe does not say that.

    Raises `RecipeError`, `CheckError` with all problems, `BudgetError` or `OutputError`; nothing was written then.
    """
    refuse_device(options.device)
    folders = models_folders([Path(folder) for folder in options.models_dirs])
    given = [_with_fallback(source.recipe, options) for source in sources]
    peeled = [peel(recipe) for recipe in given]
    forms = [adapted or (None if form is None else _extracted(form)) for _, form in peeled]
    for output, form in zip(outputs, forms, strict=True):
        if output is not None and form is None:  # where an adapter goes is known once its names are
            refuse_output(output, options.overwrite)
    recipes = [_with_views(recipe, methods) for recipe, _ in peeled]
    graph = bind_recipes(recipes, methods, [str(source.folder) for source in sources])
    opened = open_models(graph, folders)
    try:
        refuse([*graph.problems, *opened.problems], graph)
        masses, space_problems = infer_masses(graph)
        refuse(space_problems, graph)
        texts = [
            "" if output is None else portable_text(recipe, methods, folders, source.folder)
            for source, recipe, output in zip(sources, given, outputs, strict=True)
        ]

        def planned(positions: Sequence[int], used: Sequence[int], forms: Sequence[Adapted | None]) -> PreparedGroup:
            group = Group(graph, opened, masses, positions, used, options, forms).prepare(outputs, texts)
            if group.adapted is None:
                return group
            return replace(group, again=lambda adapted: planned(positions, used, [adapted] * len(forms)))

        groups = [planned(positions, used, forms) for positions, used in input_groups(graph)]
        refuse_full_disk([output for group in groups for output in group.plan.outputs])
    except BaseException:
        opened.close()
        raise
    return Prepared(groups, opened)


def _extracted(form: AdapterForm) -> Adapted:
    from remelt.api.adapted import Extracted

    return Extracted(form)


def _with_fallback(recipe: Node, options: MergeOptions) -> Node:
    if options.fallback is None:
        return recipe
    return Call("fallback", (recipe, Model(Path(options.fallback).as_posix())))


def _with_views(recipe: Node, methods: Mapping[str, Method[..., Any]]) -> Node:
    """The recipe with models of which a part is read, or rows in another order, as views of themselves."""
    if not any(isinstance(node, Call) and node.method in _VIEWS for node in topological(recipe)):
        return recipe
    named = expand_permutations(expand_adapters(name_all_models(recipe, methods)))
    return expand_mixtures(expand_layers(expand_vocabularies(named)))
