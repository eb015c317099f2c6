"""`remelt merge`: a recipe, several, or models by one method, to files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json, plan_record, progress
from remelt.cli.sources import name_outputs, read_sources
from remelt.core.units import format_bytes, format_seconds


@click.command("merge")
@shared.merging
@shared.models
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@shared.common
def command(sources: tuple[str, ...], output: str | None, quiet: bool, as_json: bool, **given: Any) -> None:
    """Merge a recipe, several recipes, or models by one method.

    \b
    remelt merge mix.mecha -o mix.safetensors
    remelt merge a.safetensors b.safetensors -m weighted_sum -p alpha 0.3 -o mix.safetensors
    remelt merge *.mecha -o merges/
    remelt merge mix.safetensors -o again.safetensors    (the recipe inside an earlier result)
    """
    from remelt.api.merging import Merged, prepare_merges, run_prepared

    shared.load_plugins(given["plugins"])
    read = read_sources(sources, given["method"], given["parameters"])
    options = shared.merge_options(given, read)
    begun = time.monotonic()
    merged = Merged()
    with prepare_merges(read, name_outputs(read, output, options), options) as prepared:
        if not as_json:
            for group in prepared.groups:
                for warning in group.plan.warnings:
                    click.echo(f"warning: {warning}", err=True)
        with progress(quiet=quiet or as_json) as watch:
            for event in run_prepared(prepared, options):
                if isinstance(event, Merged):
                    merged = event
                elif watch is not None:
                    watch(event)
    seconds = time.monotonic() - begun
    hashes = {position: _hash(path) for position, path in merged.paths.items()} if given["hashes"] else {}
    _tell(merged, hashes, seconds, as_json, quiet)


def _hash(path: Path) -> str:
    from remelt.api.hashing import content_hash
    from remelt.formats.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return content_hash(checkpoint, cached=False)


def _tell(merged: Any, hashes: dict[int, str], seconds: float, as_json: bool, quiet: bool) -> None:
    if as_json:
        paths = [str(merged.paths[position]) for position in sorted(merged.paths)]
        plans = [plan_record(plan) for plan in merged.plans]
        told = {"outputs": paths, "seconds": seconds, "kept_bytes": merged.kept, "nonfinite": merged.nonfinite}
        if hashes:
            told["sha256"] = [hashes[position] for position in sorted(hashes)]
        echo_json({**told, "plans": plans})
        return
    for line in merged.nonfinite:
        click.echo(f"warning: {line}", err=True)
    if quiet:
        return
    written = sum(plan.bytes_written for plan in merged.plans)
    if merged.kept:
        click.echo(f"continued an interrupted merge: {format_bytes(merged.kept)} were done")
    for position in sorted(merged.paths):
        click.echo(f"wrote {_shown(merged.paths[position])}")
        if position in hashes:
            click.echo(f"sha256 {hashes[position]}")
    click.echo(f"{format_bytes(written)} in {format_seconds(seconds)}")


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
