"""Recipes from wherever people keep them: nodes, text files, and the files that earlier merges made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from remelt.api.options import DECISIVE, PathLike
from remelt.errors import OutputError, RecipeError, UsageError
from remelt.formats.checkpoint import open_checkpoint
from remelt.recipe.compose import compose as compose_nodes
from remelt.recipe.node import Model, Node, Operand
from remelt.text.document import Document
from remelt.text.reader import parse_document, read_recipe
from remelt.text.writer import write_recipe

RECIPE_KEY = "remelt_recipe"
OPTIONS_KEY = "remelt_options"
RECIPE_SUFFIXES = (".mecha", ".remelt", ".txt")
_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class Source:
    """A recipe with the folder where its models' names are looked up first, and a name for its result.

    ``options`` are those of the merge that made the file in which the recipe was found.
    """

    recipe: Node
    folder: Path
    name: str
    options: Mapping[str, str] = field(default_factory=dict)


def load_recipe(recipe: Node | PathLike) -> Source:
    """The recipe that a node, a recipe file, or a merged checkpoint holds.

    Raises `UsageError` where there is no such file, `RecipeError` where it holds no recipe.
    """
    if isinstance(recipe, Node):
        return Source(recipe, Path.cwd(), "merge")
    path = Path(recipe)
    if is_recipe_file(path):
        return Source(_read(path).result, path.resolve().parent, path.stem)
    recipe_text, options = embedded(path)
    return Source(read_recipe(recipe_text, path.name), path.resolve().parent, path.stem, options)


def load_document(recipe: PathLike) -> tuple[Document, Path]:
    """The recipe of a file as it was written, with its names and comments, and the folder of the file."""
    path = Path(recipe)
    if is_recipe_file(path):
        return _read(path), path.resolve().parent
    return parse_document(embedded(path)[0], path.name), path.resolve().parent


def is_recipe_file(path: Path) -> bool:
    """Whether a path is a recipe's text, by its suffix, and no checkpoint; `UsageError` where there is neither."""
    if not path.exists():
        close = sorted(found.name for found in path.parent.glob("*.mecha")) if path.parent.is_dir() else []
        hint = f"recipes there: {', '.join(close[:8])}" if close else "give the path of a recipe file"
        raise UsageError(f"there is no recipe {os.fspath(path)!r}", hint=hint)
    return not path.is_dir() and path.suffix in RECIPE_SUFFIXES


def _read(path: Path) -> Document:
    if path.stat().st_size > _LARGEST:
        raise RecipeError(f"{path.name} is larger than 64 MiB, which no recipe is")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path.name} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    return parse_document(text, path.name)


def embedded(path: Path) -> tuple[str, dict[str, str]]:
    """The recipe's text and the options of the merge that a checkpoint carries.

    Raises `RecipeError` where it carries none.
    """
    with open_checkpoint(path) as checkpoint:
        text = checkpoint.metadata.get(RECIPE_KEY)
        options = checkpoint.metadata.get(OPTIONS_KEY)
    if text is None:
        raise RecipeError(
            f"{path.name} carries no recipe: its metadata has no {RECIPE_KEY}",
            hint="merge a recipe file, or name models and a method: remelt merge A B -m weighted_sum",
        )
    return text, _options(options, path.name)


def _options(text: str | None, name: str) -> dict[str, str]:
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(
        option in DECISIVE and isinstance(value, str) for option, value in found.items()
    ):
        raise RecipeError(f"{name}: the options in its metadata are not those of a merge")
    return found


def write_text(path: Path, text: str) -> None:
    """Write a recipe's text; what was there is replaced once the new text is complete."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


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
