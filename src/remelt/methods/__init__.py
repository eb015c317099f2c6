"""The merge methods, one function each, in files by family, whose first lines say what lives there.

`selection` (thresholds by rank), `gram` (products of operands), `turning` (orthogonal matrices) and `tall` (matrices
that are streamed by rows) are what several families compute with.
`METHODS` finds them by name, ours by folder and third parties' by the entry-point group ``remelt.methods`` or
``--plugin``. Importing this package does not import torch; looking a method up does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from remelt.core.registry import Registry
from remelt.recipe.method import Method


def methods_of(module: ModuleType) -> Mapping[str, Method[..., Any]]:
    """The merge methods that a module declares itself, by name; not those that it keeps under a private one."""
    return {
        value.name: value
        for variable, value in vars(module).items()
        if isinstance(value, Method) and value.function.__module__ == module.__name__ and not variable.startswith("_")
    }


METHODS: Registry[Method[..., Any]] = Registry(
    "merge method", package="remelt.methods", group="remelt.methods", collect=methods_of
)
"""Every merge method by name."""
