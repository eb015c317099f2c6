"""`remelt merge-lora`: several LoRAs as one."""

from __future__ import annotations

import functools
import operator
from typing import Any

import click

from remelt.cli.adapters import join, strengths_of, writing
from remelt.errors import UsageError
from remelt.recipe.node import Value, as_node


@click.command("merge-lora")
@click.argument("loras", metavar="LORA...", nargs=-1, required=True)
@strengths_of
@click.option("--base", metavar="MODEL", help="The model that they change, where they name its modules differently.")
@writing
def command(loras: tuple[str, ...], strengths: tuple[float, ...], base: str | None, **given: Any) -> None:
    """Write the weighted sum of LoRAs as one LoRA: exactly, of ranks that add up, or at a rank.

    \b
    remelt merge-lora style.safetensors subject.safetensors -s 0.8 -s 0.5 -o both.safetensors
    remelt merge-lora style.safetensors subject.safetensors -o both.safetensors --rank 32
    """
    if strengths and len(strengths) != len(loras):
        raise UsageError(f"there are {len(loras)} LoRAs, but {len(strengths)} strengths", hint="one -s for each")
    each = strengths or (1.0,) * len(loras)
    parts = [as_node(lora) * Value(strength) for lora, strength in zip(loras, each, strict=True)]
    join(functools.reduce(operator.add, parts), given, base)
