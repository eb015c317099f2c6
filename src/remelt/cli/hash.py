"""`remelt hash`: a checkpoint's hashes, as model sites and recipes use them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json


@click.command("hash")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--no-cache", is_flag=True, help="Read the files, whatever is remembered of them.")
@shared.models_only
@shared.common
def command(
    files: tuple[str, ...],
    no_cache: bool,
    models_dirs: tuple[Path, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Tell SHA-256, the short AutoV2 form of model sites, and a hash of the tensors alone.

    The last does not depend on metadata, on the order of keys, or on shards. Hashes are remembered while a file stays.
    """
    from remelt.api.hashing import hash_model

    found = [hash_model(file, models_dirs=models_dirs, cached=not no_cache) for file in files]
    if as_json:
        echo_json([asdict(one) for one in found])
        return
    for one in found:
        click.echo(f"{one.path}\nsha256   {one.sha256}\nautov2   {one.autov2}\ntensors  {one.tensors}")
