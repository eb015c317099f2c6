"""`remelt verify`: whether a checkpoint is what it should be."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json
from remelt.errors import RunError

_MOST_SHOWN = 20


@click.command("verify")
@click.argument("file", metavar="FILE")
@click.option("--recipe", is_flag=True, help="Compute tensors again from the recipe inside, and compare them.")
@click.option("--sample", type=click.IntRange(min=1), default=16, show_default=True, help="How many to compute again.")
@click.option("--all", "every", is_flag=True, help="Compute all of them again.")
@shared.models
@shared.common
def command(
    file: str,
    recipe: bool,
    sample: int,
    every: bool,
    models_dirs: tuple[Path, ...],
    plugins: tuple[Path, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Verify header, checksum and finite values; with --recipe, also that the recipe makes the same bits again.

    Exits with 4 where something is wrong.
    """
    from remelt.api.verification import verify

    shared.load_plugins(plugins)
    found = verify(file, recipe=recipe or every, sample=None if every else sample, models_dirs=models_dirs)
    if as_json:
        echo_json(asdict(found))
    else:
        click.echo(f"{found.path}")
        click.echo(f"header      {found.tensors} tensors")
        checksum = {None: "none in this file", True: "fits", False: "differs"}[found.checksum]
        click.echo(f"checksum    {checksum}")
        click.echo(f"finite      {'every tensor' if not found.nonfinite else f'not {len(found.nonfinite)} tensors'}")
        if recipe or every:
            click.echo(f"recipe      {found.recomputed} of {found.tensors} tensors computed again")
        if found.executor is not None:
            click.echo(f"note        made by {found.executor}: compared within the last bits")
    if found.faults:
        shown = found.faults[:_MOST_SHOWN]
        more = [f"and {len(found.faults) - len(shown)} more"] if len(found.faults) > len(shown) else []
        raise RunError("\n".join([f"{Path(found.path).name} is not what it should be:", *shown, *more]))
