"""`remelt extract-lora`: what a model was tuned by, as an adapter of its base."""

from __future__ import annotations

from typing import Any

import click

from remelt.cli.adapters import told, writing
from remelt.cli.output import progress
from remelt.errors import UsageError


@click.command("extract-lora")
@click.argument("tuned", metavar="TUNED")
@click.argument("base", metavar="BASE")
@click.option("--kind", type=click.Choice(["lora", "lokr"]), default="lora", show_default=True)
@click.option("--names", metavar="WHOSE", help="Names of modules: kohya, diffusers or peft; by default the arch's.")
@click.option("--factor", type=int, default=-1, metavar="N", help="How LoKr divides sides; by default their roots.")
@click.option("--memory", metavar="SIZE", help="Memory budget, as in 4GiB; by default a quarter of what is available.")
@writing
def command(
    tuned: str,
    base: str,
    output: str,
    quiet: bool,
    as_json: bool,
    debug: bool,
    **given: Any,
) -> None:
    """Write what a model was tuned by as an adapter of its base.

    \b
    remelt extract-lora tuned.safetensors base.safetensors -o style.safetensors --rank 32
    remelt extract-lora tuned.safetensors base.safetensors -o style.safetensors --energy 0.95
    remelt extract-lora tuned/ base/ -o adapter/ --rank 16 --names peft
    """
    from remelt.api.adapters import extract_lora

    if given["kind"] == "lora" and given["rank"] is None and given["energy"] is None:
        raise UsageError("a LoRA has a rank, or keeps a share of the energy", hint="--rank 32, or --energy 0.95")
    with progress(quiet=quiet or as_json) as watch:
        report = extract_lora(tuned, base, output, watch=watch, **given)
    told(report, as_json=as_json, quiet=quiet)
