"""Recipes from wherever people keep them: nodes, text files, and the files that earlier merges made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from remelt.api.options import DECISIVE, PathLike
from remelt.errors import ModelNameError, OptionError, OutputError, RecipeError, UsageError
from remelt.formats.checkpoint import open_checkpoint
from remelt.formats.locate import SUFFIXES, locate_model
from remelt.recipe.compose import compose as compose_nodes
from remelt.recipe.node import Call, Model, Node, Operand, Value
from remelt.recipe.signature import name_models
from remelt.recipe.walk import rewritten
from remelt.text.document import Document
from remelt.text.eras import webui
from remelt.text.eras.writer import write_version_0_1
from remelt.text.reader import parse_document, read_recipe
from remelt.text.writer import write_document

RECIPE_KEY = "remelt_recipe"
JOINED_KEY = "remelt_joined"
"""Set where an adapter was joined of factors: its recipe makes the same difference, but of other factors."""
MECHA_KEY = "mecha_recipe"
"""Where sd-mecha keeps the recipe of a file that it made."""
OPTIONS_KEY = "remelt_options"
RECIPE_SUFFIXES = (".mecha", ".remelt", ".txt", ".yaml", ".yml")
FORMATS = ("1", "0.1.0")
"""The grammars that recipes are written in, by the version that their first line states."""
_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class Source:
    """A recipe with the folder where its models' names are looked up first, and a name for its result.

    ``options`` are those of the merge that made the file in which the recipe was found.
    """

    recipe: Node
    folder: Path
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def load_recipe(recipe: Node | PathLike) -> Source:
    """The recipe that a node, a recipe file, or a merged checkpoint holds.

    Raises `UsageError` where there is no such file, `RecipeError` where it holds no recipe.
    """
    if isinstance(recipe, Node):
        return Source(recipe, Path.cwd(), "merge")
    path = Path(recipe)
    if is_recipe_file(path):
        return Source(_read(path).result, path.resolve().parent, path.stem)
    document, options = _carried(path)
    return Source(document.result, path.resolve().parent, path.stem, options)


def load_document(recipe: PathLike) -> tuple[Document, Path]:
    """The recipe of a file as it was written, with its names and comments, and the folder of the file."""
    path = Path(recipe)
    if is_recipe_file(path):
        return _read(path), path.resolve().parent
    return _carried(path)[0], path.resolve().parent


def is_recipe_file(path: Path) -> bool:
    """Whether a path is a recipe's text, by its suffix, and no checkpoint; `UsageError` where there is neither."""
    if not path.exists():
        close = sorted(found.name for found in path.parent.glob("*.mecha")) if path.parent.is_dir() else []
        hint = f"recipes there: {', '.join(close[:8])}" if close else "give the path of a recipe file"
        raise UsageError(f"there is no recipe {os.fspath(path)!r}", hint=hint)
    return not path.is_dir() and names_recipe(path)


def names_recipe(path: PathLike) -> bool:
    """Whether a path ends as those of recipes do, in small letters or capitals."""
    return Path(path).suffix.lower() in RECIPE_SUFFIXES


def carries_recipe(path: PathLike) -> bool:
    """Whether a path is a checkpoint's, and that carries a recipe, of whatever tool made it."""
    if not os.path.exists(path):
        return False
    with open_checkpoint(Path(path)) as checkpoint:
        return not {RECIPE_KEY, MECHA_KEY, webui.RECIPE}.isdisjoint(checkpoint.metadata)


def _read(path: Path) -> Document:
    return parse_document(_text(path), path.name)


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST:
        raise RecipeError(f"{path.name} is larger than 64 MiB, which no recipe is")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path.name} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None


def _carried(path: Path) -> tuple[Document, dict[str, Any]]:
    """The recipe that a checkpoint carries, of whatever tool made it, and the options of our merge."""
    with open_checkpoint(path) as checkpoint:
        metadata = checkpoint.metadata
    if RECIPE_KEY not in metadata:
        if MECHA_KEY in metadata:
            return parse_document(metadata[MECHA_KEY], path.name), {}
        if webui.RECIPE in metadata:
            return Document(webui.recipe_of_web_ui(metadata, path.name)), {}
    text, options = _ours(metadata, path.name)
    return parse_document(text, path.name), options


def embedded(path: Path) -> tuple[str, dict[str, Any]]:
    """The recipe's text and the options of the merge that a checkpoint carries.

    Raises `RecipeError` where it carries none.
    """
    with open_checkpoint(path) as checkpoint:
        return _ours(checkpoint.metadata, path.name)


def _ours(metadata: Mapping[str, str], name: str) -> tuple[str, dict[str, Any]]:
    text = metadata.get(RECIPE_KEY)
    if text is None:
        raise RecipeError(
            f"{name} carries no recipe: its metadata has no {RECIPE_KEY}",
            hint="name models and a method: remelt merge A B -m weighted_sum; with --dtype or --vae, one is enough",
        )
    return text, _options(metadata.get(OPTIONS_KEY), name)


