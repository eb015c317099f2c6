"""`remelt convert`: a model in another layout of keys."""

from __future__ import annotations

import time
from pathlib import Path

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json, progress
from remelt.core.units import format_seconds


@click.command("convert")
@click.argument("model", metavar="MODEL")
@click.option("--to", "dialect", required=True, metavar="DIALECT", help="original, diffusers or kohya.")
@click.option("-o", "--output", required=True, metavar="PATH", help="The file or folder to write.")
@click.option("--arch", metavar="NAME", help="What the model is, where it looks like several archs.")
@click.option("--like", metavar="FOLDER", help="Take configurations and tokenizers from this model's folder.")
@shared.told
@click.option("--dtype", metavar="TYPE", help="Element type of the output; by default each tensor keeps its own.")
@click.option("--max-shard-size", metavar="SIZE", help="Write shards of at most this size.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete.")
@shared.models_only
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@shared.common
def command(
    model: str,
    dialect: str,
    output: str,
    arch: str | None,
    like: str | None,
    title: str | None,
    modelspec: tuple[tuple[str, str], ...],
    dtype: str | None,
    max_shard_size: str | None,
    overwrite: bool,
    models_dirs: tuple[Path, ...],
    quiet: bool,
    as_json: bool,
    **_: object,
) -> None:
    """Write a model in another layout of keys: the names and shapes of the same weights.

    \b
    remelt convert deliberate_v2.safetensors --to diffusers --like stable-diffusion-v1-5 -o deliberate
    remelt convert stable-diffusion-v1-5 --to original -o v1-5.safetensors
    """
    from remelt.api.description import ENTRY, LIKE
    from remelt.api.dialect_views import WITHOUT_A_PLACE
    from remelt.api.merging import asked, drain, prepare_merges
    from remelt.recipe.node import model as as_model

    begun = time.monotonic()
    options: dict[str, object] = {"like": like, "dtype": dtype, "max_shard_size": max_shard_size, "title": title}
    options |= {"overwrite": overwrite, "modelspec": shared.split_pairs(modelspec, "--modelspec") or None}
    source, chosen = asked(
        as_model(model, arch=arch), output, {**options, "dialect": dialect, "models_dirs": models_dirs}
    )
    with prepare_merges([source], [output], chosen) as prepared, progress(quiet=quiet or as_json) as watch:
        warnings = prepared.groups[0].plan.warnings
        lost = [warning for warning in warnings if any(part in warning for part in (WITHOUT_A_PLACE, LIKE, ENTRY))]
        for warning in () if as_json else lost:
            click.echo(f"warning: {warning}", err=True)
        path = drain(prepared, chosen, watch).paths[0]
    if as_json:
        seconds = time.monotonic() - begun
        echo_json({"output": str(path), "seconds": seconds, "warnings": lost})
    elif not quiet:
        click.echo(f"wrote {path} in {format_seconds(time.monotonic() - begun)}")
