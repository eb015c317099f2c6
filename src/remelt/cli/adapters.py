"""What the commands that write adapters share: how large they are to be, and what is told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from remelt.check.report import fold_keys
from remelt.cli.output import echo_json

if TYPE_CHECKING:
    from remelt.api.adapters import AdapterReport

F = TypeVar("F", bound=Callable[..., Any])
_SHOWN = 3


def sized(command: F) -> F:
    """`--rank` and `--energy`."""
    command = click.option(
        "--energy", type=click.FloatRange(0.0, 1.0, min_open=True), metavar="SHARE", help="Share of squares to keep."
    )(command)
    rank = click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank of every module, at most.")
    return rank(command)


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
    click.echo(f"{len(report.ranks)} modules{': ' if ranks else ''}{ranks}{more}")
    if report.shares:
        click.echo(f"{report.share:.2%} of the difference's energy is kept")
        least = sorted(report.shares.items(), key=lambda item: item[1])[:_SHOWN]
        click.echo("least: " + ", ".join(f"{name} {share:.1%}" for name, share in least))
    if report.left:
        lost = sum(report.left.values())
        part = lost / (lost + sum(report.energies.values()))
        click.echo(
            f"warning: {len(report.left)} tensors differ, but are no linear maps or convolutions, and are left out "
            f"({part:.2%} of the difference): {fold_keys(list(report.left))}",
            err=True,
        )
