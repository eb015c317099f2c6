"""`remelt merge-lora`: several LoRAs as one."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import click

from remelt.cli import options as shared
from remelt.cli.adapters import sized, told
from remelt.cli.output import progress
from remelt.errors import UsageError
from remelt.recipe.node import Value, as_node


@click.command("merge-lora")
@click.argument("loras", metavar="LORA...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="PATH", help="The file to write.")
@click.option(
    "-s", "--strength", "strengths", type=float, multiple=True, metavar="X", help="Of each in turn; by default 1."
)
@sized
@click.option("--base", metavar="MODEL", help="The model that they change, where they name its modules differently.")
@click.option("--dtype", metavar="TYPE", help="Element type of the output; by default the first LoRA's.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete.")
@shared.models_only
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@shared.common
def command(
    loras: tuple[str, ...],
    output: str,
    strengths: tuple[float, ...],
    rank: int | None,
    energy: float | None,
    base: str | None,
    dtype: str | None,
    overwrite: bool,
    models_dirs: tuple[Path, ...],
    quiet: bool,
    as_json: bool,
    **_: object,
) -> None:
    """Write the weighted sum of LoRAs as one LoRA: exactly, of ranks that add up, or at a rank.

    \b
    remelt merge-lora style.safetensors subject.safetensors -s 0.8 -s 0.5 -o both.safetensors
    remelt merge-lora style.safetensors subject.safetensors -o both.safetensors --rank 32
    """
    from remelt.api.adapters import merge_adapters

    if strengths and len(strengths) != len(loras):
        raise UsageError(f"there are {len(loras)} LoRAs, but {len(strengths)} strengths", hint="one -s for each")
    given = strengths or (1.0,) * len(loras)
    parts = [as_node(lora) * Value(strength) for lora, strength in zip(loras, given, strict=True)]
    recipe = functools.reduce(operator.add, parts)
    with progress(quiet=quiet or as_json) as watch:
        report = merge_adapters(
            recipe,
            output,
            rank=rank,
            energy=energy,
            base=base,
            watch=watch,
            dtype=dtype,
            overwrite=overwrite,
            models_dirs=models_dirs,
        )
    told(report, as_json=as_json, quiet=quiet)
