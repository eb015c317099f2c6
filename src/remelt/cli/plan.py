"""`remelt plan`: what a merge would do, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from remelt.cli import options as shared
from remelt.cli.output import echo_json, plan_record
from remelt.cli.sources import changes, name_outputs, operated, read_sources, stores


@click.command("plan")
@shared.merging
@shared.models
@shared.common
def command(sources: tuple[str, ...], output: str | None, as_json: bool, **given: Any) -> None:
    """Tell what a merge with the same arguments would do; exit with 3 where it would be refused.

    Inputs and their archs, key coverage, bytes read and written, free disk, peak memory, time, warnings.
    """
    from remelt.api.merging import prepare_merges
    from remelt.api.resources import free_disk
    from remelt.planning.explain import explain

    shared.load_plugins(given["plugins"])
    alone = {"changed": changes(given), "stored": stores(given, output)}
    read = operated(read_sources(sources, given["method"], given["parameters"], **alone), given)
    options = shared.merge_options(given, read)
    with prepare_merges(read, name_outputs(read, output, options), options) as prepared:
        plans = [group.plan for group in prepared.groups]
    free = [free_disk(Path(plan.outputs[0].path or ".")) for plan in plans]
    if as_json:
        echo_json([{**plan_record(plan), "free_disk": disk} for plan, disk in zip(plans, free, strict=True)])
        return
    for plan, disk in zip(plans, free, strict=True):
        click.echo(explain(plan, disk))
