"""What the words of `merge` and `plan` mean: recipes, or models with a method."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from remelt.api.options import MergeOptions
from remelt.api.outputs import GGUF
from remelt.api.recipes import Source, carries_recipe, compose_source, load_recipe, names_recipe
from remelt.cli.options import split_pairs
from remelt.core.nearest import nearest_hint
from remelt.errors import OptionError, RecipeError, UsageError
from remelt.recipe.adapter import adapter
from remelt.recipe.node import Call, Node, Value, as_node
from remelt.recipe.surgery import with_component
from remelt.text.reader import parse_value

_OF_MODELS = ("config.json", "model_index.json", "remelt.journal")
"""What only a model's own folder holds; the last one's publication was interrupted, and had removed the others."""


def read_sources(
    words: Sequence[str],
    method: str | None,
    pairs: tuple[tuple[str, str], ...],
    *,
    changed: bool = False,
    stored: bool = False,
) -> list[Source]:
    """The recipes that the command line names, or the one that its models, method and parameters make.

    Where it is to be ``changed``, a model alone is a recipe, too; and where it is to be ``stored`` otherwise, one that
    carries none.
    """
    parameters = split_pairs(pairs, "-p")
    if method is not None:
        return [Source(_call(words, method, parameters), Path.cwd(), method)]
    words = [found for word in words for found in _expand(word)]
    alone = len(words) == 1 and not names_recipe(words[0])
    if alone and (changed or (stored and not carries_recipe(words[0]))):
        return [Source(as_node(words[0]), Path.cwd(), Path(words[0]).stem)]
    if len(words) > 1 and not all(names_recipe(word) for word in words):
        raise UsageError(
            "several models need a method, or a recipe that names them",
            hint="remelt merge A B -m weighted_sum -p alpha 0.3; remelt info lists the methods",
        )
    sources = [load_recipe(Path(word) if Path(word).name not in ("", "..") else Path(word).resolve()) for word in words]
    if parameters and len(sources) > 1:
        raise UsageError("-p fills the parameters of one recipe, but several are given")
    if parameters:
        filled: dict[str, Any] = dict(parameters)
        sources = [replace(sources[0], recipe=compose_source(sources[0], filled))]
    return sources


def changes(given: Mapping[str, Any]) -> bool:
    """Whether the options change what the recipes give, so that one of them may be a model as it is."""
    return any(given[name] for name in ("adapters", "vae", "components", "dropped"))


def stores(given: Mapping[str, Any], output: str | None) -> bool:
    """Whether the options say how a result is stored, so that a model as it is may become another file."""
    is_gguf = output is not None and Path(output).suffix == GGUF
    return is_gguf or any(given[name] for name in ("dtype", "scaled", "keep_quantisation", "max_shard_size"))


def operated(sources: Sequence[Source], given: Mapping[str, Any]) -> list[Source]:
    """The recipes with components of other models, and without those that are not wanted, as the options say."""
    donors = split_pairs(given["components"], "--component")
    if given["vae"] is not None:
        donors = {"vae": given["vae"], **donors}
    found = []
    for source in sources:
        recipe = source.recipe
        for file, text in given["adapters"]:
            recipe = recipe + adapter(file) * Value(_strength(file, text))
        for component, donor in donors.items():
            recipe = with_component(recipe, donor, component)
        for component in given["dropped"]:
            recipe = Call("omit_component", (recipe,), (("component", Value(component)),))
        found.append(replace(source, recipe=recipe))
    return found


def _strength(file: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        hint = f"--adapter {file} 0.8"
        raise UsageError(f"the strength of an adapter is a number, but got {text!r}", hint=hint)
    return found


def _expand(word: str) -> list[str]:
    """A word as it is, or, where the shell left a pattern (as on Windows), the files that it matches."""
    if not any(character in word for character in "*?") or Path(word).exists():
        return [word]
    found = sorted(glob.glob(word))
    if not found:
        raise UsageError(f"no file matches {word!r}")
    return found


def _call(words: Sequence[str], method: str, parameters: dict[str, str]) -> Node:
    from remelt.methods import METHODS

    if method not in METHODS:
        hint = nearest_hint(method, METHODS) or "remelt info lists the merge methods"
        raise RecipeError(f"no merge method is named {method!r}", hint=hint)
    kwargs = tuple((name, _value(name, text)) for name, text in parameters.items())
    return Call(method, tuple(Value(word) for word in words), kwargs)


def _value(name: str, text: str) -> Node:
    try:
        value = parse_value(text)
        return value if isinstance(value, Node) else Value(value)
    except UsageError:
        raise
    except Exception as error:
        raise OptionError(f"-p {name}: {text!r} is no value: {error}") from error


def name_outputs(sources: Sequence[Source], output: str | None, options: MergeOptions) -> list[str]:
    """Where each result goes: as asked, by the recipe's name in a folder, or by its name here.

    A path that ends in a slash is a folder for results, and so is one for several recipes, and a folder that is there
    and is no model itself. A result is a folder itself where the options ask for one, or its first model is one.
    """
    from remelt.api.merging import gives_folder

    sharded = options.makes_folder
    if output is None:
        folder = Path()
    elif len(sources) == 1 and not _is_folder_for_results(output, sharded):
        return [output]
    elif len(sources) > 1 and Path(output).suffix == ".safetensors" and not Path(output).is_dir():
        raise UsageError(f"{len(sources)} recipes need a folder, but the output is a file", hint="-o merges/")
    else:
        folder = Path(output)
    names = [source.name for source in sources]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UsageError(f"two recipes are named {doubled[0]!r}, so that one would replace the other")
    return [
        str(folder / (source.name if gives_folder(source, options) else f"{source.name}.safetensors"))
        for source in sources
    ]


def _is_folder_for_results(output: str, sharded: bool) -> bool:
    if sharded:
        return False
    if output.endswith(("/", os.sep)):
        return True
    folder = Path(output)
    return folder.is_dir() and not (
        any((folder / name).exists() for name in _OF_MODELS) or any(folder.glob("*.index.json"))
    )
