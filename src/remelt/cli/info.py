"""`remelt info`: archs and merge methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json
from remelt.core.nearest import nearest_hint
from remelt.errors import UsageError


@click.command("info")
@click.argument("name", required=False, metavar="[ARCH|METHOD]")
@click.option("-v", "--verbose", is_flag=True, help="With the keys of each block.")
@shared.models
@shared.common
def command(
    name: str | None,
    verbose: bool,
    models_dirs: tuple[Path, ...],
    plugins: tuple[Path, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """List archs and merge methods, or describe one: components, blocks, layer classes; signature, spaces, formula."""
    from remelt.api import inspection
    from remelt.archs.arch import all_archs
    from remelt.methods import METHODS

    shared.load_plugins(plugins)
    if name is None:
        _list(inspection.describe_archs(), inspection.describe_methods(), as_json)
    elif name in all_archs():
        _arch(name, inspection.describe_arch(name), verbose, as_json)
    elif name in METHODS:
        _method(inspection.describe_method(METHODS[name]), as_json)
    else:
        hint = nearest_hint(name, [*all_archs(), *METHODS]) or "remelt info lists them"
        raise UsageError(f"no arch and no merge method is named {name!r}", hint=hint)


def _list(archs: list[dict[str, str]], methods: list[dict[str, str]], as_json: bool) -> None:
    if as_json:
        echo_json({"archs": archs, "methods": methods})
        return
    click.echo("archs (any other works too: its blocks are inferred from the keys)")
    for arch in archs:
        click.echo(f"  {arch['name']:<14} {arch['title']}")
    click.echo("merge methods")
    width = max(len(method["signature"]) for method in methods)
    for method in methods:
        click.echo(f"  {method['signature']:<{width}}  {method['summary']}")


def _arch(name: str, described: Mapping[str, Any], verbose: bool, as_json: bool) -> None:
    if as_json:
        echo_json({"name": name, **described})
        return
    click.echo(f"{name}: {described['title']}")
    click.echo("components")
    for component, keys in described["components"].items():
        click.echo(f"  {component:<14} {len(keys)} keys")
    click.echo("blocks")
    for block, keys in described["blocks"].items():
        click.echo(f"  {block:<14} {len(keys)} keys")
        if verbose:
            for key in keys:
                click.echo(f"    {key}")
    for group, keys in described["groups"].items():
        click.echo(f"  {group:<14} {len(keys)} keys (a group of what is in no other block)")
    if described["preset"]:
        click.echo(f"preset strings: {', '.join(described['preset'])}")
    click.echo("layer classes")
    for layer in described["classes"]:
        click.echo(f"  {layer}")
    _told("dialects", (_dialect(*one) for one in described["dialects"].items()))
    _told("variants", (f"{variant:<20} {note}" for variant, note in described["variants"].items()))
    if verbose:
        for signs in described["recognised"]:
            _told("recognised by all of", signs)
        _told("taken for others", (f"{near:<20} {note}" for near, note in described["near"].items()))
        _told("copied, never merged", described["copied"])
        _told("one tensor under several names", map(", ".join, described["tied"]))


def _told(what: str, lines: Iterable[str]) -> None:
    """Some lines under a heading, where there are any."""
    for number, line in enumerate(lines):
        if not number:
            click.echo(what)
        click.echo(f"  {line}")


def _dialect(name: str, parts: Mapping[str, Any]) -> str:
    places = (
        f"{component} in {part['folder']}/" if part["folder"] else f"{component} below {part['prefix']}"
        for component, part in parts.items()
    )
    return f"{name:<14} {', '.join(places)}".rstrip()


def _method(described: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        echo_json(described)
        return
    click.echo(described["signature"])
    spaces = ", ".join(f"{argument}: {kind}" for argument, kind in described["arguments"].items())
    click.echo(f"spaces  {spaces} -> {described['returns']}")
    passes = described["reductions"]
    streamed = {
        "element": "streams tile by tile",
        "row": "streams row by row",
        "tensor": "needs whole tensors",
        "model": "needs several keys",
    }
    rounds = f", after {passes} pass{'es' if passes != 1 else ''} of sums" if passes else ""
    click.echo(f"cut     {described['cut']}: {streamed[described['cut']]}{rounds}")
    click.echo("")
    click.echo(described["documentation"])
