"""`remelt router`: the router of a mixture of experts, made of prompts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json


@click.command("router")
@click.argument("base", metavar="BASE")
@click.argument("prompts", metavar="PROMPTS")
@click.option("-o", "--output", required=True, metavar="PATH", help="The file to write.")
@click.option(
    "--mode",
    metavar="MODE",
    help="hidden (the last token's states), hidden_avg or cheap_embed; by default what the file says, or hidden.",
)
@click.option("--device", default="cpu", show_default=True, help="Where the base runs: cpu, cuda, cuda:1 or mps.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@shared.models_only
@shared.common
def command(
    base: str,
    prompts: str,
    output: str,
    mode: str | None,
    device: str,
    overwrite: bool,
    models_dirs: tuple[Path, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Write a router for a mixture of experts: for each expert, what the base makes of prompts that are meant for it.

    PROMPTS is a JSON file, or a configuration of mergekit-moe. cheap_embed runs no model.

    \b
    remelt router base/ prompts.json -o router.safetensors
    remelt router base/ config.yml -o router.safetensors --mode cheap_embed
    """
    from remelt.api.routers import make_router

    report = make_router(base, prompts, output, mode=mode, device=device, overwrite=overwrite, models_dirs=models_dirs)
    if as_json:
        echo_json(asdict(report))
        return
    click.echo(f"wrote {report.path}")
    click.echo(f"{report.layers} layers, {report.experts} experts, {report.width} numbers for each")
    if report.alike:
        click.echo(
            f"warning: in {len(report.alike)} of {report.layers} layers the experts' rows are nearly dependent: "
            "some experts will hardly be asked; prompts that differ more tell them apart",
            err=True,
        )
