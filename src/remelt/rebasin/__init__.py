"""Alignment of models by permutations that leave their function as it is (git re-basin).

`permutation` is what is found and applied; `assignment` finds the best permutation of one group from inner products,
`matching` goes through the groups until none can be bettered; `files` keeps what was found.

The package bears the name of a word of recipes, and can be called as that.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remelt.recipe.node import Call, Operand


class _Word(ModuleType):
    """``remelt.rebasin`` is this package once any of it is imported, and ``remelt.rebasin(b, to=a)`` stays a recipe."""

    def __call__(self, model: Operand, **given: Any) -> Call:
        from remelt.recipe.permuting import rebasin

        return rebasin(model, **given)


sys.modules[__name__].__class__ = _Word
