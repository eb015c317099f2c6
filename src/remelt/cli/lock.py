"""`remelt lock`: the hashes of its models written into a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json, folder_of, refuse_existing, save
from remelt.errors import OutputError


@click.command("lock")
@click.argument("recipe", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="PATH", type=click.Path(path_type=Path), help="By default the recipe itself.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@shared.models
@shared.common
def command(
    recipe: Path,
    output: Path | None,
    overwrite: bool,
    models_dirs: tuple[Path, ...],
    plugins: tuple[Path, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Write the SHA-256 of every model into a recipe.

    A locked recipe refuses models of other content, finds renamed ones by their content, and makes the same result
    anywhere. Names and comments stay; the layout becomes the canonical one.
    """
    from remelt.api.locking import lock_document
    from remelt.api.recipes import is_recipe_file, load_document, moved_document

    shared.load_plugins(plugins)
    if output is None and not is_recipe_file(recipe):
        raise OutputError(f"{recipe} is a checkpoint: its locked recipe needs a file", hint="-o recipe.mecha")
    document, folder = load_document(recipe)
    if output is None and document.grammar != "version 1":
        raise OutputError(
            f"{recipe} is written in another grammar ({document.grammar}), which knows no locks",
            hint="-o NEW.mecha writes it in version 1",
        )
    target = output or recipe
    refuse_existing(target, overwrite=overwrite or target == recipe)
    moved = moved_document(document, folder, folder_of(output, folder))
    locked = lock_document(moved, folder_of(output, folder), models_dirs=models_dirs)
    save(locked.text, target, overwrite=True)
    if as_json:
        echo_json({"path": str(target), "models": locked.models})
        return
    for name, digest in locked.models.items():
        click.echo(f"{digest[:16]}  {name}")
    click.echo(f"wrote {target}")
