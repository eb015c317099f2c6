"""Models, parameters, weights by block, and recipes as text, in sd-mecha's words."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remelt.api import recipes as texts
from remelt.api.recipes import RECIPE_SUFFIXES, load_recipe, write_text
from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.recipe import node as nodes
from remelt.recipe.blocks import KEYS, BlockWeights, Rule, literal_glob
from remelt.recipe.blocks import blocks as named_blocks
from remelt.recipe.node import Call, Model, Node, Value
from remelt.recipe.walk import rewrite
from remelt.text.eras.methods import ADAPTERS, CONFIGS
from remelt.text.eras.reader import ARCHS
from remelt.text.eras.weights import block_names, block_weights, components_of

PathLike = str | os.PathLike[str]
RecipeNodeOrValue = Node | PathLike | Mapping[str, Any] | float | BlockWeights
Hyper = float | dict[str, float] | BlockWeights | Node
_SPACES = {"base": "weight", "weight": "weight", "delta": "delta", "param": "param"}


class MergeSpace(enum.Flag):
    """What a model's numbers are, in the words of sd-mecha 0: weights, or differences of weights."""

    BASE = enum.auto()
    DELTA = enum.auto()


def node(given: object) -> Node:
    """A recipe for what a person writes: a text is a model, a dictionary of tensors one in memory."""
    if isinstance(given, Mapping):
        return nodes.model(given)
    if isinstance(given, (Node, str, os.PathLike)):
        return given if isinstance(given, Node) else nodes.model(given)
    return Value(plain(given))


def plain(given: object) -> Any:
    """An argument that is no model: weights by the block names of sd-mecha 0 become today's."""
    if isinstance(given, Mapping):
        if all(isinstance(name, str) and isinstance(weight, (int, float)) for name, weight in given.items()):
            return block_weights(given)
        return node(given)
    return given


def model(
    state_dict: PathLike | Mapping[str, Any], config: object = None, merge_space: object = None, **named: Any
) -> Model:
    """A checkpoint, by path or by name, or as tensors.

    ``config`` is a model config of sd-mecha 1 or an arch of sd-mecha 0; ``merge_space`` a space, or a model type.
    """
    config = named.pop("model_arch", named.pop("model_config", config))
    merge_space = named.pop("model_type", merge_space)
    if named:
        raise RecipeError(f"model has no argument {next(iter(named))!r}")
    if merge_space == "lora":
        return lora(state_dict)
    space = "weight" if merge_space is None else _space(merge_space)
    return nodes.model(state_dict, space=space, arch=_arch(config))


def lora(state_dict: object, model_arch: object = None) -> Model:
    """Adapters, which are refused until they are merged."""
    raise RecipeError(f"{state_dict!r} is an adapter", hint=ADAPTERS)


def parameter(name: str, merge_space: object = "weight", model_arch: object = None) -> Node:
    """A hole for a model or a recipe."""
    return nodes.parameter(name, space=_space(merge_space), arch=_arch(model_arch))


def _space(given: object) -> str:
    if isinstance(given, MergeSpace):
        return "delta" if given is MergeSpace.DELTA else "weight"
    name = str(getattr(given, "identifier", given)).lower()
    if name not in _SPACES:
        raise RecipeError(f"{given!r} is no merge space", hint=nearest_hint(name, _SPACES) or ", ".join(_SPACES))
    return _SPACES[name]


def _arch(given: object) -> str | None:
    if given is None:
        return None
    name = str(getattr(given, "identifier", given))
    if name in ARCHS or name in CONFIGS:
        return ARCHS.get(name) or CONFIGS[name]
    if name.endswith("_lora"):
        raise RecipeError(f"the model config {name!r} is an adapter's", hint=ADAPTERS)
    raise RecipeError(
        f"no model config is named {name!r}",
        hint=nearest_hint(name, [*CONFIGS, *ARCHS]) or "leave it away: the architecture is inferred",
    )


def default(
    model_arch: object, model_components: str | Sequence[str] | None = None, value: float = 0
) -> dict[str, float]:
    """The weight of what no block speaks for, by component; all components without a name."""
    arch = str(getattr(model_arch, "identifier", model_arch))
    known = components_of(arch)
    chosen = [model_components] if isinstance(model_components, str) else list(model_components or known)
    for name in chosen:
        block_names(arch, name)  # refuses one that is none
    return {f"{arch}_{name}_default": value for name in chosen}


