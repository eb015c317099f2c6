"""`remelt compose`: a recipe with its parameters filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from remelt.api.recipes import compose_source, load_recipe, names_recipe, serialize
from remelt.cli import options as shared
from remelt.cli.output import echo_json, save
from remelt.errors import ModelNameError
from remelt.formats.locate import locate_model, models_folders
from remelt.recipe.compose import parameters_of


@click.command("compose")
@click.argument("base", metavar="RECIPE")
@click.option(
    "-p",
    "--parameter",
    "parameters",
    nargs=2,
    multiple=True,
    metavar="NAME PATH",
    help="A parameter and the model or recipe that fills it; repeatable.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The recipe file to write; by default it is printed."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@shared.models_only
@shared.common
def command(base: str, parameters: tuple[tuple[str, str], ...], output: Path | None, **given: Any) -> None:
    """Fill a recipe's parameters with models or other recipes.

    A model that is not there yet is a warning: the recipe may be merged where it is. Parameters that are not named
    stay open; those of a recipe that fills ``a`` become ``a.NAME``.
    """
    filled = shared.split_pairs(parameters, "-p")
    source = load_recipe(base)
    folders = [source.folder, *models_folders([Path(folder) for folder in given["models_dirs"]])]
    warnings = [warning for path in filled.values() if (warning := _missing(path, folders)) is not None]
    recipe = compose_source(source, filled)
    text = serialize(recipe)
    save(text, output, overwrite=given["overwrite"])
    if given["as_json"]:
        left = sorted(parameters_of(recipe))
        echo_json({"recipe": text, "output": output and str(output), "open_parameters": left, "warnings": warnings})
        return
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    if output is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"wrote {output}")


def _missing(path: str, folders: list[Path]) -> str | None:
    if names_recipe(path):
        return None
    try:
        locate_model(path, folders)
    except ModelNameError as error:
        return f"{error.message}; merge will need it"
    return None
