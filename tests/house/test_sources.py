"""The sources keep the manners of the house: examples run, files stay short, floors say what they hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import remelt
from remelt.methods import METHODS

SOURCES = Path(remelt.__file__).parent
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(SOURCES)], "remelt."))
LONGEST_FILE = 420


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_the_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    tensor = {"torch": torch, "tensor": torch.tensor}
    failures, _ = doctest.testmod(module, extraglobs=tensor, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_examples_of_methods_run(name: str) -> None:
    method = METHODS[name]
    given = {"tensor": torch.tensor, name: method}
    (example,) = doctest.DocTestFinder(recurse=False).find(method.function, name, globs=given)
    assert example.examples
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0


def test_every_file_opens_with_a_sentence_and_stays_short() -> None:
    for path in SOURCES.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith('"""'), path
        assert len(text.splitlines()) <= LONGEST_FILE, path
