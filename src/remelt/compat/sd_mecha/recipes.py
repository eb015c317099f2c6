"""Models, parameters, weights by block, and recipes as text, in sd-mecha's words."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remelt.api import recipes as texts
from remelt.api.recipes import load_recipe, names_recipe, write_text
from remelt.compat.sd_mecha.block_numbers import NumbersByBlock, arch_of
from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.recipe import node as nodes
from remelt.recipe.blocks import KEYS, BlockWeights, Rule, literal_glob
from remelt.recipe.node import Call, Model, Node, Value
from remelt.recipe.walk import rewrite
from remelt.text.eras.blocks import BLOCK_CONFIGS
from remelt.text.eras.methods import CONFIGS
from remelt.text.eras.reader import ARCHS
from remelt.text.eras.weights import block_names, block_weights, components_of

PathLike = str | os.PathLike[str]
RecipeNodeOrValue = Node | PathLike | Mapping[str, Any] | float | BlockWeights
Hyper = float | dict[str, float] | BlockWeights | Node
_BY_BLOCK = "its numbers are by block: convert(literal, model) makes weights of them"
_RENAMED = "its keys have other names: convert the file to its usual layout first"
UNREAD = {
    "sd1-kohya": _RENAMED,
    "sdxl-kohya": _RENAMED,
    "sdxl-kohya_but_diffusers": _RENAMED,
    "sdxl-diffusers_unet_only": _RENAMED,
    "sd1-supermerger_blocks": _BY_BLOCK,
    "sdxl-supermerger_blocks": _BY_BLOCK,
    "singleton-mecha": "it is one number: write that",
    **{
        f"{base}_{kind}_lora": "it is an adapter's: lora(path) is the difference that it makes"
        for base in ("sd1-kohya", "sdxl-kohya", "sdxl-kohya_but_diffusers")
        for kind in ("kohya", "lycoris")
    },
}
"""The model configs of sd-mecha 1.1.8 that are no model's here, with what to do instead."""
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
    if isinstance(given, NumbersByBlock):
        return given.weights()
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
    if merge_space == "lora" or str(getattr(config, "identifier", config)).endswith("_lora"):
        return lora(state_dict)
    space = "weight" if merge_space is None else _space(merge_space)
    return nodes.model(state_dict, space=space, arch=_arch(config))


def lora(state_dict: PathLike | Mapping[str, Any], model_arch: object = None) -> Model:
    """An adapter, as the difference that it makes of the model that it is added to."""
    return nodes.model(state_dict, space="delta")


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
    if name in UNREAD:
        raise RecipeError(f"the model config {name!r} is not read", hint=UNREAD[name])
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
    return _numbers(value, config) if _is_numbers(value) else node(value) if isinstance(value, Mapping) else value


def convert(recipe: Any, *targets: object) -> Any:
    """What another model's config makes of a recipe: numbers by U-Net block become weights, models stay as they are.

    Raises `RecipeError` where keys would have other names: those conversions come later.
    """
    weights = _numbers(recipe, None) if _is_numbers(recipe) else recipe
    if isinstance(weights, NumbersByBlock):
        return weights.towards(arch_of(targets, _arch))
    if isinstance(weights, BlockWeights):
        return weights
    wanted = {_arch(one) for one in targets if isinstance(one, str) or hasattr(one, "identifier")}
    wanted |= {one.arch for one in targets if isinstance(one, Model)}
    found = node(recipe)
    has = found.arch if isinstance(found, Model) else None
    if has is not None and any(arch not in (None, has) for arch in wanted):
        raise RecipeError(f"{found!r} is {has}, and has other keys", hint="conversions between key layouts come later")
    return found


def _is_numbers(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(one, (int, float)) for one in value.values())


def _numbers(named: Mapping[str, float], config: object) -> NumbersByBlock | BlockWeights:
    """Numbers by block where the names are those of blocks, else by key."""
    name = None if config is None else str(getattr(config, "identifier", config))
    if (name is None or name.endswith("_blocks")) and not any("." in key for key in named):
        arch = next((arch for arch, told in BLOCK_CONFIGS.items() if told.config == name), None)
        return NumbersByBlock({key: float(number) for key, number in named.items()}, arch)
    escaped = {literal_glob(key): float(number) for key, number in named.items()}
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
    if isinstance(recipe, os.PathLike) or ("\n" not in recipe and names_recipe(recipe)):
        return load_recipe(recipe).recipe
    return texts.deserialize(recipe)


def deserialize_path(recipe: PathLike, models_dir: PathLike | None = None) -> Node:
    """The recipe of a file, or the model of one."""
    if names_recipe(recipe):
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
