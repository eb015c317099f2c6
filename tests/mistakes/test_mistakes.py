"""A museum of mistakes: each recipe here is wrong in another way, and beside it stands what a person is told.

A recipe is read; if that succeeds, its calls are bound to their methods and its spaces inferred. ``remelt merge`` asks
in the same order and stops at the first of these that finds problems. After a message was reworded on purpose,
``REMELT_GOLDEN=write`` writes the told texts anew: read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remelt.check.bound import bind_recipes
from remelt.check.spaces import infer_masses
from remelt.errors import CheckError, RecipeError, RemeltError
from remelt.methods import METHODS
from remelt.text.reader import read_recipe

HERE = Path(__file__).parent
MISTAKES = sorted(HERE.glob("*.mecha"))


def merge(text: str, name: str) -> None:
    """What a merge does before it looks at files: `RemeltError` where it stops."""
    graph = bind_recipes([read_recipe(text, name)], METHODS)
    problems = graph.problems or infer_masses(graph)[1]
    if len(problems) == 1:
        (only,) = problems
        hint = None if only.hint is None else only.hint.removeprefix("hint: ")
        raise RecipeError(only.message, hint=hint, span=only.span)
    if problems:
        raise CheckError(problems, inputs=len(graph.models))


def told(path: Path) -> str:
    """What the command line says of a recipe."""
    with pytest.raises(RemeltError) as caught:
        merge(path.read_bytes().decode("utf-8"), path.name)
    error = caught.value
    assert error.exit_code == 3
    return f"{error}\n" if error.span else f"error: {error}\n"


@pytest.mark.parametrize("path", MISTAKES, ids=[path.stem for path in MISTAKES])
def test_a_mistake_is_told_in_words_that_help(path: Path) -> None:
    golden = path.with_suffix(".txt")
    found = told(path)
    if os.environ.get("REMELT_GOLDEN") == "write":
        golden.write_text(found, encoding="utf-8", newline="\n")
    assert found == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", MISTAKES, ids=[path.stem for path in MISTAKES])
def test_what_is_told_shows_the_place_and_a_remedy(path: Path) -> None:
    lines = told(path).splitlines()
    places = [index for index, line in enumerate(lines) if f"{path.name}:" in line]
    assert places
    for index in places:
        message, shown, carets = lines[index : index + 3]
        assert message.strip().startswith(f"{path.name}:")
        assert shown.strip() in path.read_text(encoding="utf-8") or "\ufffd" in shown
        assert set(carets.strip()) == {"^"}
    remedies = [line for line in lines if line.strip().startswith("hint: ")]
    assert len(remedies) == len(places)


def test_every_told_text_has_its_mistake_and_no_two_are_alike() -> None:
    assert len(MISTAKES) >= 100
    assert {path.stem for path in HERE.glob("*.txt")} == {path.stem for path in MISTAKES}
    assert len({path.read_bytes() for path in MISTAKES}) == len(MISTAKES)
