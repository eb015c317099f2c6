"""`remelt inspect`: what a checkpoint is, from its header."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json
from remelt.core.units import format_bytes


@click.command("inspect")
@click.argument("file", metavar="FILE")
@click.option("--deep", is_flag=True, help="Read all tensors and list those with NaN or infinities.")
@shared.models_only
@shared.common
def command(file: str, deep: bool, models_dirs: tuple[Path, ...], as_json: bool, debug: bool) -> None:
    """Tell arch, keys, element types, size and the embedded recipe of a checkpoint."""
    from remelt.api.inspection import inspect
    from remelt.planning.explain import name_arch

    found = inspect(file, deep=deep, models_dirs=models_dirs)
    if as_json:
        echo_json(asdict(found))
        return
    click.echo(f"{found.path}  ({found.format})")
    if found.adapter is not None:
        listed = ", ".join(f"{count} {what.removeprefix('a ')}" for what, count in found.adapter.items())
        click.echo(f"adapter     {sum(found.adapter.values())} modules: {listed}")
    else:
        click.echo(f"arch        {name_arch(found.arch, found.evidence)}")
    if found.note:
        click.echo(f"note        {found.note}")
    types = ", ".join(f"{count} {dtype}" for dtype, count in sorted(found.dtypes.items()))
    blocks = "" if found.adapter is not None else f", {found.blocks} blocks"
    click.echo(f"tensors     {found.tensors} ({types}), {format_bytes(found.size)}{blocks}")
    if found.quantised:
        listed = ", ".join(f"{count} {what}" for what, count in sorted(found.quantised.items()))
        click.echo(f"quantised   {listed}")
    if found.adapter is None:
        click.echo("components  " + ", ".join(f"{name} {count}" for name, count in found.components.items()))
    for key, value in sorted(found.metadata.items()):
        click.echo(f"metadata    {key}: {value if len(value) <= 80 else value[:77] + '...'}")
    if found.recipe is not None:
        click.echo("recipe      (remelt merge runs it again)")
        click.echo("".join(f"    {line}\n" for line in found.recipe.splitlines()), nl=False)
    if found.nonfinite is not None:
        listed = ", ".join(found.nonfinite)
        click.echo(f"finite      {'every tensor' if not listed else 'NaN or infinity in ' + listed}")
