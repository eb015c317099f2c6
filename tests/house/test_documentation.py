"""Every example in the README and in the documentation runs: Python, command lines with what they print, recipes.

The blocks of a page run in order, in a folder with four small models of Stable Diffusion's keys. A ``mecha`` block
with a title is also written to that file. A ``console`` block's output may say ``...`` for what differs from run to
run; a command that prints an error must fail.
"""

from __future__ import annotations

import doctest
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from remelt.cli.main import run
from remelt.text.reader import read_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = ("ghostmix", "deliberate", "dreamshaper", "v1-5-pruned")
RUN_ELSEWHERE = ("python dev.py", "pip install", "git clone")
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DARES = re.compile(r"\b(error|refused|cannot)\b")


class Example(NamedTuple):
    language: str
    title: str
    text: str
    line: int


def examples(page: Path) -> Iterator[Example]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Example(found[1], found[2] or "", found[3], text[: found.start()].count("\n") + 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_sd1_models: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_sd1_models(folder, MODELS)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_the_examples_run(
    page: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(models, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("REMELT_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.delenv("REMELT_MODELS_DIR", raising=False)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    space: dict[str, Any] = {"__name__": "example"}
    for example in examples(page):
        place = f"{page.name}:{example.line}"
        if example.language == "python":
            if example.title:
                (folder / example.title).write_text(example.text, encoding="utf-8")
            else:
                exec(compile("\n" * example.line + example.text, str(page), "exec"), space)
        elif example.language == "mecha":
            read_recipe(example.text, place)
            if example.title:
                (folder / example.title).write_text(example.text, encoding="utf-8")
        elif example.language == "console":
            for command, wanted in commands(example.text):
                if command.startswith(RUN_ELSEWHERE):
                    continue
                check_command(command, wanted, place, capsys)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a block with the output that is written under it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def check_command(command: str, wanted: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(command)
    assert program == "remelt", f"{place}: {command}"
    capsys.readouterr()
    code = run(words)
    said = capsys.readouterr()
    printed = said.err + said.out
    failing = DARES.search(wanted.partition("\n")[0]) is not None
    assert (code != 0) is failing, f"{place}: {command} exits with {code}: {printed}"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    agrees = doctest.OutputChecker().check_output(f"{wanted.strip()}\n", f"{printed.strip()}\n", flags)
    assert agrees or not wanted, f"{place}: {command}\nwanted:\n{wanted}\ngot:\n{printed}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f" {page.name}\n" not in navigation] == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
