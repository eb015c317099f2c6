"""Locking a recipe to the contents of its models: from then on, other files of the same names are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from remelt.api.hashing import content_hash
from remelt.api.options import PathLike
from remelt.api.recipes import load_document
from remelt.formats.checkpoint import open_checkpoint
from remelt.formats.locate import locate_model, models_folders
from remelt.methods import METHODS
from remelt.recipe.node import Call, Model, Node, Value
from remelt.recipe.signature import name_models
from remelt.recipe.walk import rewritten
from remelt.text.document import Document
from remelt.text.writer import write_document


@dataclass(frozen=True)
class Locked:
    """A recipe's text with its locks, and the hash that each model got, by name."""

    text: str
    models: dict[str, str]


def lock_recipe(recipe: PathLike, *, models_dirs: Sequence[PathLike] = ()) -> Locked:
    """The recipe with the SHA-256 of every model's content in it; locks that it has are renewed.

    Names of steps and comments stay. Raises `ModelNameError` for a model that is not there.
    """
    document, folder = load_document(recipe)
    return lock_document(document, folder, models_dirs=models_dirs)


def lock_document(document: Document, folder: Path, *, models_dirs: Sequence[PathLike] = ()) -> Locked:
    """The same for a recipe that was read already, from a folder."""
    folders = models_folders([Path(one) for one in models_dirs])
    found: dict[str, str] = {}

    def lock(node: Node) -> Node:
        if isinstance(node, Call) and node.method in METHODS:
            named = name_models(METHODS[node.method], node)
            return named.with_children([lock_model(child) for child in named.children])
        return lock_model(node)

    def lock_model(node: Node) -> Node:
        if not isinstance(node, Model) or (node.sha256 is not None and node.name in found):
            return node
        if node.name not in found:
            with open_checkpoint(locate_model(node.name, [folder, *folders])) as checkpoint:
                found[node.name] = content_hash(checkpoint)
        return replace(node, sha256=found[node.name])

    root: Node = document.result
    if isinstance(root, Value) and isinstance(root.value, str):
        root = Model(root.value)
    new = rewritten(root, lock)
    return Locked(write_document(replace(document, result=root).with_nodes(new)), found)
