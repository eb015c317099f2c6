"""`remelt resize-lora`: a LoRA at another rank."""

from __future__ import annotations

from typing import Any

import click

from remelt.cli.adapters import join, writing
from remelt.errors import UsageError
from remelt.recipe.node import as_node


@click.command("resize-lora")
@click.argument("lora", metavar="LORA")
@writing
def command(lora: str, **given: Any) -> None:
    """Write a LoRA at another rank, or at the least that keeps a share of the energy of each module.

    \b
    remelt resize-lora style.safetensors -o style-8.safetensors --rank 8
    remelt resize-lora style.safetensors -o style-small.safetensors --energy 0.95
    """
    if given["rank"] is None and given["energy"] is None:
        raise UsageError("a LoRA is resized to a rank, or to a share of its energy", hint="--rank 8, or --energy 0.95")
    join(as_node(lora), given)
