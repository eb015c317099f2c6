"""The recipe inside its result: names that travel, never a path of the machine that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from remelt.recipe.method import Method
from remelt.recipe.node import Call, Model, Node, Parameter, Value
from remelt.recipe.signature import name_models
from remelt.recipe.walk import rewrite
from remelt.text.writer import write_recipe


def portable_text(recipe: Node, methods: Mapping[str, Method[..., Any]], models_dirs: Sequence[Path]) -> str:
    """The recipe as text with every model by a relative name; tensors in memory become parameters."""
    taken: dict[int, str] = {}

    def travel(node: Node) -> Node:
        if isinstance(node, Call) and node.method in methods:
            named = name_models(methods[node.method], node)
            if named is node:
                return node
            fresh = zip(named.children, node.children, strict=True)
            return named.with_children(move(new) if new is not old else new for new, old in fresh)
        return move(node)

    def move(node: Node) -> Node:
        return _portable(node, models_dirs, taken) if isinstance(node, Model) else node

    root = recipe
    if isinstance(recipe, Value) and isinstance(recipe.value, str):
        root = Model(recipe.value)
    return write_recipe(rewrite(root, travel))


def _portable(model: Model, models_dirs: Sequence[Path], taken: dict[int, str]) -> Node:
    if model.tensors is not None:
        name = model.name if model.name.isidentifier() else "memory"
        used = set(taken.values())
        if id(model.tensors) not in taken:
            taken[id(model.tensors)] = name if name not in used else f"{name}_{len(used) + 1}"
        return Parameter(taken[id(model.tensors)], space=model.space, arch=model.arch)
    name = portable_name(model.name, models_dirs)
    return model if name == model.name else Model(name, model.sha256, model.space, model.arch)


def portable_name(name: str, models_dirs: Sequence[Path] = ()) -> str:
    """A model's name without the places of one machine: relative to a models folder, else its last part.

    >>> portable_name("/home/me/models/a.safetensors"), portable_name("../b"), portable_name("sdxl/c")
    ('a.safetensors', 'b', 'sdxl/c')
    """
    windows = PureWindowsPath(name)
    absolute = PurePosixPath(name).is_absolute() or bool(windows.drive) or windows.is_absolute()
    if absolute:
        for folder in models_dirs:
            try:
                return Path(name).resolve().relative_to(folder.resolve()).as_posix()
            except (ValueError, OSError):
                continue
    parts = windows.parts if "\\" in name or windows.drive else PurePosixPath(name).parts
    if absolute or ".." in parts or (parts and parts[0].startswith("~")):
        return parts[-1] if parts[-1] != ".." else "model"
    return name
