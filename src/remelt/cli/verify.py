"""`remelt verify`: whether a checkpoint is what it should be."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from remelt.cli import options as shared
from remelt.cli.adapters import strengths_of
from remelt.cli.output import echo_json
from remelt.errors import RunError, UsageError

_MOST_SHOWN = 20


@click.command("verify")
@click.argument("file", metavar="FILE")
@click.option("--recipe", is_flag=True, help="Compute tensors again from the recipe inside, and compare them.")
@click.option("--sample", type=click.IntRange(min=1), default=16, show_default=True, help="How many to compute again.")
@click.option("--adapter", "adapters", multiple=True, metavar="FILE", help="Whether this adapter is in it; repeatable.")
@click.option("--base", metavar="MODEL", help="For --adapter: the model that it was added to.")
@strengths_of
@click.option("--ignore-unused", is_flag=True, help="Leave out what an adapter has for modules that the base lacks.")
@click.option("--all", "every", is_flag=True, help="Compute all of them again.")
@shared.models
@shared.common
def command(
    file: str,
    recipe: bool,
    sample: int,
    every: bool,
    adapters: tuple[str, ...],
    base: str | None,
    strengths: tuple[float, ...],
    ignore_unused: bool,
    models_dirs: tuple[Path, ...],
    plugins: tuple[Path, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Verify header, checksum and finite values; with --recipe, also that the recipe makes the same bits again.

    With --adapter and --base, whether every tensor of the adapter landed, and by which strength.

    Exits with 4 where something is wrong.
    """
    from remelt.api.verification import verify

    shared.load_plugins(plugins)
    if adapters:
        _adapters(file, adapters, base, strengths, as_json, models_dirs=models_dirs, ignore_unused=ignore_unused)
        return
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
        raise RunError("\n".join([f"{Path(found.path).name} is not what it should be:", *_shown(found.faults)]))


def _adapters(
    file: str,
    adapters: tuple[str, ...],
    base: str | None,
    strengths: tuple[float, ...],
    as_json: bool,
    **options: Any,
) -> None:
    from remelt.api.adapter_verification import verify_adapters

    if base is None:
        raise UsageError("an adapter is looked for in what was added to a model", hint="--base MODEL")
    stated = strengths or None
    found = verify_adapters(file, adapters, base, strengths=stated, **options)
    if as_json:
        echo_json(asdict(found))
    else:
        for name, strength in zip(found.adapters, found.strengths, strict=False):
            click.echo(f"{name:<30} by {strength:.4g}")
        one = len(found.landings) == 1
        click.echo(f"{len(found.landings)} tensor{'' if one else 's'} of the model {'is' if one else 'are'} changed")
    if found.faults:
        raise RunError("\n".join([f"{Path(file).name} is not what it should be:", *_shown(found.faults)]))


def _shown(faults: list[str]) -> list[str]:
    more = [f"and {len(faults) - _MOST_SHOWN} more"] if len(faults) > _MOST_SHOWN else []
    return [*faults[:_MOST_SHOWN], *more]
