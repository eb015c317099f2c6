"""Recipes from wherever people keep them: nodes, text files, and the files that earlier merges made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from remelt.api.options import PathLike
from remelt.errors import RecipeError, UsageError
from remelt.formats.checkpoint import open_checkpoint
from remelt.recipe.compose import compose as compose_nodes
from remelt.recipe.node import Model, Node, Operand
from remelt.text.reader import read_recipe
from remelt.text.writer import write_recipe

RECIPE_KEY = "remelt_recipe"
RECIPE_SUFFIXES = (".mecha", ".remelt", ".txt")
_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class Source:
    """A recipe with the folder where its models' names are looked up first, and a name for its result."""

    recipe: Node
    folder: Path
    name: str


def load_recipe(recipe: Node | PathLike) -> Source:
    """The recipe that a node, a recipe file, or a merged checkpoint holds.

    Raises `UsageError` where there is no such file, `RecipeError` where it holds no recipe.
    """
    if isinstance(recipe, Node):
        return Source(recipe, Path.cwd(), "merge")
    path = Path(recipe)
    if not path.exists():
        close = sorted(found.name for found in path.parent.glob("*.mecha")) if path.parent.is_dir() else []
        hint = f"recipes there: {', '.join(close[:8])}" if close else "give the path of a recipe file"
        raise UsageError(f"there is no recipe {os.fspath(recipe)!r}", hint=hint)
    if path.is_dir() or path.suffix not in RECIPE_SUFFIXES:
        return Source(_embedded(path), path.resolve().parent, path.stem)
    if path.stat().st_size > _LARGEST:
        raise RecipeError(f"{path.name} is larger than 64 MiB, which no recipe is")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path.name} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    return Source(read_recipe(text, path.name), path.resolve().parent, path.stem)


def _embedded(path: Path) -> Node:
    with open_checkpoint(path) as checkpoint:
        text = checkpoint.metadata.get(RECIPE_KEY)
    if text is None:
        raise RecipeError(
            f"{path.name} carries no recipe: its metadata has no {RECIPE_KEY}",
            hint="merge a recipe file, or name models and a method: remelt merge A B -m weighted_sum",
        )
    return read_recipe(text, path.name)


def serialize(recipe: Node) -> str:
    """The recipe as text, version 1: stable, so that reading and writing it again gives the same text.

    Raises `RecipeError` for tensors in memory, which no text holds.
    """
    return write_recipe(recipe)


def deserialize(text: str, *, source: str = "recipe") -> Node:
    """The recipe that a text says. Raises `RecipeSyntaxError` with line and column."""
    return read_recipe(text, source)


def compose(recipe: Node | PathLike, arguments: dict[str, Operand] | None = None, /, **named: Operand) -> Node:
    """A recipe with its parameters filled by models or recipes; a path that is a recipe file is read.

    Parameters that are not named stay open; those of an argument are renamed into its scope (``a.b``).
    """
    filled: dict[str, Operand] = {}
    for name, argument in {**(arguments or {}), **named}.items():
        filled[name] = _argument(argument)
    return compose_nodes(load_recipe(recipe).recipe, filled)


def _argument(argument: Operand) -> Operand:
    if isinstance(argument, (str, os.PathLike)) and Path(argument).suffix in RECIPE_SUFFIXES:
        return load_recipe(argument).recipe
    if isinstance(argument, (str, os.PathLike)):
        return Model(str(argument))
    return argument
