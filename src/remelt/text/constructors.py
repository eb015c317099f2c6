"""The words that a recipe's text may call besides methods: what each takes, and what it makes."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.recipe.blocks import MAKERS, Search, is_curve, keys, search
from remelt.recipe.node import SPACES, Literal, Node, model, parameter

VALUE_WORDS = (*MAKERS, "search")
USAGE = {
    "model": 'model("name"), optionally with sha256="...", space="delta", arch="sdxl"',
    "parameter": 'parameter("a"), optionally with space="delta", arch="sdxl"',
    "search": "search(0, 1)",
    "blocks": 'blocks(IN00=0.2), blocks({"double_blocks.3": 0.2}) or blocks("0.1,0.2,...")',
    "components": "components(unet=0.2)",
    "classes": 'classes(mlp=0.2) or classes({"attn.to_q": 0.2})',
    "keys": 'keys({"*.attn2.*": 0.3})',
    "depth": "depth([0, 0.5, 1])",
}
CONSTRUCTORS = frozenset(USAGE)
_TEXTS = {"model": ("sha256", "space", "arch"), "parameter": ("space", "arch")}

Given = tuple[Any, ast.expr]


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """Names with weights in braces, and where each weight stands."""

    items: dict[str, Any]
    places: dict[str, Any]


class ArgumentError(RecipeError):
    """A word got an argument that it does not take; ``place`` is that argument."""

    def __init__(self, message: str, place: ast.expr | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.place = place


def construct(word: str, args: Sequence[Given], named: dict[str, Given]) -> Node | Literal:
    """What a call of one of `CONSTRUCTORS` makes; `RecipeError` where it does not take these arguments."""
    if word in _TEXTS:
        return _reference(word, args, named)
    if word == "search":
        return _search(args, named)
    if word == "depth":
        return _depth(args, named)
    return _weights(word, args, named)


def _reference(word: str, args: Sequence[Given], named: dict[str, Given]) -> Node:
    (name,) = _positional(word, args, 1)
    if not isinstance(name[0], str):
        raise ArgumentError(f"{word} needs a name in quotes", name[1], USAGE[word])
    options: dict[str, str] = {}
    for option, (value, place) in named.items():
        _known(word, option, place, _TEXTS[word])
        if value is None and option != "space":
            continue
        if not isinstance(value, str):
            raise ArgumentError(f"{word} needs a text for {option!r}", place, USAGE[word])
        if option == "space" and value not in SPACES:
            message = f"a {word}'s space is one of {', '.join(SPACES)}, but got {value!r}"
            raise ArgumentError(message, place, nearest_hint(value, SPACES))
        options[option] = value
    try:
        return (model if word == "model" else parameter)(name[0], **options)
    except RecipeError as error:
        raise ArgumentError(error.message, name[1], error.hint) from None


def _search(args: Sequence[Given], named: dict[str, Given]) -> Search:
    bounds = dict(zip(("low", "high"), args, strict=False))
    for option, given in named.items():
        _known("search", option, given[1], ("low", "high"))
        if option in bounds:
            raise ArgumentError(f"search is given {option!r} twice", given[1], USAGE["search"])
        bounds[option] = given
    if len(args) > 2 or len(bounds) < 2:
        raise ArgumentError("search needs two numbers", None, USAGE["search"])
    for value, place in bounds.values():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentError("search needs two numbers", place, USAGE["search"])
    return search(bounds["low"][0], bounds["high"][0])


def _depth(args: Sequence[Given], named: dict[str, Given]) -> Literal:
    given = dict(zip(("values", "stack"), args, strict=False))
    for option, argument in named.items():
        _known("depth", option, argument[1], ("values", "stack"))
        if option in given:
            raise ArgumentError(f"depth is given {option!r} twice", argument[1], USAGE["depth"])
        given[option] = argument
    if len(args) > 2 or "values" not in given:
        raise ArgumentError("depth needs a list of numbers", None, USAGE["depth"])
    values, place = given["values"]
    if not isinstance(values, tuple) or not all(_is_weight(value) for value in values):
        raise ArgumentError("depth needs a list of numbers", place, USAGE["depth"])
    stack, place = given.get("stack", (None, place))
    if stack is not None and not isinstance(stack, str):
        raise ArgumentError("depth needs a text for 'stack'", place, 'as in depth([0, 1], stack="double_blocks")')
    return MAKERS["depth"](values, stack)


def _weights(word: str, args: Sequence[Given], named: dict[str, Given]) -> Literal:
    places = {name: place for name, (_, place) in named.items()}
    weights = {name: value for name, (value, _) in named.items()}
    first: list[Any] = []
    if args or word == "keys":
        ((value, place),) = _positional(word, args, 1)
        if word == "keys":
            return _keys(value, place, named)
        if isinstance(value, Mapping):
            for name, weight in value.items.items():
                if name in weights:
                    raise ArgumentError(f"{name!r} is given twice", places[name], "keep one of them")
                weights[name], places[name] = weight, value.places[name]
            value = {name: weights.pop(name) for name in value.items}
            weights, first = {**value, **weights}, [value]
        elif isinstance(value, str) and word == "blocks":
            first = [value]
        else:
            raise ArgumentError(f"{word} needs names with numbers", place, USAGE[word])
    for name, weight in weights.items():
        if not _is_weight(weight):
            raise ArgumentError(f"{word} needs a number for {name!r}", places[name], USAGE[word])
    keyword = {name: weight for name, weight in weights.items() if name in named}
    return MAKERS[word](*first, **keyword)


def _keys(value: Any, place: ast.expr, named: dict[str, Given]) -> Literal:
    """Weights by the patterns of keys: numbers, searches, or weights along the depth."""
    for option, given in named.items():
        if option != "optional":
            raise ArgumentError("keys takes patterns in braces", given[1], USAGE["keys"])
    optional, at = named.get("optional", (False, place))
    if not isinstance(optional, bool):
        raise ArgumentError("keys needs True or False for 'optional'", at, USAGE["keys"])
    if not isinstance(value, Mapping):
        raise ArgumentError("keys needs names with numbers", place, USAGE["keys"])
    for name, weight in value.items.items():
        if not (_is_weight(weight) or is_curve(weight)):
            raise ArgumentError(f"keys needs a number for {name!r}", value.places[name], USAGE["keys"])
    return keys(value.items, optional=optional)


def _positional(word: str, args: Sequence[Given], count: int) -> Sequence[Given]:
    if len(args) != count:
        place = args[count][1] if len(args) > count else None
        raise ArgumentError(f"{word} takes {count} argument without a name, but got {len(args)}", place, USAGE[word])
    return args


def _known(word: str, option: str, place: ast.expr, options: Sequence[str]) -> None:
    if option not in options:
        near = nearest_hint(option, options)
        hint = f"{near} {USAGE[word]}" if near else USAGE[word]
        raise ArgumentError(f"{word} has no argument {option!r}", place, hint)


def _is_weight(value: object) -> bool:
    return isinstance(value, Search) or (isinstance(value, (int, float)) and not isinstance(value, bool))
