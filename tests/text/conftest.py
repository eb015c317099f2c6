"""What tests of texts share: recipes in files, each beside what is told of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from remelt.api.recipes import load_recipe
from remelt.errors import RecipeSyntaxError
from remelt.text.writer import write_recipe


@pytest.fixture
def read_as_told() -> Callable[[Path], str]:
    """``read_as_told(path)`` holds a recipe's text, or its error, against the file ``.out`` beside it, and gives it.

    ``REMELT_GOLDEN=write`` writes those files anew.
    """

    def read(path: Path) -> str:
        is_bad = path.stem.startswith("bad_")
        try:
            found = write_recipe(load_recipe(path).recipe)
        except RecipeSyntaxError as error:
            found = f"{error}\n"
        golden = path.with_suffix(".out")
        if os.environ.get("REMELT_GOLDEN") == "write":
            golden.write_text(found, encoding="utf-8", newline="\n")
        assert found == golden.read_text(encoding="utf-8")
        assert found.startswith(f"{path.name}:" if is_bad else "version 1\n")
        return found

    return read
