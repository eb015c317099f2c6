"""`remelt extract-lora`: what a model was tuned by, as an adapter of its base."""

from __future__ import annotations

from pathlib import Path

import click

from remelt.cli import options as shared
from remelt.cli.adapters import sized, told
from remelt.cli.output import progress
from remelt.errors import UsageError


@click.command("extract-lora")
@click.argument("tuned", metavar="TUNED")
@click.argument("base", metavar="BASE")
@click.option("-o", "--output", required=True, metavar="PATH", help="The file to write; a folder for PEFT's names.")
@sized
@click.option("--kind", type=click.Choice(["lora", "lokr"]), default="lora", show_default=True)
@click.option("--names", metavar="WHOSE", help="Names of modules: kohya, diffusers or peft; by default the arch's.")
@click.option("--factor", type=int, default=-1, metavar="N", help="How LoKr divides sides; by default their roots.")
@click.option("--dtype", metavar="TYPE", help="Element type of the output; by default the models' own.")
@click.option("--memory", metavar="SIZE", help="Memory budget, as in 4GiB; by default a quarter of what is available.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete.")
@shared.models_only
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@shared.common
def command(
    tuned: str,
    base: str,
    output: str,
    rank: int | None,
    energy: float | None,
    kind: str,
    names: str | None,
    factor: int,
    dtype: str | None,
    memory: str | None,
    overwrite: bool,
    models_dirs: tuple[Path, ...],
    quiet: bool,
    as_json: bool,
    **_: object,
) -> None:
    """Write what a model was tuned by as an adapter of its base.

    \b
    remelt extract-lora tuned.safetensors base.safetensors -o style.safetensors --rank 32
    remelt extract-lora tuned.safetensors base.safetensors -o style.safetensors --energy 0.95
    remelt extract-lora tuned/ base/ -o adapter/ --rank 16 --names peft
    """
    from remelt.api.adapters import extract_lora

    if kind == "lora" and rank is None and energy is None:
        raise UsageError("a LoRA has a rank, or keeps a share of the energy", hint="--rank 32, or --energy 0.95")
    with progress(quiet=quiet or as_json) as watch:
        report = extract_lora(
            tuned,
            base,
            output,
            rank=rank,
            energy=energy,
            kind=kind,
            names=names,
            factor=factor,
            watch=watch,
            dtype=dtype,
            memory=memory,
            overwrite=overwrite,
            models_dirs=models_dirs,
        )
    told(report, as_json=as_json, quiet=quiet)
