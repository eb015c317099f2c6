"""`remelt recipe`: recipes as texts: in other grammars, in the canonical layout, as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from remelt.api.drawing import PICTURES, draw
from remelt.api.recipes import FORMATS, canonical_text, load_document, moved_document, write_document_as, write_text
from remelt.cli import options as shared
from remelt.cli.output import deliver, echo_json, folder_of

CHANGED = 1


@click.group("recipe")
def command() -> None:
    """Work with the text of recipes: convert, fmt, draw."""


def _output(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--overwrite", is_flag=True, help="Replace an existing file.")(function)
    return click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="The file to write; by default it is printed."
    )(function)


@command.command("convert")
@click.argument("recipe", metavar="RECIPE")
@click.option("--to", "to", type=click.Choice(list(FORMATS)), default="1", show_default=True, help="The grammar.")
@_output
@shared.common
def convert(recipe: str, to: str, output: Path | None, overwrite: bool, as_json: bool, debug: bool) -> None:
    """Write a recipe in another grammar: of a file of any grammar, or of a checkpoint that carries one."""
    document, folder = load_document(recipe)
    text = write_document_as(moved_document(document, folder, folder_of(output, folder)), to)
    deliver(text, output, overwrite=overwrite, as_json=as_json)


@command.command("fmt")
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True)
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 where a file would change.")
@shared.common
def fmt(recipes: tuple[str, ...], check: bool, as_json: bool, debug: bool) -> int:
    """Rewrite recipes of version 1 in the canonical layout; names and comments stay."""
    changed = []
    for name in recipes:
        path = Path(name)
        before, after = canonical_text(path)
        if before != after:
            changed.append(name)
            if not check:
                write_text(path, after)
    if as_json:
        echo_json({"changed": changed, "written": not check})
    else:
        for name in changed:
            click.echo(f"would rewrite {name}" if check else f"rewrote {name}")
        if not changed:
            click.echo(f"{len(recipes)} recipe{'' if len(recipes) == 1 else 's'} in the canonical layout already")
    return CHANGED if check and changed else 0


@command.command("draw")
@click.argument("recipe", metavar="RECIPE")
@click.option("--to", "to", type=click.Choice(PICTURES), default="mermaid", show_default=True, help="The format.")
@_output
@shared.plugins
@shared.common
def draw_command(
    recipe: str, to: Any, output: Path | None, overwrite: bool, plugins: tuple[Path, ...], as_json: bool, debug: bool
) -> None:
    """Draw a recipe: models, steps, and what each is made of."""
    shared.load_plugins(plugins)
    document, _ = load_document(recipe)
    deliver(draw(document.result, to), output, overwrite=overwrite, as_json=as_json)
