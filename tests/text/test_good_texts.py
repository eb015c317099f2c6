"""Texts that are recipes, each with its canonical rendering beside it.

After the rendering was changed on purpose, ``REMELT_GOLDEN=write`` writes it anew: read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remelt.text.reader import parse_document, read_recipe
from remelt.text.writer import write_document, write_recipe

GOOD = sorted((Path(__file__).parent / "good").glob("*.mecha"))


@pytest.mark.parametrize("path", GOOD, ids=[path.stem for path in GOOD])
def test_a_good_text_is_rendered_in_the_canonical_way(path: Path) -> None:
    recipe = read_recipe(path.read_bytes().decode("utf-8"), path.name)
    rendered = write_recipe(recipe)
    golden = path.with_suffix(".out")
    if os.environ.get("REMELT_GOLDEN") == "write":
        golden.write_text(rendered, encoding="utf-8", newline="\n")
    assert rendered == golden.read_text(encoding="utf-8")
    again = read_recipe(rendered)
    assert again.digest() == recipe.digest()
    assert write_recipe(again) == rendered


@pytest.mark.parametrize("path", GOOD, ids=[path.stem for path in GOOD])
def test_a_good_text_keeps_its_meaning_with_its_names_and_comments(path: Path) -> None:
    document = parse_document(path.read_bytes().decode("utf-8"), path.name)
    text = write_document(document)
    assert parse_document(text).result.digest() == document.result.digest()
    assert write_document(parse_document(text)) == text


def test_every_rendering_belongs_to_a_text() -> None:
    assert len(GOOD) >= 12
    assert {path.stem for path in GOOD[0].parent.glob("*.out")} == {path.stem for path in GOOD}
