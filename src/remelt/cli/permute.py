"""`remelt permute`: a model or an adapter with its axes permuted as a file says."""

from __future__ import annotations

from typing import Any

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json, progress


@click.command("permute")
@click.argument("model", metavar="MODEL")
@click.argument("permutations", metavar="PERMUTATIONS")
@click.option("-o", "--output", required=True, metavar="PATH", help="The file or folder to write.")
@click.option("--inverse", is_flag=True, help="Undo what the file says.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@shared.models_only
@shared.common
def command(
    model: str, permutations: str, output: str, inverse: bool, quiet: bool, as_json: bool, debug: bool, **given: Any
) -> None:
    """Write a model with its axes permuted: its function stays. An adapter follows its model, and stays an adapter.

    \b
    remelt permute b.safetensors b-to-a.safetensors -o b-aligned.safetensors
    remelt permute style.safetensors b-to-a.safetensors -o style-aligned.safetensors
    remelt permute b-aligned.safetensors b-to-a.safetensors --inverse -o b.safetensors
    """
    from remelt.api.merging import merge
    from remelt.api.permuted_adapters import is_adapter_file, permute_adapter
    from remelt.recipe.permuting import permute

    with progress(quiet=quiet or as_json) as watch:
        if is_adapter_file(model, given["models_dirs"]):
            path = permute_adapter(model, permutations, output, inverse=inverse, watch=watch, **given)
        else:
            path = merge(permute(model, permutations, inverse=inverse), output, watch=watch, **given)
    if as_json:
        echo_json({"output": str(path)})
    elif not quiet:
        click.echo(f"wrote {path}")