def blocks(
    model_arch: object, model_component: str, *values: float, strict: bool = True, **named: float
) -> dict[str, float]:
    """Weights by block: all of them in order, or some by name. Dictionaries of them combine with ``|``."""
    arch = str(getattr(model_arch, "identifier", model_arch))
    names = block_names(arch, model_component)
    if values and named:
        raise RecipeError("blocks takes numbers in order, or by name, not both")
    if values and strict and len(values) != len(names):
        raise RecipeError(
            f"blocks got {len(values)} numbers, but the {model_component} of {arch} has {len(names)} blocks",
            hint="give some of them by name, as in in0=1, or pass strict=False",
        )
    for name in named:
        if name not in names:
            raise RecipeError(
                f"{name!r} is no block of the {model_component} of {arch}", hint=nearest_hint(name, names)
            )
    chosen = named or dict(zip(names, values, strict=False))
    return {f"{arch}_{model_component}_block_{name}": weight for name, weight in chosen.items()}


def literal(value: Any, config: object = None, merge_space: object = None) -> Any:
    """A value as a recipe takes it: numbers by block or key, tensors in memory, or itself."""
    if isinstance(value, Mapping) and value and all(isinstance(one, (int, float)) for one in value.values()):
        return _weights(value, config)
    return node(value) if isinstance(value, Mapping) else value


def convert(recipe: Any, *targets: object) -> Any:
    """What another model's config makes of a recipe: numbers by U-Net block become weights, models stay as they are.

    Raises `RecipeError` where keys would have other names: those conversions come later.
    """
    if isinstance(recipe, Mapping) and recipe and all(isinstance(one, (int, float)) for one in recipe.values()):
        return _weights(recipe, None)
    wanted = {_arch(one) for one in targets if isinstance(one, str) or hasattr(one, "identifier")}
    wanted |= {one.arch for one in targets if isinstance(one, Model)}
    found = node(recipe)
    has = found.arch if isinstance(found, Model) else None
    if has is not None and any(arch not in (None, has) for arch in wanted):
        raise RecipeError(f"{found!r} is {has}, and has other keys", hint="conversions between key layouts come later")
    return found


def _weights(named: Mapping[str, float], config: object) -> BlockWeights:
    """Numbers by block where the names are those of blocks, else by key."""
    is_blocks = config is None or str(getattr(config, "identifier", config)).endswith("_blocks")
    if is_blocks and not any("." in name for name in named):
        return named_blocks(dict(named))
    escaped = {literal_glob(name): float(w) for name, w in named.items()}
    return BlockWeights((Rule(KEYS, named=tuple(escaped.items())),))


def serialize(recipe: Any, *, finalize: bool = True, output: PathLike | None = None) -> str:
    """The recipe as text, version 1; `remelt.serialize` writes version 0.1.0, too."""
    text = texts.serialize(finished(node(recipe), clamped=False))
    if output is not None:
        write_text(Path(output).absolute(), text)
    return text


def serialize_and_save(recipe: Any, output_path: PathLike) -> None:
    """Write a recipe to a file, whose suffix may be missing."""
    path = Path(output_path)
    path = path if path.suffix else path.with_suffix(".mecha")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.absolute(), texts.serialize(finished(node(recipe), clamped=True)))


def deserialize(recipe: str | list[str] | os.PathLike[str]) -> Node:
    """The recipe that a text says, in any grammar, whole or by lines; or that a file holds."""
    if isinstance(recipe, list):
        return texts.deserialize("\n".join(line.rstrip("\r\n") for line in recipe))
    if isinstance(recipe, os.PathLike) or ("\n" not in recipe and Path(recipe).suffix in RECIPE_SUFFIXES):
        return load_recipe(recipe).recipe
    return texts.deserialize(recipe)


def deserialize_path(recipe: PathLike, models_dir: PathLike | None = None) -> Node:
    """The recipe of a file, or the model of one."""
    if Path(recipe).suffix in RECIPE_SUFFIXES:
        return load_recipe(recipe).recipe
    return nodes.model(recipe if models_dir is None else Path(models_dir, recipe))


def finished(recipe: Node, *, clamped: bool) -> Node:
    """The recipe with what an era left open: whether ``add_difference`` of three models stays between the first two."""

    def settle(one: Node) -> Node:
        if not isinstance(one, Call) or one.method != "add_difference" or len(one.args) != 3:
            return one
        a, b, c = one.args
        result = Call("add_difference", (a, Call("subtract", (b, c))), one.kwargs)
        return Call("clamp", (result, a, b)) if clamped else Call("fallback", (result, a))

    return rewrite(recipe, settle)
