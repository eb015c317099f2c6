"""`remelt doctor`: what this machine and this installation have."""

from __future__ import annotations

from pathlib import Path

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json
from remelt.core.units import format_bytes


@click.command("doctor")
@shared.models
@shared.common
def command(models_dirs: tuple[Path, ...], plugins: tuple[Path, ...], as_json: bool, debug: bool) -> None:
    """Tell versions, devices, memory, models folders and extras: what to say when asking for help."""
    from remelt.api.inspection import examine_machine

    shared.load_plugins(plugins)
    found = examine_machine(models_dirs)
    if as_json:
        echo_json(found)
        return
    click.echo(f"remelt     {found['remelt']} on Python {found['python']}, {found['system']}")
    click.echo(f"torch      {found['torch']}, CPU capability {found['cpu_capability']}")
    click.echo(f"native     {found['native']}" + ("; merging uses torch" if "absent" in found["native"] else ""))
    click.echo(f"devices    {', '.join(found['devices'])}")
    click.echo(f"cores      {found['cores']}")
    click.echo(f"memory     {format_bytes(found['memory_available'])} available")
    click.echo("libraries  " + ", ".join(f"{name} {version}" for name, version in found["libraries"].items()))
    present = [name for name, here in found["extras"].items() if here]
    absent = [name for name, here in found["extras"].items() if not here]
    click.echo(f"extras     present: {', '.join(present) or 'none'}; absent: {', '.join(absent) or 'none'}")
    click.echo(f"config     {found['config']}")
    for folder in found["models_dirs"]:
        click.echo(f"models     {folder['path']}" + ("" if folder["exists"] else "  (does not exist)"))
    if not found["models_dirs"]:
        click.echo("models     no folders; --models-dir, REMELT_MODELS_DIR or the config file name them")
