"""What the words of `merge` and `plan` mean: recipes, or models with a method."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from remelt.api.options import MergeOptions
from remelt.api.recipes import RECIPE_SUFFIXES, Source, compose, load_recipe
from remelt.cli.options import split_pairs
from remelt.errors import OptionError, UsageError
from remelt.recipe.node import Call, Node, Value
from remelt.text.reader import parse_value


def read_sources(words: Sequence[str], method: str | None, pairs: tuple[tuple[str, str], ...]) -> list[Source]:
    """The recipes that the command line names, or the one that its models, method and parameters make."""
    parameters = split_pairs(pairs, "-p")
    if method is not None:
        return [Source(_call(words, method, parameters), Path.cwd(), method)]
    words = [found for word in words for found in _expand(word)]
    if len(words) > 1 and not all(Path(word).suffix in RECIPE_SUFFIXES for word in words):
        raise UsageError(
            "several models need a method, or a recipe that names them",
            hint="remelt merge A B -m weighted_sum -p alpha 0.3; remelt info lists the methods",
        )
    sources = [load_recipe(word) for word in words]
    if parameters and len(sources) > 1:
        raise UsageError("-p fills the parameters of one recipe, but several are given")
    if parameters:
        filled: dict[str, Any] = dict(parameters)
        sources = [replace(sources[0], recipe=compose(sources[0].recipe, filled))]
    return sources


def _expand(word: str) -> list[str]:
    """A word as it is, or, where the shell left a pattern (as on Windows), the files that it matches."""
    if not any(character in word for character in "*?") or Path(word).exists():
        return [word]
    found = sorted(glob.glob(word))
    if not found:
        raise UsageError(f"no file matches {word!r}")
    return found


def _call(words: Sequence[str], method: str, parameters: dict[str, str]) -> Node:
    kwargs = tuple((name, _value(name, text)) for name, text in parameters.items())
    return Call(method, tuple(Value(word) for word in words), kwargs)


def _value(name: str, text: str) -> Value:
    try:
        return Value(parse_value(text))
    except UsageError:
        raise
    except Exception as error:
        raise OptionError(f"-p {name}: {text!r} is no value: {error}") from error


def name_outputs(sources: Sequence[Source], output: str | None, options: MergeOptions) -> list[Path]:
    """Where each result goes: as asked, by name in a folder for several, or by the recipe's name here."""
    if len(sources) == 1:
        if (
            output is not None
            and Path(output).is_dir()
            and options.max_shard_size is None
            and not _is_model(Path(output))
        ):
            return [Path(output) / f"{sources[0].name}.safetensors"]
        return [Path(output) if output is not None else Path(f"{sources[0].name}.safetensors")]
    if output is not None and Path(output).suffix == ".safetensors":
        raise UsageError(f"{len(sources)} recipes need a folder, but the output is a file", hint="-o merges/")
    folder = Path(output) if output is not None else Path()
    names = [source.name for source in sources]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UsageError(f"two recipes are named {doubled[0]!r}, so that one would replace the other")
    return [folder / f"{name}.safetensors" for name in names]


def _is_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or (folder / "config.json").exists()
