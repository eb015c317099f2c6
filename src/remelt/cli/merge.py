"""`remelt merge`: a recipe, several, or models by one method, to files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from remelt.cli import options as shared
from remelt.cli.alignment import match_first
from remelt.cli.output import echo_json, plan_record, progress
from remelt.cli.sources import changes, name_outputs, operated, read_sources, stores
from remelt.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from remelt.api.merging import Merged
    from remelt.api.profiling import Profile


@click.command("merge")
@shared.merging
@shared.models
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@click.option("--profile", is_flag=True, help="Tell where the time went, and what the machine could do.")
@shared.common
def command(
    sources: tuple[str, ...], output: str | None, quiet: bool, profile: bool, as_json: bool, **given: Any
) -> None:
    """Merge a recipe, several recipes, or models by one method.

    \b
    remelt merge mix.mecha -o mix.safetensors
    remelt merge a.safetensors b.safetensors -m weighted_sum -p alpha 0.3 -o mix.safetensors
    remelt merge *.mecha -o merges/
    remelt merge mix.safetensors -o again.safetensors    (the recipe inside an earlier result)
    """
    from remelt.api.merging import Merged, prepare_merges, run_prepared

    shared.load_plugins(given["plugins"])
    alone = {"changed": changes(given), "stored": stores(given, output)}
    read = operated(read_sources(sources, given["method"], given["parameters"], **alone), given)
    options = shared.merge_options(given, read)
    begun = time.monotonic()
    merged = Merged()
    with prepare_merges(read, name_outputs(read, output, options), options) as prepared:
        planned = time.monotonic() - begun
        if not as_json:
            for group in prepared.groups:
                for warning in group.plan.warnings:
                    click.echo(f"warning: {warning}", err=True)
        match_first(prepared, quiet=quiet or as_json)
        with progress(quiet=quiet or as_json) as watch:
            for event in run_prepared(prepared, options):
                if isinstance(event, Merged):
                    merged = event
                elif watch is not None:
                    watch(event)
    seconds = time.monotonic() - begun
    hashes = {position: _hash(path) for position, path in merged.paths.items()} if given["hashes"] else {}
    found = _profile(merged, planned, seconds) if profile else None
    _tell(merged, hashes, seconds, found, as_json, quiet)


def _profile(merged: Merged, planned: float, seconds: float) -> Profile:
    from remelt.api.profiling import Profile, copy_bandwidth, memory_bandwidth
    from remelt.engine.tally import together

    threads = max((plan.threads for plan in merged.plans), default=1)
    return Profile(
        planning=planned,
        merging=merged.seconds,
        publishing=seconds - planned - merged.seconds,
        threads=threads,
        tally=together(merged.tallies),
        memory=memory_bandwidth(threads),
        copy=next((copy_bandwidth(path.parent) for path in merged.paths.values()), None),
    )


def _hash(path: Path) -> str:
    from remelt.api.hashing import content_hash
    from remelt.formats.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return content_hash(checkpoint, cached=False)


def _tell(
    merged: Merged, hashes: dict[int, str], seconds: float, profile: Profile | None, as_json: bool, quiet: bool
) -> None:
    if as_json:
        paths = [str(merged.paths[position]) for position in sorted(merged.paths)]
        plans = [plan_record(plan) for plan in merged.plans]
        told = {"outputs": paths, "seconds": seconds, "kept_bytes": merged.kept, "nonfinite": merged.nonfinite}
        if hashes:
            told["sha256"] = [hashes[position] for position in sorted(hashes)]
        if profile is not None:
            told["profile"] = profile.record()
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
    for line in profile.lines() if profile is not None else ():
        click.echo(line)


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
