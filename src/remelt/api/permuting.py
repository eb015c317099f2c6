"""What a recipe says of the order of a model's axes, done one after the other, with the files that it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from remelt.alignment.files import SavedPermutations, load_permutations
from remelt.api.alignment import Alignment
from remelt.api.permuted_views import Saved, aligned_model, permuted_model
from remelt.check.inputs import Input
from remelt.errors import RecipeError
from remelt.recipe.axis_orders import AlignedTo, PermutedBy
from remelt.recipe.node import Model


class Permuting:
    """Permutes the models of one recipe; ``open_model`` opens those that others are aligned to, ``locate`` finds files.

    Each file and each alignment is there once, however often the recipe names it.
    """

    def __init__(self, open_model: Callable[[Model], Input], locate: Callable[[PermutedBy], Path]) -> None:
        self._open_model, self._locate = open_model, locate
        self._files: dict[Path, Saved] = {}
        self._references: dict[AlignedTo, tuple[Input, list[Alignment]]] = {}

    def model(self, given: Input) -> tuple[Input, list[Alignment]]:
        """A model with its axes in the order that the recipe says, and what finds that out where it must be found.

        Raises `CheckError` where it does not fit, `FormatError` for what is no permutation file.
        """
        found: list[Alignment] = []
        for use in given.model.permuted or ():
            if isinstance(use, PermutedBy):
                given = permuted_model(given, self._saved(use))
                continue
            reference, before = self._reference(use)
            given, alignment = aligned_model(given, reference, use)
            found += [*before, alignment]
        return given, found

    def adapter(self, given: Input) -> list[Saved]:
        """By what an adapter is permuted; `RecipeError` where it is to be aligned by itself."""
        found = []
        for use in given.model.permuted or ():
            if not isinstance(use, PermutedBy):
                raise RecipeError(
                    f"{given.label} is an adapter, and rebasin aligns models",
                    hint='it follows its model: permute(adapter, "found.safetensors")',
                    span=given.model.span,
                )
            found.append(self._saved(use))
        return found

    def _saved(self, use: PermutedBy) -> Saved:
        if use.held is not None:
            assert isinstance(use.held, SavedPermutations)
            found = Saved("what was found", use.held)
        else:
            path = self._locate(use)
            if path not in self._files:
                self._files[path] = Saved(path.name, load_permutations(path))
            found = self._files[path]
        return Saved(found.label, found.permutations.inverse()) if use.inverse else found

    def _reference(self, use: AlignedTo) -> tuple[Input, list[Alignment]]:
        if use not in self._references:
            opened = self._open_model(use.reference)
            if opened.adapter is not None:
                raise RecipeError(f"{opened.label} is an adapter, and rebasin aligns models", span=use.reference.span)
            self._references[use] = self.model(opened)
        return self._references[use]
