"""`remelt info`: archs and merge methods."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json
from remelt.core.nearest import nearest_hint
from remelt.errors import UsageError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_WIDEST = 52
"""The widest column that rows are filled up to."""


@click.command("info")
@click.argument("name", required=False, metavar="[ARCH|METHOD]")
@click.option("-v", "--verbose", is_flag=True, help="All that is known of an arch.")
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
    from remelt.api import arch_description, inspection
    from remelt.archs.arch import all_archs
    from remelt.methods import METHODS

    shared.load_plugins(plugins)
    if name is None:
        _list(arch_description.describe_archs(), inspection.describe_methods(), as_json)
    elif name in all_archs():
        _arch(name, arch_description.describe_arch(name), verbose, as_json)
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
    _columns("components", map(partial(_component, described), described["component_names"]))
    if verbose:
        _told("blocks", _blocks(described))
    else:
        _columns("blocks", ((_range(run["blocks"]), _count(run)) for run in described["block_runs"]))
    groups = described["groups"].items()
    _columns("groups of what is in no other block", ((group, _keys(keys)) for group, keys in groups))
    if described["preset"]:
        click.echo(f"preset strings: {', '.join(described['preset'])}")
    _told("layer classes", described["classes"])
    _columns("dialects", (_places(*one) for one in described["dialects"].items()))
    _columns("variants", described["variants"].items())
    if verbose:
        _details(described)


def _component(described: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A row: the component, its keys in a model of full size, its other names, what its keys begin with."""
    names, keys = described["component_names"][name], described["components"].get(name, ())
    also = f"also {', '.join(names['aliases'])}" if names["aliases"] else ""
    return name, _keys(keys), also, f"begins with {' or '.join(names['prefixes'])}"


def _count(run: Mapping[str, Any]) -> str:
    return _keys(run["keys"]) + (" each" if len(run["blocks"]) > 1 else "")


def _keys(keys: Sequence[str]) -> str:
    return f"{len(keys)} key{'s' if len(keys) != 1 else ''}"


def _range(blocks: Sequence[str]) -> str:
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]} .. {blocks[-1]}"


def _blocks(described: Mapping[str, Any]) -> Iterator[str]:
    """The blocks, those of one make together, with their further names and their keys."""
    for run in described["block_runs"]:
        also = ", ".join(described["block_names"][run["blocks"][0]])
        yield f"{_range(run['blocks'])}: {_count(run)}{f', also {also}' if also else ''}"
        yield from (f"  {key}" for key in _folded(run["keys"]))


def _folded(keys: Iterable[str]) -> Iterator[str]:
    """Keys, those of one module in one line, and those that differ by their numbers alone.

    >>> list(_folded(["mlp.0.bias", "mlp.0.weight", "mlp.1.bias", "mlp.1.weight", "norm.weight"]))
    ['mlp.{0..1}.{bias,weight}', 'norm.weight']
    """
    modules: dict[str, list[str]] = {}
    for key in keys:
        module, dot, leaf = key.rpartition(".")
        modules.setdefault(module + dot, []).append(leaf)
    alike: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for module, leaves in modules.items():
        shown = f"{{{','.join(leaves)}}}" if len(leaves) > 1 else leaves[0]
        alike.setdefault((_NUMBER.sub("#", module), shown), []).append(tuple(_NUMBER.findall(module)))
    for (module, shown), rows in alike.items():
        columns = [tuple(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
        whole = len(set(rows)) == prod(map(len, columns))
        for row in [tuple(map(_numbers, columns))] if whole else rows:
            numbers = iter(row)
            yield re.sub("#", lambda _, numbers=numbers: next(numbers), module) + shown  # type: ignore[misc]


def _numbers(found: tuple[str, ...]) -> str:
    """Some numbers in one place of a name."""
    if len(found) == 1:
        return found[0]
    numbers = sorted(map(int, found))
    in_a_row = len(numbers) == numbers[-1] - numbers[0] + 1
    return f"{{{numbers[0]}..{numbers[-1]}}}" if in_a_row else f"{{{','.join(map(str, numbers))}}}"


def _places(dialect: str, parts: Mapping[str, Any]) -> tuple[str, str]:
    places = (
        f"{component} in {part['folder']}/" if part["folder"] else f"{component} below {part['prefix']}"
        for component, part in parts.items()
    )
    return dialect, ", ".join(places)


def _details(described: Mapping[str, Any]) -> None:
    """What tells an arch from others, and what becomes of its keys."""
    for signs in described["recognised"]:
        _told("recognised by all of (~ at full size)", signs)
    for name, signs in described["variant_signs"].items():
        _told(f"the variant {name} by all of", signs)
    for name, signs in described["near_signs"].items():
        _told(f"near miss {name} by all of ({described['near'][name]})", signs)
    bare = ((name, ", ".join(one["bare"])) for name, one in described["component_names"].items() if one["bare"])
    _columns("in a file of one component, without a prefix", bare)
    starts = ((start["found"], f"for {start['usual']}") for start in described["other_starts"])
    _columns("other beginnings in some files", starts)
    _told("copied, never merged", described["copied"])
    _told("one tensor under several names", map(", ".join, described["tied"]))
    if described["averages"]:
        averaged = " or ".join(described["averages"]["of"])
        _told("running averages", [f"{described['averages']['prefix']} and what follows {averaged}, without dots"])
    for dialect, parts in described["dialects"].items():
        for component, part in parts.items():
            renames = ((original, f"is {other}") for original, other in part["renames"])
            _columns(f"{component} in {dialect}", renames)
            _told(f"left out of {component} in {dialect}", part["left_out"])
    _columns("told user interfaces (ModelSpec)", described["modelspec"].items())


def _told(what: str, lines: Iterable[str]) -> None:
    """Some lines under a heading, where there are any."""
    for number, line in enumerate(lines):
        if not number:
            click.echo(what)
        click.echo(f"  {line}".rstrip())


def _columns(what: str, rows: Iterable[Iterable[str]]) -> None:
    """Rows under a heading, in columns; one that is wide pushes the next on, in its own row alone."""
    listed = [tuple(row) for row in rows]
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*listed, strict=True)]
    _told(what, ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in listed))


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
