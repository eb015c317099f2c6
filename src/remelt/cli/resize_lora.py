"""`remelt resize-lora`: a LoRA at another rank."""

from __future__ import annotations

from pathlib import Path

import click

from remelt.cli import options as shared
from remelt.cli.adapters import sized, told
from remelt.cli.output import progress
from remelt.errors import UsageError


@click.command("resize-lora")
@click.argument("lora", metavar="LORA")
@click.option("-o", "--output", required=True, metavar="PATH", help="The file to write.")
@sized
@click.option("--dtype", metavar="TYPE", help="Element type of the output; by default the LoRA's own.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete.")
@shared.models_only
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@shared.common
def command(
    lora: str,
    output: str,
    rank: int | None,
    energy: float | None,
    dtype: str | None,
    overwrite: bool,
    models_dirs: tuple[Path, ...],
    quiet: bool,
    as_json: bool,
    **_: object,
) -> None:
    """Write a LoRA at another rank, or at the least that keeps a share of the energy of each module.

    \b
    remelt resize-lora style.safetensors -o style-8.safetensors --rank 8
    remelt resize-lora style.safetensors -o style-small.safetensors --energy 0.95
    """
    from remelt.api.adapters import resize_lora

    if rank is None and energy is None:
        raise UsageError("a LoRA is resized to a rank, or to a share of its energy", hint="--rank 8, or --energy 0.95")
    with progress(quiet=quiet or as_json) as watch:
        report = resize_lora(
            lora,
            output,
            rank=rank,
            energy=energy,
            watch=watch,
            dtype=dtype,
            overwrite=overwrite,
            models_dirs=models_dirs,
        )
    told(report, as_json=as_json, quiet=quiet)