def _options(text: str | None, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(option in DECISIVE and _is_plain(found[option]) for option in found):
        raise RecipeError(f"{name}: the options in its metadata are not those of a merge")
    return found


def _is_plain(value: object) -> bool:
    """Whether a value is one that options have in metadata: a text, a choice, or texts by name."""
    values = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(one, str | bool) for one in values)


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


def serialize(recipe: Node, *, version: str = "1") -> str:
    """The recipe as text: stable, so that reading and writing it again gives the same text.

    ``version`` is that of the grammar: ``1``, or ``0.1.0``, which sd-mecha runs. Raises `RecipeError` for tensors in
    memory, which no text holds, and for what version 0.1.0 cannot say; `OptionError` for another version.
    """
    return write_document_as(Document(recipe), version)


def write_document_as(document: Document, version: str) -> str:
    """A recipe in a grammar by its version; names and comments stay where that has any."""
    if version not in FORMATS:
        raise OptionError(f"a recipe is written in version {' or '.join(FORMATS)}, but got {version!r}")
    return write_document(document) if version == "1" else write_version_0_1(document.result)


def canonical_text(path: Path) -> tuple[str, str]:
    """The text of a recipe file of version 1, and the same in the canonical layout, with its names and comments."""
    if not is_recipe_file(path):
        raise UsageError(f"{path.name} is no recipe file", hint=f"recipe files end in {', '.join(RECIPE_SUFFIXES)}")
    text = _text(path)
    document = parse_document(text, path.name)
    if document.grammar != "version 1":
        raise RecipeError(
            f"{path.name} is written in another grammar ({document.grammar})",
            hint=f"remelt recipe convert {path.name} -o NEW.mecha writes it in version 1",
        )
    return text, write_document(document)


def deserialize(text: str, *, source: str = "recipe") -> Node:
    """The recipe that a text says. Raises `RecipeSyntaxError` with line and column."""
    return read_recipe(text, source)


def compose(recipe: Node | PathLike, arguments: dict[str, Operand] | None = None, /, **named: Operand) -> Node:
    """A recipe with its parameters filled by models or recipes; a path that is a recipe file is read.

    Models beside a recipe file are named as from the current folder. Parameters that are not named stay open; those of
    an argument are renamed into its scope (``a.b``). A text or path becomes a model of the parameter's space.
    """
    source = load_recipe(recipe)
    here = replace(source, recipe=relocated(source, Path.cwd()), folder=Path.cwd())
    return compose_source(here, {**(arguments or {}), **named})


def compose_source(source: Source, arguments: Mapping[str, Operand]) -> Node:
    """The recipe of a source with its parameters filled; models beside an argument are named as from its folder."""
    filled = {name: _argument(argument, source.folder) for name, argument in arguments.items()}
    return compose_nodes(source.recipe, filled)


def _argument(argument: Operand, folder: Path) -> Operand:
    if isinstance(argument, (str, os.PathLike)) and names_recipe(argument):
        return relocated(load_recipe(argument), folder)
    return argument


def relocated(source: Source, folder: Path) -> Node:
    """The recipe of a source with each model beside it named as from another folder; other names stay."""
    return moved_document(Document(source.recipe), source.folder, folder).result


def moved_document(document: Document, beside: Path, folder: Path) -> Document:
    """The same of a recipe with its names of steps and comments."""
    if beside == folder:
        return document

    def move(node: Node) -> Node:
        if isinstance(node, Model) and node.tensors is None:
            name = _from_folder(node.name, beside, folder)
            return node if name == node.name else replace(node, name=name)
        if isinstance(node, Call):
            return _moved_texts(node, beside, folder)
        if isinstance(node, Value) and node is document.result and isinstance(node.value, str):
            return replace(node, value=_from_folder(node.value, beside, folder))
        return node

    return document.with_nodes(rewritten(document.result, move))


def _moved_texts(call: Call, beside: Path, folder: Path) -> Call:
    """The call with its bare texts that mean models beside the recipe named as from another folder."""
    moved = {
        index: replace(child, value=name)
        for index, child in enumerate(call.children)
        if isinstance(child, Value)
        and isinstance(child.value, str)
        and (name := _from_folder(child.value, beside, folder)) != child.value
    }
    if not moved:
        return call
    from remelt.methods import METHODS  # looked up where a file has the name of a text, as this loads torch

    if call.method in METHODS:
        try:
            meant = name_models(METHODS[call.method], call).children
        except RecipeError:  # told when the recipe is checked
            return call
        moved = {index: child for index, child in moved.items() if isinstance(meant[index], Model)}
    return call.with_children(moved.get(index, child) for index, child in enumerate(call.children))


def _from_folder(name: str, beside: Path, folder: Path) -> str:
    """A model's name as from another folder, where it is beside the recipe; else as it is."""
    if not name or "\0" in name or os.path.isabs(os.path.expanduser(name)):
        return name
    path = beside / name
    try:
        locate_model(str(path), [])
    except ModelNameError:
        if not any(os.path.isfile(f"{path}{suffix}") for suffix in SUFFIXES):  # else it may be any of several there
            return name
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return path.as_posix()
