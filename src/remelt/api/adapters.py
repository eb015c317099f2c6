"""Adapters made: extracted from models, merged into one, resized; and whether they landed in a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remelt.adapters.checkpoint import ChangesCheckpoint, changes_of
from remelt.adapters.joining import JoinedAdapter, Term
from remelt.adapters.pairing import Layouts
from remelt.adapters.written import Written
from remelt.api.adapted import Adapted, Extracted, Measure
from remelt.api.adapter_views import Changed
from remelt.api.embedding import portable_text
from remelt.api.merging import Watch, asked, drain
from remelt.api.opening import Opened, open_models
from remelt.api.options import MergeOptions, PathLike
from remelt.api.prepare import prepare
from remelt.api.recipes import JOINED_KEY, RECIPE_KEY
from remelt.check.bound import bind_recipes
from remelt.core.dtype import DType
from remelt.errors import AdapterError, RecipeError
from remelt.formats.locate import models_folders
from remelt.methods import METHODS
from remelt.recipe.adapter import AdapterForm, expand_adapters, peel, to_lora
from remelt.recipe.node import Call, Model, Node, Operand, Value, as_node
from remelt.recipe.signature import name_all_models
from remelt.recipe.walk import topological


@dataclass
class AdapterReport:
    """What was written: where, and of each module its rank and the share of the energy that it keeps."""

    path: Path
    ranks: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    """The squared norm of what each module stands for, where it was measured."""
    left: dict[str, float] = field(default_factory=dict)
    """That of tensors which differ, but have no place in an adapter: biases, norms, tables, a VAE."""

    @property
    def share(self) -> float:
        """The share of the energy of all modules together that is kept."""
        total = sum(self.energies.values())
        return sum(self.shares[name] * energy for name, energy in self.energies.items()) / total if total else 1.0


def extract_lora(
    tuned: Operand,
    base: Operand,
    output: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    kind: str = "lora",
    names: str | None = None,
    factor: int = -1,
    watch: Watch | None = None,
    **options: Any,
) -> AdapterReport:
    """Write what a model was tuned by as an adapter of its base.

    ``rank`` is that of every matrix, at most; ``energy`` the share of each one's squares that is to be kept, by as
    low a rank as does. ``kind`` is ``lora`` or ``lokr``; ``names`` are those of ``kohya``, ``diffusers`` or ``peft``,
    whose adapters are folders. Streams, within the memory of the options, which are those of `merge`.

    Raises what `merge` raises.
    """
    wanted = to_lora(as_node(tuned) - as_node(base), rank=rank, energy=energy, kind=kind, names=names, factor=factor)
    return save_adapter(wanted, output, watch=watch, **options)


def save_adapter(recipe: Node, output: PathLike, *, watch: Watch | None = None, **options: Any) -> AdapterReport:
    """Write a recipe whose outermost step is `to_lora`, with what each module keeps; `RecipeError` for another.

    Differences are computed twice: once for their singular values, then for their factors.
    """
    source, chosen = asked(recipe, output, options)
    _, form = peel(source.recipe)
    if form is None:
        raise RecipeError("an adapter is made of a difference", hint="to_lora(tuned - base, rank=32)")
    with prepare(
        [source], [Path(output)], chosen, METHODS, adapted=Extracted(form, measures=Measure.ENERGY)
    ) as prepared:
        path = drain(prepared, chosen, watch).paths[0]
        made = prepared.groups[0].adapted
    assert isinstance(made, Extracted)
    keys = made.made.keys
    return AdapterReport(
        path,
        dict(made.modules),
        {name: made.shares[key] for name, key in keys.items()},
        {name: made.energies[key] for name, key in keys.items()},
        made.left,
    )


def merge_adapters(
    recipe: Operand,
    output: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: PathLike | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> AdapterReport:
    """Write a weighted sum of LoRAs as one LoRA, with the names of the first.

    Without ``rank`` and ``energy`` it is exact, of ranks that add up; with them each module is the nearest of that
    rank, or of the least that keeps that share of its energy. No product is ever made whole: that costs the square of
    the ranks, not of the widths. ``base`` is the model that they change, where their names differ.

    Raises `RecipeError` where the recipe is no weighted sum of adapters, `AdapterError` where one is no LoRA.

    Source: sums of products by QR of their factors; the common tools add up-factors and down-factors one by one, which
    makes cross terms.
    """
    if rank is not None or energy is not None:
        AdapterForm(rank, energy)  # which refuses what neither can be
    dtype = options.pop("dtype", None)
    chosen = MergeOptions(**options)
    folders = models_folders([Path(folder) for folder in chosen.models_dirs])
    expanded = expand_adapters(name_all_models(as_node(recipe), METHODS))
    strengths = _strengths(expanded)
    graph = bind_recipes([expanded], METHODS, ["."])
    with open_models(graph, folders) as opened:
        terms = _terms(graph, opened, strengths, base, folders)
        first = terms[0].changes
        written = Written.like(first.adapter)
        has_alpha = "alpha" in {name.rpartition(".")[2] for name in first.adapter.tensors}
        stored = first.stored if dtype is None else DType.parse(dtype)
        joined = JoinedAdapter(terms, rank, energy, written, stored, has_alpha=has_alpha)
        again = to_lora(as_node(recipe), rank=max(joined.ranks.values()))
        told = {
            **_carried(first.metadata),
            JOINED_KEY: "factors",
            RECIPE_KEY: portable_text(again, METHODS, folders, Path.cwd()),
        }
        joined.inherited = told
        given = Model("adapters", tensors=joined)  # type: ignore[arg-type]
        source, chosen = asked(given, output, options)
        with prepare([source], [Path(output)], chosen, METHODS, adapted=Adapted(written, joined.ranks)) as prepared:
            path = drain(prepared, chosen, watch).paths[0]
    return AdapterReport(path, joined.ranks, joined.shares, joined.energies)


def resize_lora(
    adapter: PathLike, output: PathLike, *, rank: int | None = None, energy: float | None = None, **options: Any
) -> AdapterReport:
    """Write a LoRA at another rank, or at the least that keeps a share of the energy of each module.

    Raises `RecipeError` where neither is asked for.
    """
    if rank is None and energy is None:
        raise RecipeError("a LoRA is resized to a rank, or to a share of the energy", hint="rank=32, or energy=0.95")
    return merge_adapters(adapter, output, rank=rank, energy=energy, **options)


def _terms(
    graph: Any, opened: Opened, strengths: Mapping[object, float], base: PathLike | None, folders: Any
) -> list[Term]:
    """The adapters of a weighted sum, each with its strength."""
    if opened.problems:
        raise RecipeError("\n".join(map(str, opened.problems)))
    given = {_identity(model): opened.inputs[i] for i, model in enumerate(graph.models) if i in opened.inputs}
    models = [one for one in given.values() if one.adapter is None]
    if models:
        raise RecipeError(
            f"{models[0].label} is a model, but adapters alone are joined", hint="remelt merge applies them"
        )
    if base is None:
        layouts, in_dialect = Layouts.of_adapters(), _none
    else:
        known = bind_recipes([as_node(base)], METHODS, ["."])
        found = opened._files.enter_context(open_models(known, folders))
        if found.problems:
            raise RecipeError("\n".join(map(str, found.problems)))
        whole = Changed(found.inputs[0])
        layouts, in_dialect = whole.layouts, whole.in_dialect
    terms = []
    for identity, one in given.items():
        try:
            if layouts.is_own:
                layouts.learn(one.checkpoint.tensors)
            view = changes_of(one.checkpoint, layouts, in_dialect)
        except AdapterError as error:
            raise AdapterError(f"{one.label}: {error.message}", hint=error.hint) from None
        assert isinstance(view.checkpoint, ChangesCheckpoint)
        terms.append(Term(view.checkpoint, strengths[identity], view.made, one.label))
    return terms


def _none(dialect: str) -> Any:
    raise AdapterError(
        "this kind of adapter multiplies a model's own weights, and is no product of two factors",
        hint="to_lora(..., rank=32) of it is computed from the difference as a whole",
    )


def _identity(model: Model) -> object:
    return model.name, model.sha256, None if model.tensors is None else id(model.tensors)


def _strengths(recipe: Node) -> dict[object, float]:
    """By what each adapter of a weighted sum is multiplied; `RecipeError` where it is none."""
    shares: dict[int, float] = {id(recipe): 1.0}
    found: dict[object, float] = {}
    for node in reversed(topological(recipe)):
        share = shares.get(id(node), 0.0)
        if isinstance(node, Model):
            found[_identity(node)] = found.get(_identity(node), 0.0) + share
        elif isinstance(node, Call):
            for child, factor in _linear(node):
                shares[id(child)] = shares.get(id(child), 0.0) + share * factor
    return found


def _linear(call: Call) -> list[tuple[Node, float]]:
    """The operands of a step, each with its factor, where it is a sum with plain numbers."""
    numbers = {name: node.value for name, node in call.kwargs if isinstance(node, Value)}
    operands = [node for node in call.children if not isinstance(node, Value)]
    plain = [node.value for node in call.args if isinstance(node, Value)]
    alpha = numbers.get("alpha", plain[0] if plain else None)
    if call.method == "add" and len(operands) == 2:
        return [(operands[0], 1.0), (operands[1], 1.0)]
    if call.method == "subtract" and len(operands) == 2:
        return [(operands[0], 1.0), (operands[1], -1.0)]
    if call.method == "scale" and isinstance(alpha, (int, float)):
        return [(operands[0], float(alpha))]
    if call.method == "weighted_sum" and isinstance(alpha, (int, float, type(None))) and len(operands) == 2:
        share = 0.5 if alpha is None else float(alpha)
        return [(operands[0], 1.0 - share), (operands[1], share)]
    if call.method == "n_average" and not numbers:
        return [(node, 1.0 / len(operands)) for node in operands]
    raise RecipeError(
        f"{call.method} of adapters is no weighted sum with plain numbers, whose factors could be joined",
        hint="to_lora(..., rank=32) of it is computed from the differences as a whole",
        span=call.span,
    )


def _carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a trainer wrote that is still true."""
    return {
        name: text for name, text in metadata.items() if name.startswith(("modelspec.architecture", "ss_base_model"))
    }
