"""Options that several commands share, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from remelt.api.options import MergeOptions, over_carried
from remelt.api.recipes import Source
from remelt.errors import OptionError

F = TypeVar("F", bound=Callable[..., Any])

_COMMON = [
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option("--debug", is_flag=True, help="Show tracebacks."),
]
_MODELS_DIR = [
    click.option(
        "--models-dir",
        "models_dirs",
        multiple=True,
        metavar="FOLDER",
        type=click.Path(path_type=Path),
        help="A folder of models, repeatable; also REMELT_MODELS_DIR and the config file.",
    ),
]
_PLUGIN = [
    click.option(
        "--plugin",
        "plugins",
        multiple=True,
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="A Python file with merge methods of yours, repeatable. It is run.",
    ),
]
_TOLD = [
    click.option("--title", metavar="TEXT", help="What user interfaces call the result."),
    click.option(
        "--modelspec",
        nargs=2,
        multiple=True,
        metavar="NAME TEXT",
        help="Another entry of the ModelSpec metadata, such as author or description; repeatable.",
    ),
]
_MERGING = [
    click.argument("sources", nargs=-1, required=True, metavar="RECIPE... | MODEL MODEL..."),
    click.option(
        "-o", "--output", metavar="PATH", help="The file to write, or a folder for several recipes or shards."
    ),
    click.option("-m", "--method", metavar="NAME", help="Merge the models given by this method, without a recipe."),
    click.option(
        "-p",
        "--parameter",
        "parameters",
        nargs=2,
        multiple=True,
        metavar="NAME VALUE",
        help="An argument of the method, or a parameter of the recipe; repeatable.",
    ),
    click.option(
        "--compute-dtype", default="float32", show_default=True, metavar="TYPE", help="What arithmetic is done in."
    ),
    click.option("--dtype", metavar="TYPE", help="Element type of the output; by default each tensor keeps its own."),
    click.option(
        "--scaled", is_flag=True, help="With --dtype fp8_e4m3fn: linear layers with scales, all else in its own type."
    ),
    click.option(
        "--keep-quantisation", is_flag=True, help="Store tensors that the first model has quantised in its way again."
    ),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 or mps."),
    click.option("--threads", type=click.IntRange(min=1), help="By default one a core, at most 8."),
    click.option(
        "--memory", metavar="SIZE", help="Memory budget, as in 4GiB; by default a quarter of what is available."
    ),
    click.option("--max-shard-size", metavar="SIZE", help="Write a folder of shards of at most this size."),
    click.option(
        "--missing",
        type=click.Choice(["error", "first", "skip"]),
        default="error",
        show_default=True,
        help="Keys that one input lacks.",
    ),
    click.option(
        "--nonfinite",
        type=click.Choice(["error", "keep", "missing"]),
        default="error",
        show_default=True,
        help="NaN and infinities in the inputs.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete."),
    click.option("--restart", is_flag=True, help="Begin anew, where an interrupted merge could be continued."),
    click.option("--hash", "hashes", is_flag=True, help="Tell the SHA-256 of each result."),
    click.option("--vae", metavar="MODEL", help="Take the VAE of this model, or of this file of a VAE alone."),
    click.option(
        "--component",
        "components",
        nargs=2,
        multiple=True,
        metavar="NAME MODEL",
        help="Take a component of another model, such as a text encoder; repeatable.",
    ),
    click.option(
        "--drop", "dropped", multiple=True, metavar="NAME", help="Leave out a component, such as ema; repeatable."
    ),
    click.option(
        "--adapter",
        "adapters",
        nargs=2,
        multiple=True,
        metavar="FILE STRENGTH",
        help="Add a LoRA or another adapter, multiplied by a number; repeatable.",
    ),
    click.option("--ignore-unused", is_flag=True, help="Leave out modules of adapters that the model lacks."),
    click.option("--dialect", metavar="NAME", help="Layout of the result's keys, such as diffusers or original."),
    *_TOLD,
    click.option("--modelspec-hash", "hashed", is_flag=True, help="Write the SHA-256 of the tensors into the header."),
    click.option("--like", metavar="FOLDER", help="Take configurations and tokenizers from this model's folder."),
    click.option("--fallback", metavar="MODEL", help="A model that gives what the result lacks."),
]


def common(command: F) -> F:
    """`--json` and `--debug`."""
    return _apply(_COMMON, command)


def models(command: F) -> F:
    """Where models and plugins are found."""
    return _apply([*_MODELS_DIR, *_PLUGIN], command)


def plugins(command: F) -> F:
    """Methods of one's own, for commands that open no model."""
    return _apply(_PLUGIN, command)


def models_only(command: F) -> F:
    """Where models are found, for commands that apply no merge method."""
    return _apply(_MODELS_DIR, command)


def merging(command: F) -> F:
    """Everything that says what to merge and how."""
    return _apply(_MERGING, command)


def told(command: F) -> F:
    """What user interfaces are told of a result."""
    return _apply(_TOLD, command)


def _apply(options: list[Any], command: F) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def merge_options(given: dict[str, Any], sources: Sequence[Source]) -> MergeOptions:
    """The options of a merge: those of the command line, then those that the recipes' files were made with."""
    carried = [source.options for source in sources]
    if any(options != carried[0] for options in carried):
        raise OptionError(
            "the results that are merged again were made with different options", hint="merge them one by one"
        )
    context = click.get_current_context()
    names = (
        "models_dirs",
        "compute_dtype",
        "dtype",
        "scaled",
        "keep_quantisation",
        "device",
        "threads",
        "memory",
        "max_shard_size",
        "hashed",
        "ignore_unused",
        "missing",
        "nonfinite",
        "overwrite",
        "restart",
        "dialect",
        "like",
        "title",
        "modelspec",
        "fallback",
    )
    if given["modelspec"]:
        given = {**given, "modelspec": split_pairs(given["modelspec"], "--modelspec")}
    chosen = {name: given[name] for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    return over_carried(dict(*carried[:1]), chosen)


def load_plugins(paths: tuple[Path, ...]) -> None:
    """Register the merge methods of plugin files."""
    if paths:
        from remelt.methods import METHODS

        for path in paths:
            METHODS.add_file(path)


def split_pairs(pairs: tuple[tuple[str, str], ...], option: str) -> dict[str, str]:
    """Name and value pairs as a dictionary; a name given twice is refused."""
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise OptionError(f"{option} {name} is given twice: {found[name]!r} and {value!r}")
        found[name] = value
    return found
