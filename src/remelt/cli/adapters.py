"""What the commands for adapters share: their options, the call that joins LoRAs, and what is told of the result."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from remelt.check.report import fold_keys
from remelt.cli import options as shared
from remelt.cli.output import echo_json, progress
from remelt.recipe.node import Node

if TYPE_CHECKING:
    from remelt.api.adapters import AdapterReport

F = TypeVar("F", bound=Callable[..., Any])
_SHOWN = 3


_WRITING = [
    click.option("-o", "--output", required=True, metavar="PATH", help="The file to write; a folder for PEFT's names."),
    click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank of every module, at most."),
    click.option(
        "--energy", type=click.FloatRange(0.0, 1.0, min_open=True), metavar="SHARE", help="Share of squares to keep."
    ),
    click.option("--dtype", metavar="TYPE", help="Element type of the output; by default that of what it is made of."),
    click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no summary."),
]


def writing(command: F) -> F:
    """What every command takes that writes an adapter."""
    for option in reversed(_WRITING):
        command = option(command)
    return shared.models_only(shared.common(command))


def strengths_of(command: F) -> F:
    """`--strength`, of each adapter in turn."""
    option = click.option(
        *("-s", "--strength", "strengths"),
        type=float,
        multiple=True,
        metavar="X",
        callback=_finite,
        help="Of each adapter in turn.",
    )
    return option(command)


def _finite(context: click.Context, parameter: click.Parameter, values: tuple[float, ...]) -> tuple[float, ...]:
    for value in values:
        if not math.isfinite(value):
            raise click.BadParameter(f"a strength is a finite number, but got {value}")
    return values


def join(recipe: Node, given: Mapping[str, Any], base: str | None = None) -> None:
    """Write a weighted sum of LoRAs as one, and tell of it."""
    from remelt.api.adapters import merge_adapters

    wanted = {name: given[name] for name in ("rank", "energy", "dtype", "overwrite", "models_dirs")}
    with progress(quiet=given["quiet"] or given["as_json"]) as watch:
        report = merge_adapters(recipe, given["output"], base=base, watch=watch, **wanted)
    told(report, as_json=given["as_json"], quiet=given["quiet"])


def told(report: AdapterReport, *, as_json: bool, quiet: bool) -> None:
    """Tell what was written: ranks, and the energy that is kept, with the modules that keep least."""
    if as_json:
        modules = {name: {"rank": rank, "share": report.shares.get(name)} for name, rank in report.ranks.items()}
        share = report.share if report.shares else None
        echo_json({"output": str(report.path), "share": share, "modules": modules, "left": report.left})
        return
    if quiet:
        return
    click.echo(f"wrote {report.path}")
    counts = Counter(report.ranks.values()).most_common()
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in counts[:_SHOWN] if rank)
    more = f" and {len(counts) - _SHOWN} other ranks" if len(counts) > _SHOWN else ""
    counted = f"{len(report.ranks)} module{'' if len(report.ranks) == 1 else 's'}"
    click.echo(f"{counted}{': ' if ranks else ''}{ranks}{more}")
    if report.shares:
        click.echo(f"{report.share:.2%} of the difference's energy is kept")
        least = sorted(report.shares.items(), key=lambda item: item[1])[:_SHOWN]
        click.echo("least: " + ", ".join(f"{name} {share:.1%}" for name, share in least))
    if report.left:
        lost = sum(report.left.values())
        part = lost / (lost + sum(report.energies.values()))
        one = len(report.left) == 1
        click.echo(
            f"warning: {len(report.left)} tensor{' differs' if one else 's differ'}, but "
            f"{'is no linear map or convolution, and is' if one else 'are no linear maps or convolutions, and are'} "
            f"left out ({part:.2%} of the difference): {fold_keys(list(report.left))}",
            err=True,
        )
